"""The examples and the README: whatever they tell a reader to type works."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import typer

import fedge

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    EXAMPLES / "README.md",
    ROOT / "docs" / "edge.md",
    ROOT / "docs" / "llm.md",
]
EXPERIMENTS = [*EXAMPLES.rglob("*.toml"), ROOT / "app" / "starter.toml"]
SERVED = "127.0.0.1:7443"  # where the README's devices join
SOME_SECONDS = (  # long enough for the device that starts later
    *("--set", "experiment.stop.seconds=20"),
    *("--set", "experiment.stop.updates=1000000"),
    *("--set", "experiment.stop.target=1"),
)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def read(path: Path) -> str:
    return path.read_text("utf-8")


def fedge_words(page: Path) -> list[list[str]]:
    """Every command that begins with `fedge`, without that word: in fences, indented, or in backticks."""
    text = read(page).replace("\\\n", " ")  # a line may go on
    fences = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = [*"".join(fences).splitlines(), *re.findall(r"^    (.*)|`([^`\n]+)`", text, re.MULTILINE)]
    lines = ["".join(piece) for piece in code]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fedge ")]


COMMANDS = [(page.relative_to(ROOT), words) for page in PAGES for words in fedge_words(page)]


def run(*words: str | Path, cwd: Path = ROOT, most_s: float = 100) -> str:
    """Run a process to its end; what it printed on standard output."""
    done = subprocess.run(words, cwd=cwd, env=ONE_THREAD, capture_output=True, text=True, timeout=most_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fedge_run(*words: str | Path, cwd: Path = ROOT) -> str:
    return run(Path(sys.executable).with_name("fedge"), *words, cwd=cwd)


@contextmanager
def processes(*commands: Sequence[str | Path], cwd: Path = ROOT) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are gone at the end, come what may."""
    running = [
        subprocess.Popen(words, cwd=cwd, env=ONE_THREAD, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for words in commands
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


@contextmanager
def serving(*words: str | Path, cwd: Path = ROOT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fedge serve` on a free port, once it listens; the process and the address."""
    command = [Path(sys.executable).with_name("fedge"), "serve", *words, "--listen", "127.0.0.1:0"]
    with processes(command, cwd=cwd) as [process]:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.match(r"listening on (\S+);", line):
                yield process, found[1]
                return
        raise AssertionError("the coordinator ended before it listened")


# ---- what the pages say ------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value) if isinstance(value, Path) else None)
def test_every_command_on_a_page_is_one_of_the_command_line(page: Path, words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    command, name, *rest = group.commands[words[0]], *words  # type: ignore[attr-defined]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    assert command.make_context(name, rest).params


def test_the_pages_name_commands_at_all() -> None:
    named = {words[0] for _, words in COMMANDS}
    assert {"init", "run", "compare", "report", "serve", "join", "status"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", read(page))]
    assert links
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_targets_and_extras_that_exist(page: Path) -> None:
    text = read(page)
    makefile = read(ROOT / "Makefile")
    targets = re.findall(r"^([a-z]+):", makefile, re.MULTILINE)
    assert set(re.findall(r"`?make ([a-z]+)`|^make ([a-z]+)", text, re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(extras)
    assert not [path for path in re.findall(r"\bexamples/[\w/]+\.(?:toml|py)\b", text) if not (ROOT / path).is_file()]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_experiment_can_be_run_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    assert fedge.load_experiment(path).experiment.stop.updates


def test_the_settings_the_readme_changes_can_be_changed() -> None:
    changed = [second for _, words in COMMANDS for first, second in pairwise(words) if first == "--set"]
    assert len(changed) >= 2
    for setting in changed:
        fedge.load_experiment(ROOT / "app" / "starter.toml", [setting])


@pytest.mark.slow
def test_the_readmes_simulation_runs(tmp_path: Path) -> None:
    """Its commands as they stand, only shorter."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for words in fedge_words(ROOT / "README.md"):
        if words[0] == "run":
            words += ["--set", "experiment.stop.updates=20", "--quiet"]
        if words[0] not in ("serve", "join", "status", "edge", "llm"):
            fedge_run(*words, cwd=tmp_path)
    assert (tmp_path / "compare" / "compare.html").is_file()
    assert fedge.load_run(tmp_path / "runs" / "b").experiment.server.scheduler["kind"] == "fedbuff"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_readmes_coordinator_and_devices_finish_together(tmp_path: Path) -> None:
    words = fedge_words(ROOT / "README.md")
    [serve] = [line[1:] for line in words if line[0] == "serve"]
    joins = [line for line in words if line[0] == "join"]
    [status] = [line for line in words if line[0] == "status"]
    fedge_run("init", "lab", cwd=tmp_path)
    with serving(*serve, *SOME_SECONDS, cwd=tmp_path) as (coordinator, address):

        def there(line: list[str]) -> list[str]:
            assert SERVED in line
            return [word.replace(SERVED, address) for word in line]

        assert "version 0" in fedge_run(*there(status), cwd=tmp_path)
        executable = str(Path(sys.executable).with_name("fedge"))
        with processes(*([executable, *there(line)] for line in joins), cwd=tmp_path) as devices:
            told = [device.communicate(timeout=240)[0] for device in devices]
        out, _ = coordinator.communicate(timeout=30)
    assert coordinator.returncode == 0
    assert "report.html" in out
    assert len(told) == 2
    assert all("the run ended: seconds" in text for text in told), told


# ---- the examples ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_custom_scheduler_closes_each_group_a_fixed_time_after_its_first_arrival(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = "examples/custom_scheduler/experiment.toml"
    fedge_run("run", path, "--set", "experiment.stop.updates=40", "--out", folder, "--quiet")
    groups, first = [], None
    for line in map(json.loads, read(folder / "events.jsonl").splitlines()):
        if line["event"] == "arrived" and first is None:
            first = line["t"]
        if line["event"] == "aggregated":
            groups.append((line["t"] - first, len(line["members"])))
            first = None
    assert sum(size for _, size in groups) >= 40
    assert [wait_s for wait_s, _ in groups] == pytest.approx([3.0] * len(groups))
    assert max(size for _, size in groups) > 1


@pytest.mark.slow
def test_five_schedulers_are_compared(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    short = ("--set", "experiment.stop.updates=30")
    out = run(sys.executable, "examples/five_schedulers/run.py", "--out", folder, *short)
    for kind in ("fedavg", "fedasync", "fedbuff", "fedat", "compass"):
        assert re.search(rf"^ ?{kind} +{kind} ", out, re.MULTILINE), out
        assert fedge.load_run(folder / kind).experiment.server.scheduler["kind"] == kind
    assert out.splitlines()[-1] == str(folder / "compare.html")


@pytest.mark.slow
def test_the_federated_model_runs_on_a_device_that_leaves_early(tmp_path: Path) -> None:
    short = ("--set", "experiment.stop.updates=60")
    out = run(sys.executable, "-m", "examples.early_exit", "--out", tmp_path / "run", *short)
    with_exits, without = (
        re.search(rf"{how} exits: +planned '(.*)'; .* answered by (.*)", out) for how in ("with", "without")
    )
    assert with_exits, out
    assert without, out
    assert without[1] == "local"
    assert without[2] == "device: 300"
    assert ("exit" in with_exits[1]) == ("exit:" in with_exits[2])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_edge_quickstart_goes_on_when_its_cloud_is_killed(tmp_path: Path) -> None:
    """What is checked is who answers; how well depends on the machine to the last digit."""
    out = run(sys.executable, "-m", "examples.edge_quickstart", "--out", tmp_path / "q", most_s=280)
    before, killed, after = out.partition("the cloud is killed")
    assert killed, out
    assert re.search(r"the device runs: \w+ as \S+", before), out
    assert re.search(r"400 answers by .*cloud \d+", before), out
    answered = re.search(r"400 answers by (.*)", after)
    assert answered, out
    assert "none" not in answered[1]
    assert sum(int(count) for count in re.findall(r" (\d+)(?:,|$)", answered[1])) == 400
    assert "bytes sent per answer" in after
    assert after.count("0.png: ") == 1


def test_the_mock_clients_pass() -> None:
    assert "2 passed" in run(sys.executable, "-m", "pytest", "-q", "examples/mock_clients")


def test_the_client_script_keeps_the_training_of_the_plain_one() -> None:
    """The two may differ by their arguments, the three numbered lines and the indentation: that is what is claimed."""
    before, after = (
        [line.strip() for line in read(EXAMPLES / "training_script" / name).splitlines()]
        for name in ("before.py", "after.py")
    )
    model = next(index for index, line in enumerate(before) if line.startswith("model ="))
    kept = before[model:]
    changed = [line for line in kept if line and line not in after]
    assert [line.split("(")[0] for line in changed] == ["for _ in range", "print"]
    assert [line.rpartition("# ")[2][0] for line in after if re.search(r"# [123]", line)] == ["1", "2", "3"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_training_scripts_federate(tmp_path: Path) -> None:
    folder = EXAMPLES / "training_script"
    assert "loss" in run(sys.executable, folder / "before.py")
    steps = ("--set", "server.scheduler.steps=200")  # a line for each version, and nobody reads them meanwhile
    with serving(folder / "experiment.toml", *steps, *SOME_SECONDS, "--state", tmp_path / "run") as (
        coordinator,
        address,
    ):
        sites = ([sys.executable, folder / "after.py", address, site, "2"] for site in ("0", "1"))
        with processes(*sites) as scripts:
            told = [script.communicate(timeout=240)[0] for script in scripts]
        coordinator.communicate(timeout=30)
    assert coordinator.returncode == 0
    assert all("the run ended: seconds" in text for text in told), told
    accuracy = fedge.load_run(tmp_path / "run").metrics["accuracy"]
    assert accuracy[-1] > accuracy[0] + 0.2
