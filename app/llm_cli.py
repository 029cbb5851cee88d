"""The commands of `fedge llm`: plan, cut, serve, join, chat and measure a language model across devices.

Owns arguments and what is printed. Must never hold logic.
"""

import logging
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedge.printing import Json, note, say, table

if TYPE_CHECKING:
    from fedge.edge.llm.shards.planner import Plan

llm = typer.Typer(name="llm", help="A language model across small devices.")

ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder in Hugging Face's format.", show_default=False)
]
KindName = Annotated[str, typer.Option("--kind", help="How weights are held: float32, int8 or int4.")]
Memory = Annotated[float | None, typer.Option(help="Megabytes for weights, keys and values of a rank; else most free.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of a request, prompt and answer; else the model's.")]
Bounded = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a request, prompt and answer; else the model's, but 4096 where it has more."),
]
Slots = Annotated[int, typer.Option(min=1, help="Requests that run at a time.")]
Store = Annotated[Path | None, typer.Option(help="The folder for shards; else in the user's cache.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]
TicketFile = Annotated[Path | None, typer.Option("--ticket", help="The ticket of the head; needed off loopback.")]
Kernel = Annotated[str | None, typer.Option(help="How matrices are multiplied; else the fastest here.")]
DataPort = Annotated[
    int, typer.Option(min=0, max=65535, help="Where other ranks dial this one, for firewalls; 0: any port.")
]
MEGABYTE = 1 << 20
SLOTS = 4
API_KEY = "FEDGE_API_KEY"
GREETING_S = 3.0  # so long a device waits for its cloud before it begins by itself


@llm.callback(invoke_without_command=True)
def _llm(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@llm.command()
def plan(
    model: ModelFolder,
    kind: KindName = "int8",
    devices: Annotated[
        Path | None, typer.Option(help="What bench --json prints, or a JSON list of such; else this machine.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="So many devices like this machine.")] = 1,
    memory: Memory = None,
    bandwidth: Annotated[float, typer.Option(help="Mbit/s between devices.")] = 1000.0,
    rtt: Annotated[float, typer.Option(help="Milliseconds of a round trip between devices.")] = 0.2,
    context: Bounded = None,
    slots: Slots = SLOTS,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the time of a token over the round trip into a PNG.")
    ] = None,
    json: Json = False,
) -> None:
    """Predict the time of a token for every number of devices, and say which share each would hold."""
    from fedge import llm_inputs
    from fedge.edge.llm.models import config as configs
    from fedge.edge.llm.shards import planner
    from fedge.llm import context_for

    config = configs.read(model)
    tokens = slots * context_for(context, config)  # as `serve` keeps them
    group = llm_inputs.devices(devices, ranks, llm_inputs.kind(kind), llm_inputs.memory(memory))
    link = llm_inputs.link(bandwidth, rtt)
    planned = partial(planner.plan, config, llm_inputs.kind(kind), group, kv_tokens=tokens)
    found = planned(link)
    if figure:
        from fedge.llm_figures import draw_plan

        draw_plan(figure, planned, link)
    if json:
        say(llm_inputs.plan_as_json(found) | {"figure": str(figure) if figure else None}, json, "")
        return
    _show_plan(found)
    if figure:
        typer.echo(str(figure))


@llm.command()
def export(
    model: ModelFolder,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where the shards go.", show_default=False)],
    kind: KindName = "int8",
    ranks: Annotated[int, typer.Option(min=1, help="Among so many ranks.")] = 1,
    speeds: Annotated[str, typer.Option(help="Their speeds in any unit, such as 3,1; else equal.")] = "",
    json: Json = False,
) -> None:
    """Quantise a model and cut one file for every rank. `serve` does so by itself; this is to look, or to copy."""
    from fedge import llm_inputs
    from fedge.edge.llm.models.folder import open_folder
    from fedge.edge.llm.shards import export as exports
    from fedge.edge.llm.shards.shares import balanced

    chosen = llm_inputs.kind(kind)
    with open_folder(model) as opened:
        shares = balanced(opened.config, llm_inputs.numbers(speeds) or [1.0] * ranks)
        paths = exports.export(opened, folder, shares, chosen, progress=llm_inputs.progress("exporting"))
    rows = [
        (path.name, _range(share.kv_heads), _range(share.ffn), f"{path.stat().st_size / MEGABYTE:.1f}")
        for path, share in zip(paths, shares)
    ]
    if json:
        say({"shards": [dict(zip(("file", "kv_heads", "ffn", "mb"), row)) for row in rows]}, json, "")
        return
    table(("shard", "KV heads", "FFN columns", "MB"), rows)


@llm.command()
def bench(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help="Also run this one.")] = None,
    kind: KindName = "int8",
    ranks: Ranks = 1,
    memory: Memory = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 32,
    store: Store = None,
    json: Json = False,
) -> None:
    """Measure this machine, as one entry of the devices of `plan`; with a model, its tokens per second here."""
    from fedge import llm_inputs, llm_runs

    room = llm_inputs.memory(memory)
    device = llm_inputs.this_device(store)
    found: dict[str, Any] = dict(device)
    if model is not None:
        found["run"] = llm_runs.bench(model, llm_inputs.kind(kind), ranks, room, prompt, tokens, store)
    if json:
        say(found, json, "")
        return
    rows = [(kind, f"{rate / 1e9:.2f}") for kind, rate in device["weights_per_s"].items()]
    table(
        ("kind", "billion weights/s"),
        [
            *rows,
            ("disk, GB/s", f"{device['disk_bytes_per_s'] / 1e9:.2f}"),
            ("other work of a layer, us", f"{1e6 * device['layer_s']:.0f}"),
        ],
    )
    if "run" in found:
        table(("figure", "value"), [(name, f"{value:.4g}") for name, value in found["run"].items()])


@llm.command()
def serve(
    model: ModelFolder,
    kind: KindName = "int8",
    listen: Annotated[str, typer.Option(help="host:port of the HTTP API.")] = "127.0.0.1:8000",
    ranks: Ranks = 1,
    devices: Annotated[int, typer.Option(min=0, help="Wait for so many others, which come by `fedge llm join`.")] = 0,
    control: Annotated[str, typer.Option(help="host:port where they join.")] = "127.0.0.1:7450",
    data_port: DataPort = 0,
    ticket: Annotated[
        Path | None, typer.Option(help="A folder for their ticket and its key; needed off loopback.")
    ] = None,
    memory: Memory = None,
    context: Bounded = None,
    slots: Slots = SLOTS,
    use_all: Annotated[bool, typer.Option("--all", help="Use every rank, be it slower.")] = False,
    name: Annotated[str, typer.Option(help="What the API calls the model; else its folder's name.")] = "",
    store: Store = None,
    kernel: Kernel = None,
    exchange: Annotated[
        str | None, typer.Option(help="How ranks add up: full, doubling, star, or int8, which rounds; else measured.")
    ] = None,
    invariant: Annotated[
        bool, typer.Option("--invariant", help="Bits of an answer do not depend on who shares its passes; slower.")
    ] = False,
) -> None:
    """Serve a model by OpenAI's HTTP API. The key that it asks for is in the environment, FEDGE_API_KEY."""
    from fedge import llm_inputs, llm_runs
    from fedge.edge.llm.api.http_gate import check_key
    from fedge.edge.llm.api.http_server import check
    from fedge.llm import Engine

    api_key = os.environ.get(API_KEY) or None
    check_key(api_key)
    check(listen, api_key is not None)
    room = llm_inputs.memory(memory)
    secure, key = llm_inputs.make_ticket(ticket)
    logging.getLogger("fedge").setLevel(logging.INFO)  # who joins and leaves, and who computes
    if devices:
        note(f"waiting for {devices} devices on {control}")
    with (
        llm_runs.ending_at_sigterm(),
        Engine(
            model,
            ranks=ranks,
            kind=llm_inputs.kind(kind),
            memory_bytes=room,
            slots=slots,
            context=context,
            store=store,
            devices=devices,
            listen=control if devices else "127.0.0.1:0",
            ticket=secure,
            key=key,
            data_port=data_port,
            kernel=kernel,
            exchange=exchange,
            invariant=invariant,
            use_all=use_all,
        ) as engine,
    ):
        note(f"ranks: {', '.join(engine.group.names)}; context {engine.context}; {kind}")
        if idle := devices + ranks - len(engine.group.names):
            note(f"{idle} of {devices + ranks} are left out: a token should take less without them; --all uses all")
        llm_runs.serve(engine, listen, name or model.resolve().name, api_key, note)


@llm.command()
def join(
    head: Annotated[str, typer.Argument(help="host:port, --control of the head.", show_default=False)],
    ticket: TicketFile = None,
    name: Annotated[str, typer.Option(help="This device's name; else the machine's.")] = "",
    memory: Memory = None,
    data_port: DataPort = 0,
    store: Store = None,
    kernel: Kernel = None,
) -> None:
    """Work as a rank for the head of a model, until stopped."""
    from fedge import llm_inputs
    from fedge.edge.llm.group import device
    from fedge.edge.llm.group.blocks import spare_bytes
    from fedge.llm import default_store

    called = llm_inputs.device_name(name or platform.node() or "device")
    room = llm_inputs.memory(memory)
    device.run(
        head,
        name=called,
        memory_bytes=spare_bytes() if room is None else room,
        store=(store or default_store()) / called,
        ticket=llm_inputs.read_ticket(ticket),
        data_port=data_port,
        kernel=kernel,
        on_state=note,
    )


@llm.command("train-exits")
def train_exits(
    model: ModelFolder,
    folder: Annotated[
        Path, typer.Argument(metavar="HALVES", help="Where device and cloud get theirs.", show_default=False)
    ],
    layers: Annotated[str, typer.Option(help="Exits after so many layers; the device holds those below the last.")],
    text: Annotated[Path | None, typer.Option(help="A text file to learn from.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Also so many texts that the model writes itself.")] = 0,
    minutes: Annotated[float, typer.Option(help="Of training.")] = 3.0,
    agreement: Annotated[float, typer.Option(help="Share of tokens that shall be the full model's.")] = 0.98,
    kind: KindName = "int8",
    cloud_kind: Annotated[str, typer.Option(help="How the cloud holds its weights.")] = "int8",
    seed: Annotated[int, typer.Option(help="Of the order of training.")] = 0,
    json: Json = False,
) -> None:
    """Train early exits for a model, and cut it into the half of a device and that of a cloud."""
    from fedge import llm_inputs, llm_runs
    from fedge.edge_inputs import needs

    needs("torch", "torch")
    kinds = llm_inputs.kind(kind), llm_inputs.kind(cloud_kind)
    made = llm_runs.train_exits(
        model,
        llm_inputs.layers(layers),
        folder,
        text=llm_inputs.text(text),
        generate=generate,
        seconds=60 * minutes,
        agreement=agreement,
        kinds=kinds,
        seed=seed,
        progress=llm_inputs.stages(),
    )
    if json:
        say(made, json, "")
        return
    table(
        ("exit after layer", "ECE", "with temperature", "agrees alone"),
        [
            (str(one["layer"]), *(f"{one[key]:.3f}" for key in ("ece_before", "ece", "agreement")))
            for one in made["exits"]
        ],
    )
    rows = [
        (f"{row['threshold']:.3f}", f"{100 * row['cloud']:.1f}", f"{100 * row['agreement']:.2f}")
        for row in made["table"]
    ]
    table(("threshold", "asks the cloud, %", "the full model's, %"), rows, "on held-out text; the last one is chosen")


@llm.command()
def cloud(
    halves: Annotated[Path, typer.Argument(metavar="HALVES", help="Made by train-exits.", show_default=False)],
    listen: Annotated[str, typer.Option(help="host:port.")] = "127.0.0.1:7460",
    ticket: Annotated[
        Path | None, typer.Option(help="A folder for the devices' ticket and its key; needed off loopback.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences whose keys and values are kept.")] = 16,
    context: Context = None,
    kernel: Kernel = None,
) -> None:
    """Continue what devices begin: serve the upper layers of a model."""
    from fedge import llm_inputs
    from fedge.edge.llm.collab.cloud import serve_cloud
    from fedge.edge.llm.collab.halves import open_halves

    secure, key = llm_inputs.make_ticket(ticket)
    shard = open_halves(halves).cloud()
    serve_cloud(
        shard.path,
        listen,
        on_listening=lambda address: note(f"continuing on {address}"),
        ticket=secure,
        key=key,
        slots=slots,
        context=context,
        kernel=kernel,
    )


@llm.command()
def device(
    halves: Annotated[Path, typer.Argument(metavar="HALVES", help="Made by train-exits.", show_default=False)],
    cloud: Annotated[str | None, typer.Option(help="host:port of `fedge llm cloud`; else the device is alone.")] = None,
    mode: Annotated[
        str, typer.Option(help="exits, speculative or standalone; else exits where there is a cloud.")
    ] = "",
    threshold: Annotated[float | None, typer.Option(help="For all exits, 1: never; else as trained.")] = None,
    deadline: Annotated[float, typer.Option(help="Seconds for one question to the cloud.")] = 2.0,
    coding: Annotated[str, typer.Option(help="Of states that go up: f16, f32 or u8.")] = "f16",
    ticket: TicketFile = None,
    listen: Annotated[str, typer.Option(help="host:port of the HTTP API.")] = "127.0.0.1:8000",
    ask: Annotated[str, typer.Option(help="Continue this text, say where each token came from, and end.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="With --ask.")] = 64,
    context: Context = None,
    name: Annotated[str, typer.Option(help="What the API calls the model; else its folder's name.")] = "",
    kernel: Kernel = None,
    json: Json = False,
) -> None:
    """Answer with the lower layers where an exit is sure, and ask the cloud for a token where none is."""
    from fedge import llm_inputs, llm_runs
    from fedge.edge.llm.api.http_gate import check_key

    api_key = os.environ.get(API_KEY) or None
    check_key(api_key)
    made = llm_runs.device(
        halves,
        cloud,
        llm_inputs.settings(mode or ("exits" if cloud else "standalone"), threshold, deadline),
        coding=llm_inputs.coding(coding),
        ticket=llm_inputs.read_ticket(ticket),
        context=context,
        kernel=kernel,
        wait_s=GREETING_S,
    )
    with made as opened:
        if not ask:
            llm_runs.serve(opened, listen, name or halves.resolve().name, api_key, note)
            return
        told = opened.told(ask, max_tokens)
    if json:
        say(told, json, "")
        return
    typer.echo(told["text"])
    table(
        ("token", "by", "confidence", "ms"),
        [(repr(one["text"]), one["label"], f"{one['confidence']:.3f}", f"{one['ms']:.1f}") for one in told["tokens"]],
    )
    typer.echo(", ".join(f"{name} {value:g}" for name, value in told["summary"].items()))


@llm.command()
def chat(
    server: Annotated[str, typer.Argument(help="Address of a server with OpenAI's API.")] = "http://127.0.0.1:8000",
    ask: Annotated[str, typer.Option(help="One question; then the end.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Times behind each answer.")] = False,
    json: Json = False,
) -> None:
    """Talk to a model in the terminal. The API key is in the environment, FEDGE_API_KEY."""
    from fedge import llm_inputs
    from fedge.edge.llm.api import chat as chats

    client = chats.Client(server, api_key=os.environ.get(API_KEY) or None)
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    chosen = {key: value for key, value in settings.items() if value is not None}
    if not ask and json:
        raise llm_inputs.refused("--json goes with --ask; give a question.")
    if not ask:
        chats.chat(client, sys.stdin, sys.stdout, figures=figures, **chosen)
        return
    answer = chats.ask(client, ask, **chosen)
    times = f"\n({answer['ttft_s']:.2f} s to the first token, {answer['tokens_per_s']:.1f} tokens/s)"
    say(answer, json, chats.plain(answer["answer"]) + (times if figures else ""))


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]}-{ends[1] - 1}" if ends[1] > ends[0] else "none"


def _show_plan(found: "Plan") -> None:
    rows = []
    for option in found.options:
        streamed = sum(rank.streamed_bytes for rank in option.ranks)
        rows.append(
            (
                str(len(option.ranks)),
                f"{1e3 * option.token_s:.1f}",
                f"{1e3 * option.exchange_s:.1f}",
                option.collective if len(option.ranks) > 1 else "none",
                f"{max(rank.bytes - rank.streamed_bytes for rank in option.ranks) / MEGABYTE:.0f}",
                f"{streamed / MEGABYTE:.0f}",
                "yes" if all(rank.steady for rank in option.ranks) else "no",
                "chosen" if option is found.choice else "",
            )
        )
    heads = ("ranks", "ms/token", "exchange ms", "exchange", "MB held", "MB read/token", "disk keeps up", "")
    table(heads, rows)
    ranks = [
        (
            rank.device.name,
            _range(rank.share.kv_heads),
            _range(rank.share.ffn),
            f"{rank.bytes / MEGABYTE:.0f}",
            f"{rank.streamed_bytes / MEGABYTE:.0f}",
            f"{1e3 * rank.compute_s:.1f}",
            f"{1e3 * rank.stream_s:.1f}",
        )
        for rank in found.choice.ranks
    ]
    table(("device", "KV heads", "FFN columns", "MB", "MB read/token", "compute ms", "disk ms"), ranks)
    if len(found.choice.ranks) < len(found.options):
        typer.echo(f"{len(found.choice.ranks)} of {len(found.options)} devices are best: use fewer.")
