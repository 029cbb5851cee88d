"""The experiment file: what is read, what is refused with which sentence, and that writing it back loses nothing."""

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import build, toml
from fedge import experiment as experiments
from fedge.client.data import Dataset
from fedge.core.errors import ExperimentError, TrainerError
from fedge.strategies.hooks import HOOKS

ROOT = Path(__file__).parents[1]
X, Y = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.int64)
DATA = Dataset(X, Y, X, Y, ("a", "b"))


def read(text: str = "", *overrides: str) -> experiments.Experiment:
    return build.settled(experiments.parse(text, overrides))


def refusal(text: str = "", *overrides: str) -> str:
    with pytest.raises(ExperimentError) as caught:
        read(text, *overrides)
    return str(caught.value)


# ---- reading and writing -----------------------------------------------------------------------


def test_an_empty_file_is_an_experiment() -> None:
    found = read()
    assert found.data.dataset == "fashion-mnist"
    assert found.data.partition["clients"] == 10
    assert found.server.scheduler["kind"] == "compass"
    assert found.server.optimizer == {"kind": "momentum", "rate": 1.0, "beta": 0.6}
    assert found.server.staleness == {"kind": "constant"}
    assert found.experiment.stop.updates == experiments.UPDATES_IF_ENDLESS


@pytest.mark.parametrize("path", [ROOT / "app" / "starter.toml", *sorted((ROOT / "examples").glob("*.toml"))], ids=str)
def test_the_files_we_ship_are_experiments(path: Path) -> None:
    found = build.load_experiment(path)
    assert read(experiments.resolved(found)) == found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["server.scheduler.kind=fedavg", "server.selector={ kind = 'uniform', clients = 3 }"],
        ["client.hooks=[{ kind = 'scaffold' }]"],
        ["client.hooks=[{ kind = 'feddyn' }]"],
        ["server.scheduler.kind=fedat", "server.scheduler.tiers=4"],
        ["server.weigher.kind=fednova"],
        ["server.optimizer.kind=fednova"],
        ["data.partition.kind=class", "experiment.stop.target=0.5"],
        ["data.dataset={ kind = 'hf:mnist', split = 'a' }", "report.to=['files', 'tensorboard']"],
        ["simulation.network={ bandwidth_bps = 1e6, up_s = 60, down_s = 5 }"],
    ],
    ids=str,
)
def test_resolved_text_reads_back_equal_and_settles_to_itself(overrides: list[str]) -> None:
    found = read("", *overrides)
    text = experiments.resolved(found)
    assert experiments.parse(text) == found == read(text)


def test_resolved_text_names_every_key_that_has_a_value() -> None:
    data = tomllib.loads(experiments.resolved(read()))
    for path, default in experiments.keys().items():
        value: Any = data
        for word in path.split("."):
            assert default is None or word in value, path
            value = value.get(word, {})


def test_the_halves_of_an_algorithm_bring_each_other() -> None:
    assert read("", "client.hooks=[{ kind = 'scaffold' }]").server.optimizer == {"kind": "scaffold", "rate": 1.0}
    assert read("", "client.hooks=[{ kind = 'scaffold' }]").server.weigher == {"kind": "equal"}
    assert read("", "server.scheduler={ kind = 'fedat', tiers = 4 }").server.optimizer == {"kind": "fedat", "tiers": 4}
    nova = read("", "server.weigher={ kind = 'fednova', momentum = 0.5 }").server.optimizer
    assert nova is not None
    assert (nova["kind"], nova["momentum"]) == ("fednova", 0.5)


def test_another_kind_starts_from_its_own_settings_but_keeps_the_clients() -> None:
    text = """
    [data]
    partition = { kind = "class", clients = 7, max_classes = 4 }
    [server]
    scheduler = { kind = "compass", alpha = 0.5 }
    """
    found = read(text, "server.scheduler.kind=fedbuff", "data.partition.kind=iid")
    assert found.data.partition == {"kind": "iid", "clients": 7}
    assert "alpha" not in found.server.scheduler
    assert read(text, "server.scheduler.kind=compass").server.scheduler["alpha"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["kind=robust"], {"kind": "robust", "byzantine": 2, "momentum": 0.5, "cache": True}),
        (["kind=bulyan", "byzantine=1"], {"kind": "bulyan", "byzantine": 1, "momentum": 0.5, "cache": True}),
        (["byzantine=1", "kind=bulyan"], {"kind": "bulyan", "byzantine": 1, "momentum": 0.5, "cache": True}),
        (["kind=local-clipping"], {"kind": "local-clipping", "byzantine": 2}),
        (["kind=mean"], {"kind": "mean"}),
    ],
    ids=str,
)
def test_another_aggregator_withstands_as_many(overrides: list[str], kept: dict[str, Any]) -> None:
    text = """
    [server]
    aggregator = { kind = "gas", byzantine = 2, momentum = 0.5, cache = true, splits = 9, pre = ["nnm"] }
    """
    found = experiments.parse(text, [f"server.aggregator.{one}" for one in overrides])
    assert found.server.aggregator == kept


def test_a_kind_kept_its_f_is_refused_where_that_is_too_many() -> None:
    text = (
        "[data]\npartition = { kind = 'iid', clients = 8 }\n[server]\naggregator = { kind = 'median', byzantine = 2 }"
    )
    said = refusal(text, "server.aggregator.kind=bulyan")
    assert (
        "'bulyan' with byzantine = 2 needs 11 clients at once, and there are 8 clients; set byzantine to at most 1"
        in said
    )


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_kind_is_text_even_where_it_reads_like_a_number(kind: str) -> None:
    attack = read("", f"simulation.attack.kind={kind}", "simulation.attack.clients=3").simulation.attack
    assert attack is not None
    assert (attack["kind"], attack["clients"]) == (kind, 3)
    assert f'simulation.attack.kind: a kind is text; write "{kind}", in quotes.' == refusal(
        f"[simulation]\nattack = {{ kind = {kind} }}"
    )


def test_overrides_are_toml_or_text() -> None:
    found = read("", "experiment.seed=3", "experiment.name = plain", "experiment.stop.target=0.5", "client.hooks=[]")
    assert (found.experiment.seed, found.experiment.name, found.experiment.stop.target) == (3, "plain", 0.5)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[client]\nbach_size = 3", "[client] has no key 'bach_size'; did you mean 'batch_size'?"),
        ("[clinet]", "The experiment file has no section 'clinet'; did you mean 'client'?"),
        ("[experiment.stop]\nupdate = 3", "[experiment.stop] has no key 'update'; did you mean 'updates'?"),
        ("[deploy.limits]\nlease = 3", "[deploy.limits] has no key 'lease'; did you mean 'lease_s'?"),
        ("[client]\nbatch_size = 'x'", "client.batch_size: expected an integer, got text."),
        ("[client]\nbatch_size = 0", "client.batch_size: expected an integer >= 1."),
        ("client = 3", "client: expected a table, got an integer."),
        ("[experiment]\nstop = { target = 1.5 }", "experiment.stop.target: expected a number <= 1.0."),
        ("[experiment]\nstop = { target = 0 }", "experiment.stop.target: expected a number > 0.0."),
        ("[experiment]\nstop = { seconds = -1 }", "experiment.stop.seconds: expected a number > 0.0."),
        ("[experiment]\nname = '../up'", "experiment.name: expected 1 to 64 letters, digits, '.', '_' or '-', begin"),
        ("[simulation]\njitter = nan", "simulation.jitter must be finite, not nan."),
        ("[simulation]\nnetwork = { up_s = 3 }", "outages need both up_s and down_s"),
        ("[deploy]\nlimits = { lease_s = 0 }", "deploy.limits.lease_s is 0.0; a limit must be above 0."),
        ("[report]\nto = ['tensorbord']", "report.to: no tracker 'tensorbord'; did you mean 'tensorboard'?"),
        (
            "[server]\nscheduler = 'compass'",
            'server.scheduler: expected a table, got text; write scheduler = { kind = "compass" }.',
        ),
        (
            "[simulation]\nattack = 'alie'",
            'simulation.attack: expected a table, got text; write attack = { kind = "alie" }.',
        ),
        ("[simulation]\nnetwork = 'slow'", "simulation.network: expected a table, got text."),
        (
            "[server]\nscheduler = { kind = 'compass', min_steps = 'x' }",
            "server.scheduler.min_steps: expected an integer, got text.",
        ),
        ("[server]\nselector = 3", "server.selector: expected a table, got an integer."),
        ("[server]\noptimizer = { kind = 'sdg' }", "server.optimizer: no kind 'sdg'"),
        ("[server]\nweigher = { kind = 'sdg' }", "server.weigher: no kind 'sdg'"),
        ("[server]\nstaleness = { kind = 'sdg' }", "server.staleness: no kind 'sdg'"),
        ("[server]\naggregator = { kind = 'sdg' }", "server.aggregator: no kind 'sdg'"),
        ("[client]\nhooks = [{ kind = 'sdg' }]", "client.hooks: no kind 'sdg'"),
        ("[server]\nscheduler = { kind = 'compas' }", "no kind 'compas'; did you mean 'compass'?"),
        (
            "[server]\nscheduler = { kind = 'compass', alhpa = 1 }",
            "'compass' has no such setting; did you mean 'alpha'?",
        ),
        ("[client]\nhooks = [{ kind = 'fedprocs' }]", "no kind 'fedprocs'; did you mean 'fedprox'?"),
        ("[client]\nhooks = [{ kind = 'fedprox', mu = -1 }]", "mu"),
        ("[server]\nscheduler = { alpha = 1 }", "needs kind = one of"),
        ("[data]\npartition = { kind = 'iid', clients = 0 }", "must be at least 1"),
        ("[data]\npartition = { kind = 'natural' }", "data.partition.column: is needed, and was left out."),
        ("[server]\naggregator = { kind = 'median', byzantin = 2 }", "did you mean 'byzantine'?"),
        ("[server]\naggregator = { kind = 'median', xy = 2 }", "known: byzantine, cache, momentum, pre."),
        (
            "[server]\naggregator = { kind = 'median', pre = [{ kind = 'nnm', k = 2 }] }",
            "'nnm' has no such setting; it has none.",
        ),
        ("[server]\naggregator = { kind = 'robus' }", "no kind 'robus'; did you mean 'robust'?"),
        ("[server]\naggregator = { byzantine = 2 }", "dnc, dnc-paper, flag, flag-paper,"),
        (
            "[server]\naggregator = { kind = 'robust', size = 2 }",
            "server.aggregator.size: 'robust' has no such setting",
        ),
        ("[server]\naggregator = { kind = 'gas', base = 'nope' }", "server.aggregator.base: no kind 'nope'"),
        (
            "[server]\naggregator = { kind = 'bulyan', selection = 'foo' }",
            "server.aggregator.selection: must be one of 'iterative', 'multi-krum', not 'foo'.",
        ),
        (
            "[server]\naggregator = { kind = 'median', pre = [{ kind = 'clip', factor = 'x' }] }",
            "server.aggregator.pre.clip.factor: expected a number, got text.",
        ),
        ("[simulation]\nattack = { kind = 'nan', client = 2 }", "'nan' has no such setting; did you mean 'clients'?"),
        (
            "[simulation]\nattack = { kind = 'nan', faster = 'x' }",
            "simulation.attack.faster: expected a number, got text.",
        ),
        (
            "[simulation]\nattack = { kind = 'nan', clients = ['client-001'] }",
            "who are drawn by the seed and cannot be named",
        ),
        ("this is not toml", "The experiment file is not TOML: "),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, sentence: str) -> None:
    said = refusal(text)
    assert sentence in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["client.hooks=[{ kind = 'scaffold' }]", "server.optimizer.kind=sgd"],
            "needs the server.optimizer 'scaffold'",
        ),
        (["client.hooks=[{ kind = 'feddyn' }]", "server.optimizer.kind=adam"], "needs the server.optimizer 'feddyn'"),
        (["server.optimizer.kind=scaffold"], "needs the hook 'scaffold' in client.hooks"),
        (["server.weigher.kind=fednova", "server.optimizer.kind=sgd"], "FedNova needs both"),
        (["server.weigher.kind=equal", "server.optimizer.kind=fednova"], "FedNova needs both"),
        (["server.scheduler.kind=fedat", "server.optimizer.kind=sgd"], "FedAT needs both"),
        (["server.optimizer.kind=fedat"], "FedAT needs both"),
        (
            ["server.scheduler.kind=fedat", "server.optimizer={ kind = 'fedat', tiers = 2 }"],
            "server.optimizer.tiers is 2",
        ),
        (["server.selector.kind=all"], "the scheduler 'compass' has no rounds"),
        (
            ["server.scheduler={ kind = 'fedavg', min_clients = 11 }"],
            "server.scheduler.min_clients is 11, and there are 10",
        ),
        (["server.scheduler={ kind = 'tifl', tiers = 11 }"], "server.scheduler.tiers is 11"),
        (
            ["server.aggregator={ kind = 'fedge_needs_rows:Rule' }"],
            "needs 12 clients at once, and there are 10 clients",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_reason(
    overrides: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fedge_needs_rows.py").write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Rule:\n"
        "    honours_weights = True\n    def least(self, byzantine): return 12\n    def reduce(self, *_): return 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sentence in refusal("", *overrides)


@pytest.mark.parametrize(
    ("aggregator", "sentence"),
    [
        (
            "{ kind = 'robust', byzantine = 3 }",
            "server.aggregator 'robust' with byzantine = 3 needs 10 clients at once, and there are 8 clients;",
        ),
        ("{ kind = 'robust', byzantine = 3 }", "set byzantine to at most 2, or"),
        ("{ kind = 'median', byzantine = 1000000000 }", "set byzantine to at most 3, or"),
        (
            "{ kind = 'caf', byzantine = 2, pre = ['basgd'] }",
            "'caf' behind basgd with byzantine = 2 needs 10 clients at once, and there are 8 clients; leave out pre,",
        ),
        ("{ kind = 'bulyan', byzantine = 0, pre = ['basgd'] }", "leave out pre, without which it needs 3, or"),
    ],
)
def test_a_rule_for_more_clients_than_there_are_is_refused_with_what_would_do(aggregator: str, sentence: str) -> None:
    iid = "[data]\npartition = { kind = 'iid', clients = 8 }"
    said = refusal(f"{iid}\n[server]\nscheduler = {{ kind = 'fedavg' }}\naggregator = {aggregator}")
    assert sentence in said


def test_a_rule_that_all_clients_are_too_few_for_is_refused_with_what_would_do() -> None:
    table = {"kind": "local-clipping", "byzantine": 7}
    names = build.client_names(8)
    said = build._never_runs(table, names, "7 more clients")
    assert "set byzantine to at most 3, or take more clients; clients are client-000 to client-007." in said


@pytest.mark.parametrize("override", ["seed=3", "experiment.seed", "=3", "experiment.name.x=3", ".a=3"])
def test_a_malformed_override_is_refused(override: str) -> None:
    assert "--set" in refusal("[experiment]\nname = 'a'", override)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="fedge init"):
        build.load_experiment(tmp_path / "none.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match="Cannot read"):
        build.load_experiment(tmp_path / "e.toml")


def test_reading_an_experiment_needs_no_torch() -> None:
    kinds = ", ".join(f"{{ kind = '{kind}' }}" for kind in HOOKS.entries if kind not in build.HALVES)
    code = f"""
import sys
from fedge import build, experiment
build.settled(experiment.parse("", ["client.hooks=[{kinds}]"]))
print({{"torch"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- what is built -----------------------------------------------------------------------------


def given_back(experiment: experiments.Experiment, _: Dataset) -> experiments.Experiment:
    return experiment


class Half:
    """A trainer that forgot to evaluate, and has a layout of its own kind."""

    layout = "flat"

    def __init__(self, *_: Any) -> None: ...

    def initial(self) -> None: ...

    def train(self) -> None: ...


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            f"{__name__}:given_back",
            "returned Experiment, which is no trainer: it lacks layout, initial, train, evaluate;",
        ),
        (f"{__name__}:Half", "returned Half, which is no trainer: it lacks layout, evaluate; see"),
    ],
)
def test_what_is_no_trainer_is_named(path: str, sentence: str) -> None:
    with pytest.raises(TrainerError) as caught:
        build.trainer(experiments.parse("", [f"client.trainer={path}"]), DATA)
    assert sentence in str(caught.value)


def test_a_target_needs_something_to_measure_it_on() -> None:
    blind = dataclasses.replace(DATA, x_test=DATA.x_test[:0], y_test=DATA.y_test[:0])
    aim = experiments.parse("", ["experiment.stop.target=0.8"])
    with pytest.raises(ExperimentError, match=r"experiment\.stop\.target is 0\.8, and the data set has no test images"):
        build.check_target(aim, blind)
    build.check_target(aim, DATA)
    build.check_target(experiments.parse(""), blind)
    build.check_target(experiments.parse("", ["experiment.stop.target=0.8", "client.trainer=mine:own"]), blind)


# ---- the emitter -------------------------------------------------------------------------------

SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=5))
def test_law_toml_reads_back_what_was_written(data: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(data)) == data


def test_what_has_no_place_in_toml_is_refused() -> None:
    with pytest.raises(ExperimentError, match="has no place"):
        toml.dumps({"a": object()})


# ---- the page ----------------------------------------------------------------------------------


def test_the_page_lists_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "experiment.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z_]+\.[a-z_.]+)` \| (.+?) \|", page, re.MULTILINE))
    assert rows == {path: _shown(default) for path, default in experiments.keys().items()}


def _shown(default: Any) -> str:
    return "none" if default is None else f"`{toml._value(default)}`"
