"""The command line.

Owns arguments, what is printed where (results on standard output, progress on standard error), and exit codes. Any
FedgeError is one line, or one JSON object with --json. Must never hold logic, and imports a command's modules only when
it runs, so that `fedge --help` is quick.
"""

import json as jsons
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import click
import typer
from typer.core import TyperArgument

from fedge.core.errors import ExperimentError, FedgeError
from fedge.edge_cli import edge
from fedge.llm_cli import llm
from fedge.printing import Json, Quiet, note, say, table

if TYPE_CHECKING:
    from fedge.experiment import Experiment, Stop
    from fedge.runs import Run, Watcher
    from fedge.strategies.aggregators.advice import Advice

app = typer.Typer(
    name="fedge",
    help="Federated learning on slow, flaky and hostile devices.",
    pretty_exceptions_enable=False,
    add_completion=False,
)
robust = typer.Typer(name="robust", help="Aggregation among hostile clients.")
app.add_typer(robust)
app.add_typer(edge)
app.add_typer(llm)

INTERRUPTED = 130
USAGE = 2
_NO_LOCKS = "This command locks files as POSIX systems do, which this one does not know; run it on Linux."

ExperimentFile = Annotated[Path, typer.Argument(help="The experiment file.", show_default=False)]
Address = Annotated[str, typer.Argument(help="host:port of the coordinator.", show_default=False)]
Setting = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. experiment.seed=3; repeatable."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from fedge import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder it goes to; else this one.", show_default=False)
    ] = Path(),
    json: Json = False,
) -> None:
    """Write a commented starter experiment, DIR/experiment.toml."""
    path = folder / "experiment.toml"
    if path.exists():
        raise ExperimentError(f"{str(path)!r} is there already; name another folder, or move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("starter.toml"), path)
    except OSError as error:
        raise ExperimentError(f"Cannot write {str(path)!r} ({error.strerror}); name another folder.") from None
    say({"experiment": str(path)}, json, f"{path}  (try: fedge run {path})")


@app.command()
def run(
    experiment: ExperimentFile,
    set: Setting = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="The run folder; else runs/NAME-DATE-TIME.")] = None,
    processes: Annotated[int | None, typer.Option(min=0, help="Train in so many processes.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Simulate an experiment in virtual time and write a run folder."""
    from fedge import api, build, runs

    more = [] if processes is None else [f"simulation.processes={processes}"]
    plan = build.load_experiment(experiment, [*set, *more])
    name = plan.experiment.name
    _remark(plan)
    with _watching(name, plan.experiment.stop, silent=quiet or json) as watchers:
        made = api.play(plan, lambda: runs.new_folder(name, out), watchers)
    _report(made, json)


@app.command()
def serve(
    experiment: ExperimentFile,
    set: Setting = [],  # noqa: B006 - typer copies it
    listen: Annotated[str | None, typer.Option(help="host:port; else deploy.listen of the experiment.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="The run folder, to go on with if it exists; else runs/NAME.")
    ] = None,
    insecure_remote: Annotated[
        bool, typer.Option("--insecure-remote", help="Let other machines connect although there is no TLS.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Coordinate an experiment for devices that join; started again on the same folder, it goes on."""
    from fedge import build, serving

    plan = build.load_experiment(experiment, set)
    name = plan.experiment.name
    _remark(plan)

    def on_listening(address: str) -> None:
        note(f"listening on {address}; devices join with: fedge join {address}")

    with _watching(name, plan.experiment.stop, silent=quiet or json) as watchers:
        try:
            made = serving.coordinate(
                plan,
                state or Path("runs") / name,
                listen=listen or plan.deploy.listen,
                allow_remote=insecure_remote,
                on_listening=on_listening,
                watchers=watchers,
            )
        except KeyboardInterrupt:
            if not json:
                note("the same command goes on with the run")
            raise
    _report(made, json)


@app.command()
def join(
    address: Address,
    experiment: Annotated[
        Path | None, typer.Argument(help="The device's own experiment file; else the coordinator's.")
    ] = None,
    set: Setting = [],  # noqa: B006 - typer copies it
    name: Annotated[
        str | None, typer.Option(help="This device's name; else client-00K with --shard K, or the host's.")
    ] = None,
    shard: Annotated[
        int | None, typer.Option(min=0, help="Train on part K of the partition; else on all data.")
    ] = None,
    state: Annotated[Path | None, typer.Option(help="Where to keep what must survive a restart; else nowhere.")] = None,
    json: Json = False,
) -> None:
    """Be a device: train for the coordinator at ADDRESS until the run ends."""
    from dataclasses import asdict

    from fedge import build, serving

    if experiment is None and set:
        raise ExperimentError("--set needs an experiment file of your own; name it after the address.")
    plan = None if experiment is None else build.load_experiment(experiment, set)
    known = name or (platform.node() or "client" if shard is None else build.client_names(shard + 1)[-1])

    def progress(kind: str, details: Mapping[str, Any]) -> None:
        shown = {key: value for key, value in details.items() if isinstance(value, int | str)}
        note(f"{known}: {kind} " + "  ".join(f"{key} {value}" for key, value in shown.items()))

    told = None if json else progress
    done = serving.participate(address, plan, name=known, shard=shard, folder=state, progress=told)
    say(asdict(done), json, f"{known}: {done.updates} updates, {done.refused} refused; the run ended: {done.finished}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)], json: Json = False) -> None:
    """Write report.html, with its plots, into a run folder."""
    from fedge.report import write

    page = write(run)
    say({"report": str(page)}, json, str(page))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where compare.html and compare.png go.")] = Path("compare"),
    target: Annotated[float | None, typer.Option(help="Test accuracy, in (0, 1]; else the runs' own.")] = None,
    json: Json = False,
) -> None:
    """Compare runs: time to the target relative to the fastest, as a table and as plots."""
    from dataclasses import asdict

    from fedge.report import compare as compare_runs

    found = compare_runs(runs, out, target)
    if json:
        rows = [asdict(row) for row in found.rows]
        say({"target": found.target, "rows": rows, "page": str(found.page), "plot": str(found.plot)}, json, "")
        return
    title = "" if found.target is None else f"to {found.target:.1%} accuracy"
    table(found.heads, found.cells, title)
    typer.echo(str(found.page))


@app.command()
def status(address: Address, json: Json = False) -> None:
    """How the run at ADDRESS stands."""
    from fedge import serving
    from fedge.progress import duration

    found = serving.status(address)
    if json:
        say(found, json, "")
        return
    metrics = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found["metrics"].items())
    head = f"version {found['version']}  updates {found['updates']}  running {duration(found['running_s'])}  {metrics}"
    typer.echo(f"{head}  {'ended: ' + found['finished'] if found['finished'] else ''}".rstrip())
    heads = ("client", "state", "updates", "refused")
    table(heads, [[str(client[key]) for key in heads] for client in found["clients"]])


@robust.callback(invoke_without_command=True)
def _robust(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@robust.command()
def advise(
    clients: Annotated[int, typer.Option(help="How many clients there are.", show_default=False)],
    byzantine: Annotated[int, typer.Option(help="How many of them are hostile, at most.", show_default=False)],
    sampled: Annotated[int | None, typer.Option(help="How many are drawn per round; else all.")] = None,
    risk: Annotated[float, typer.Option(help="The accepted probability that a round holds more than f.")] = 1e-3,
    rounds: Annotated[int, typer.Option(help="The risk is for all of so many rounds together.")] = 1,
    json: Json = False,
) -> None:
    """Which f to set and which rules withstand it, for clients drawn at random."""
    from dataclasses import asdict

    from fedge.strategies.aggregators import advice

    found = advice.advise(clients, clients if sampled is None else sampled, byzantine, risk, rounds)
    if json:
        say(asdict(found), json, "")
        return
    _advice(found)


# ---- printing ----------------------------------------------------------------------------------


@contextmanager
def _watching(title: str, stop: "Stop", *, silent: bool) -> Iterator["list[Watcher]"]:
    """The progress, unless there is to be none."""
    if silent:
        yield []
        return
    from fedge.progress import Progress

    with Progress(title, stop) as progress:
        yield [progress]


def _remark(plan: "Experiment") -> None:
    """Say what protects less than it seems to."""
    from fedge import hostile

    for remark in hostile.remarks(plan):
        note(f"note: {remark}")


def _report(made: "Run", json: bool) -> None:
    """Write the report and say where the run is."""
    from fedge.report import write

    page = ""
    if made.folder is not None:
        try:
            page = str(write(made.folder))
        except ExperimentError as error:  # without the plots a run is still a run
            note(f"no report: {error}")
    summary = {**made.summary, "folder": str(made.folder), "report": page}
    accuracy = made.summary["accuracy"].get("final")
    reached = made.summary["time_to_target_s"]
    words = [f"accuracy {accuracy:.2%}"] if accuracy is not None else []
    if made.summary["target"] is not None:
        words.append(
            f"target {made.summary['target']:.0%} " + (f"after {reached:.1f} s" if reached is not None else "missed")
        )
    held = f", {made.summary['held']} groups held" if made.summary["held"] else ""
    words.append(
        f"{made.summary['versions']} versions, {made.summary['updates']} updates{held} ({made.summary['finished']})"
    )
    words += [made.summary[key] for key in ("starved", "failures", "unheard") if made.summary.get(key)]
    say(summary, json, "\n".join(["  ".join(words), page or str(made.folder)]))


def _advice(found: "Advice") -> None:
    """The probabilities, what follows from them, the rules, and what to write."""
    f = found.byzantine
    drawn = "1 client" if found.sampled == 1 else f"{found.sampled} clients"
    typer.echo(f"{drawn} per round, drawn from {found.clients}, of whom hostile: {found.hostile}\n")
    tails = [(str(tail.byzantine), f"{float(tail.group):.2g}", f"{float(tail.run):.2g}") for tail in found.tails]
    table(("f", "more than f in a round", f"in any of {found.rounds}"), tails[max(0, f - 8) : f + 2])
    typer.echo(f"\n{found.words}\n")
    answer = {True: "yes", False: "no"}
    rules = [
        (rule.kind, answer[rule.valid], str(rule.needs or "-"), answer[rule.honours_weights], rule.cost)
        for rule in found.rules
    ]
    table(("rule", f"withstands {f} of {found.sampled}", "least rows", "honours weights", "cost"), rules)
    remarks = [f"{rule.kind}: {rule.note}" for rule in found.rules if rule.note]
    typer.echo("\n" + "\n".join([*remarks, "", found.experiment]), nl=False)


# ---- the entry point ---------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 130 on Ctrl-C, 2 for wrong usage, or the exit code of the error's leaf."""
    sys.path.append(
        str(Path.cwd())
    )  # a user's "package.module:name" lies beside the experiment; last, so it shadows none
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what gRPC's core logs, our own sentences say; read on import
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    sys.exit(_outcome(words))


def _commands() -> click.Group:
    """What Typer makes of the functions, with the help of arguments, which it loses under Click 8.5."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)  # noqa: S101 -- there is more than one command
    waiting: list[click.Command] = [group]
    while waiting:
        command = waiting.pop()
        if isinstance(command, click.Group):
            waiting += command.commands.values()
            continue
        hints = get_type_hints(command.callback, include_extras=True)
        for parameter in command.params:
            if isinstance(parameter, TyperArgument):
                parameter.help = hints[str(parameter.name)].__metadata__[0].help
    return group


def _outcome(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        code = _commands()(words, prog_name="fedge", standalone_mode=False)
    except FedgeError as error:
        return _fault(error.reason, str(error), error.exit_code, as_json)
    except click.ClickException as error:
        return _fault("USAGE", _once(error.format_message()), USAGE, as_json)
    except OSError as error:
        return _fault(FedgeError.reason, f"{error.strerror}: {error.filename}", FedgeError.exit_code, as_json)
    except ModuleNotFoundError as error:
        if error.name != "fcntl":
            raise
        return _fault(FedgeError.reason, _NO_LOCKS, FedgeError.exit_code, as_json)
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        return _fault("INTERRUPTED", "interrupted", INTERRUPTED, as_json)
    return code if isinstance(code, int) else 0


def _once(message: str) -> str:
    """Without the second of two equal questions at its end: Typer suggests a command, and so does Click 8.5."""
    before, asked, question = message.rpartition(" Did you mean")
    return before if asked and before.endswith(asked + question) else message


def _fault(reason: str, message: str, exit_code: int, as_json: bool) -> int:
    page = f"docs/errors.md#{reason.lower()}"
    if as_json:
        typer.echo(jsons.dumps({"error": {"reason": reason, "message": message, "exit_code": exit_code, "help": page}}))
    else:
        note(f"error: {message}")
    return exit_code
