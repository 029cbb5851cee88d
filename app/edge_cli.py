"""The commands of `fedge edge`: cut a model, measure machines, plan, serve the tail, infer on a device.

Owns arguments and what is printed. Must never hold logic.
"""

import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedge.printing import Json, note, say, table

if TYPE_CHECKING:
    from fedge.edge.bundle import Bundle, Exit
    from fedge.edge.cloud.session import Answer, Session
    from fedge.edge.plan.planner import Plan

edge = typer.Typer(name="edge", help="Split and early-exit inference between a device and a cloud.")

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by export.", show_default=False)]
CloudAddress = Annotated[str | None, typer.Option(help="host:port of `fedge edge serve`.")]
Deadline = Annotated[float, typer.Option(help="Seconds within which every answer is wanted.")]
Accuracy = Annotated[float | None, typer.Option(help="The least accuracy on held-out data.")]
KeepInput = Annotated[bool, typer.Option("--keep-input", help="The input itself must not leave the device.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of each session.")]
GREETING_S = 3.0  # at least so long the first request waits for the cloud's greeting
Memory = Annotated[float | None, typer.Option(help="Megabytes that the device has for sessions.")]
ProfileFile = Annotated[Path | None, typer.Option("--profile", help="What bench measured on this machine.")]


@edge.callback(invoke_without_command=True)
def _edge(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@edge.command()
def export(
    model: Annotated[str, typer.Argument(help="An ONNX file, or package.module:factory.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The new folder.", show_default=False)],
    cut: Annotated[list[str], typer.Option(help="A tensor to cut at; repeatable. Else where data shrink.")] = [],  # noqa: B006
    exit: Annotated[list[str], typer.Option(metavar="NAME=TENSOR", help="An early exit's logits; repeatable.")] = [],  # noqa: A002, B006
    image: Annotated[str, typer.Option(metavar="HxW", help="Make pictures of this size the input.")] = "",
    mean: Annotated[str, typer.Option(help="R,G,B taken off pixels from 0 to 1; else 0,0,0.")] = "",
    std: Annotated[str, typer.Option(help="R,G,B by which they are divided then; else 1,1,1.")] = "",
    data: Annotated[Path | None, typer.Option(help="Held-out samples: an .npz with x, and y if known.")] = None,
    lose: Annotated[float, typer.Option(help="The accuracy that early exits may lose, a share.")] = 0.01,
    rule: Annotated[str, typer.Option(help="When exits answer: confidence, entropy or patience.")] = "confidence",
    input: Annotated[str, typer.Option(metavar="SHAPE", help="A factory's sample, such as 1x3x32x32.")] = "",  # noqa: A002
    json: Json = False,
) -> None:
    """Cut a model into a bundle that devices and clouds run; with data, calibrate its exits and codings."""
    from fedge import edge_inputs

    for needed in ("onnx", "onnxruntime"):
        edge_inputs.needs(needed, "export")
    from fedge.edge.assess import assess, offer
    from fedge.edge.split.export import export as cut_up

    exits = [edge_inputs.pair(one) for one in exit]
    size = edge_inputs.image(image, mean, std)
    held_out = edge_inputs.samples(data) if data else None
    edge_inputs.share("--lose", lose)
    edge_inputs.rule(rule, held_out is not None)
    checked: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        file, made_exits = edge_inputs.model(model, input, Path(work))
        every = [*made_exits, *exits]
        made = cut_up(file, folder, cuts=cut or None, exits=every, image=size, on_checked=checked.append)
    try:
        made = offer(folder) if held_out is None else assess(folder, *held_out, lose=lose, rule=rule)
    except BaseException:
        shutil.rmtree(folder)  # it was new: the same command, mended, must find room
        raise
    _show_bundle(made, folder, json, checked[0], 0 if held_out is None else len(held_out[0]))
    if len(made.boundaries) == 2:
        note("no place to cut was found: nowhere do fewer bytes cross, or outputs lie before; --cut TENSOR tells which")


@edge.command()
def bench(
    bundle: BundleFolder,
    sample: Annotated[Path | None, typer.Option(help="An input (.npy or a picture); else noise.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes.")] = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Measure every piece and coding of a bundle on this machine, and write its profile."""
    import msgspec

    from fedge import edge_inputs, edge_plan
    from fedge.edge.plan import profile as profiles

    edge_inputs.needs("onnxruntime", "edge")
    found = edge_plan.measured(bundle, sample, threads)
    if out:
        profiles.save(out, found)
    if json:
        say(msgspec.to_builtins(found), json, "")
        return
    rows = [
        (key, f"{1e3 * seconds:.3f}", _megabytes(found.memory_bytes.get(key))) for key, seconds in found.pieces.items()
    ]
    table(("piece", "ms", "MB"), rows)
    codings = [
        (key, f"{1e3 * cost.encode_s:.3f}", f"{1e3 * cost.decode_s:.3f}", f"{cost.bytes:.0f}")
        for key, cost in found.codings.items()
    ]
    if codings:
        table(("coding", "encode ms", "decode ms", "bytes"), codings)
    typer.echo(str(out) if out else "(not kept; name a file with --out)")


@edge.command()
def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle, or an ONNX file.", show_default=False)],
    device: Annotated[Path | None, typer.Option(help="The device's profile; else this machine's.")] = None,
    cloud: Annotated[Path | None, typer.Option(help="The cloud's profile; else this machine's.")] = None,
    slower: Annotated[float, typer.Option(help="The device is so many times slower than its profile.")] = 1.0,
    bandwidth: Annotated[float, typer.Option(help="Mbit/s, up and down.")] = 10.0,
    rtt: Annotated[float, typer.Option(help="Milliseconds of a round trip.")] = 20.0,
    deadline: Annotated[float | None, typer.Option(help="Seconds, also where no exit answers.")] = None,
    memory: Memory = None,
    energy: Annotated[str, typer.Option(metavar="J,J/B", help="Joules per sample, joules per byte sent.")] = "",
    accuracy: Accuracy = None,
    keep_input: KeepInput = False,
    figure: Annotated[Path | None, typer.Option(help="Draw latency against bandwidth into this PNG.")] = None,
    json: Json = False,
) -> None:
    """What to run where: every option's latency on a link, the bounds it breaks, and the fastest that keeps all."""
    from fedge import edge_inputs, edge_plan
    from fedge.edge.plan.link import Link
    from fedge.edge.plan.planner import Bounds

    edge_inputs.needs("onnxruntime", "edge")
    joules, per_byte = edge_inputs.numbers(energy, 2) if energy else (None, 0.0)
    size, least = edge_inputs.whole_bytes(memory), edge_inputs.share("--accuracy", accuracy)
    bounds = Bounds(deadline, size, joules, per_byte or 0.0, least, keep_input)
    link = Link(bandwidth * 1e6, rtt / 1e3)
    found = edge_plan.of(model, device, cloud, slower, link, bounds)
    if figure:
        from fedge.edge_figures import draw_plan

        draw_plan(figure, [row.option for row in found.rows], link, bounds)
    _show_plan(found, json, figure)


@edge.command()
def serve(
    bundle: BundleFolder,
    listen: Annotated[str, typer.Option(help="host:port.")] = "127.0.0.1:7444",
    profile: ProfileFile = None,
    threads: Threads = 1,
    workers: Annotated[int, typer.Option(min=1, help="Batches that run at the same time.")] = 2,
    insecure_remote: Annotated[
        bool, typer.Option("--insecure-remote", help="Let other machines connect although there is no TLS.")
    ] = False,
    json: Json = False,
) -> None:
    """Answer for devices that send what they have at a cut, until SIGTERM."""
    import asyncio

    from fedge import edge_inputs

    edge_inputs.needs("onnxruntime", "edge")
    from fedge.edge.cloud.serving import serve_tail
    from fedge.edge.plan import profile as profiles

    asyncio.run(
        serve_tail(
            bundle,
            listen=listen,
            profile=profiles.load(profile) if profile else None,
            threads=threads,
            workers=workers,
            on_listening=lambda address: say({"listening": address}, json, f"listening on {address}"),
            allow_remote=insecure_remote,
        )
    )


@edge.command()
def infer(
    bundle: BundleFolder,
    inputs: Annotated[list[Path], typer.Argument(help="Pictures, or .npy files.", show_default=False)],
    cloud: CloudAddress = None,
    deadline: Deadline = 1.0,
    memory: Memory = None,
    accuracy: Accuracy = None,
    keep_input: KeepInput = False,
    profile: ProfileFile = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Answer for each input by its deadline, with the cloud's help or without; says who answered, and why."""
    from fedge import edge_inputs

    edge_inputs.needs("onnxruntime", "edge")
    from fedge.edge.cloud.session import Session
    from fedge.edge.plan import profile as profiles
    from fedge.edge.plan.planner import Bounds

    known = profiles.load(profile) if profile else None
    size, least = edge_inputs.whole_bytes(memory), edge_inputs.share("--accuracy", accuracy)
    bounds = Bounds(memory_bytes=size, accuracy=least, keep_input=keep_input)
    answers: list[dict[str, Any]] = []
    with Session(bundle, cloud, deadline_s=deadline, bounds=bounds, profile=known, threads=threads) as session:
        samples = [one for path in inputs for one in edge_inputs.read(path, session.bundle)]
        if cloud and not session.wait_for_cloud(max(deadline, GREETING_S)):
            note(_unasked(cloud, session))
        for name, array in samples:
            answers.append(_told(name, session.infer(array), session.bundle))
            if not json:
                typer.echo(_line(answers[-1]))
        trouble = session.trouble
    if json:
        say({"answers": answers, "trouble": trouble}, json, "")
    elif len(answers) > 1:
        typer.echo(_sum(answers))


# ---- printing ----------------------------------------------------------------------------------


def _show_bundle(made: "Bundle", folder: Path, json: bool, checked: str, held_out: int) -> None:
    import msgspec

    if json:
        say({**msgspec.to_builtins(made), "folder": str(folder), "checked": checked}, json, "")
        return
    rows = []
    for boundary in made.boundaries:
        shapes = "  ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in boundary.tensors)
        leaves = [leave for leave in made.exits if leave.boundary == boundary.name]
        rows.append((boundary.name, str(boundary.position), shapes, ", ".join(leave.name for leave in leaves)))
    table(("boundary", "operators before", "what crosses", "exits"), rows)
    if made.exits:
        typer.echo("")
        heads = ("exit", "leave from", "temperature", "share", "right", "the model on these")
        table(heads, [_exit_row(leave) for leave in made.exits])
        typer.echo(_samples(made, held_out))
    codings = [
        (name, coding, _percent(sent.accuracy), "-" if sent.bytes is None else f"{sent.bytes:.0f}")
        for name, offered in made.codings.items()
        for coding, sent in offered.items()
    ]
    typer.echo("")
    table(("sent at", "coding", "accuracy", "bytes"), codings)
    typer.echo(f"\n{folder}  version {made.version[:12]}, {len(made.pieces)} pieces; {checked}")


def _samples(made: "Bundle", count: int) -> str:
    """Which samples chose the exits' settings, and which the figures are of."""
    from fedge.edge.assess import halves

    if not count:
        return "(not calibrated; give held-out samples as --data)"
    choosing, telling = (len(rows) for rows in halves(count))
    others = f"{telling} others" if choosing < count else "the same"
    return f"(rule {made.rule}, chosen on {choosing} samples; share and right are of {others})"


def _exit_row(leave: "Exit") -> tuple[str, ...]:
    if leave.threshold >= 1.0:
        return (leave.name, "never", f"{leave.temperature:.2f}", "-", "-", "-")
    shares = (leave.share, leave.accuracy, leave.final_accuracy)
    return (leave.name, f"{leave.threshold:.3f}", f"{leave.temperature:.2f}", *map(_percent, shares))


def _show_plan(found: "Plan", json: bool, figure: Path | None) -> None:
    rows = sorted(found.rows, key=lambda row: (bool(row.breaks), row.latency_s))
    if json:
        told = [{"name": row.option.name, **asdict(row)} for row in rows]
        say({"choice": found.choice.name, "options": told, "figure": str(figure) if figure else None}, json, "")
        return
    cells = [
        (
            ("* " if row.option is found.choice else "  ") + row.option.name,
            f"{1e3 * row.latency_s:.2f}",
            f"{1e3 * row.longest_s:.2f}",
            f"{row.option.sent:.0%}",
            f"{row.option.bytes:.0f}",
            _percent(row.option.accuracy),
            _megabytes(row.option.memory_bytes),
            ", ".join(row.breaks),
        )
        for row in rows
    ]
    table(("option", "ms", "longest ms", "asks", "bytes", "accuracy", "MB", "breaks"), cells)
    if figure:
        typer.echo(str(figure))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _told(path: str, answer: "Answer", bundle: "Bundle") -> dict[str, Any]:
    """An answer as data; the class where the output is a row of logits for the model's classes."""
    told = {key: value for key, value in asdict(answer).items() if key != "outputs"} | {"input": path}
    output = answer.output
    if output is not None and _names_class(answer, bundle):
        best = int(output.argmax())
        told["class"] = bundle.classes[best] if best < len(bundle.classes) else best
    if output is not None:
        told["shape"] = list(output.shape)
    return told


def _names_class(answer: "Answer", bundle: "Bundle") -> bool:
    """Whether the output is one row of logits that name a class. Those of an exit may be of other classes, as a
    prefilter's are.
    """
    from fedge.edge.exits.rules import sound

    output, (final, *_) = answer.output, bundle.boundaries[-1].tensors
    if output is None or output.ndim != 2 or output.shape[0] != 1 or output.shape[1] < 2 or not sound(output):
        return False
    return not answer.label.startswith("exit:") or output.shape[1] == final.shape[-1]


def _unasked(cloud: str, session: "Session") -> str:
    """Why the device begins by itself: nobody is there, or what must be mended before the cloud is asked."""
    reason = session.trouble or "ADDRESS"
    if reason == "ADDRESS":
        return f"no answer from {cloud} yet (ADDRESS); the device begins by itself"
    warned = reason == "BAD_EXPERIMENT"  # the log has the sentence already
    return f"{cloud} is not asked ({reason}); the device begins by itself" + (
        "" if warned else f". {session.trouble_detail}"
    )


def _line(told: dict[str, Any]) -> str:
    found = told.get("class", told.get("shape", "no answer"))
    late = " LATE" if told["late"] else ""
    why = f"  ({told['reason']})" if told["reason"] else ""
    return f"{told['input']}: {found}  by {told['label']} in {1e3 * told['latency_s']:.1f} ms{late}{why}"


def _sum(answers: list[dict[str, Any]]) -> str:
    """Who answered how often, and the median latency."""
    who = Counter(answer["label"] for answer in answers)
    middle = median(answer["latency_s"] for answer in answers)
    words = ", ".join(f"{label} {count}" for label, count in who.most_common())
    return f"{len(answers)} answers by {words}; median {1e3 * middle:.1f} ms"
