"""A device and a cloud that share a language model: who says how much, bytes, agreement, time per token over delay.

Real small models, exits trained on text of their own; held-out prompts, greedy tokens. Device, cloud and a
plain cloud to compare with are processes, a relay between them limits the rate and adds a delay each way. Both ends are
this machine, one core each: the device is as fast as the cloud, which is kind to the device. Ways: exits with a
threshold; guesses that the cloud verifies; the device alone; the cloud alone, as one request whose tokens stream back,
and with a request per token; and the naive split, which sends the states of the whole prefix in float32 for every
token. Agreement is with the whole model's greedy token behind the same text: along the whole model's own texts
("forced"), and along what was written ("own"). `--model` is stories15m or smollm2-135m, below `--cache`;
`--exits` places the exits elsewhere: the device computes as many layers as the last of them says. `--kind` is that of
all weights, float32 if none is named.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from benchmarks import collm_cloud, collm_model
from benchmarks.collm_device import Device, Order, Taken, Way
from benchmarks.collm_model import AGREEMENT, CACHE, Plan, Subject, say
from benchmarks.harness import Goal, arguments, emit, goal
from fedge.edge.llm.collab.thresholds import row as forced
from fedge.edge.llm.collab.wire import Coding
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import open_shard
from tests.llm_fixture import folder as random_folder
from tests.relay import Relay

Row = dict[str, Any]
PLANS = {
    "stories15m": Plan("stories15m", (3, 5), 300, 1200, few=3),
    "smollm2-135m": Plan("smollm2-135m", (15, 25), 64, 300, prompts=6, tokens=40, few=1, few_tokens=30),
}
QUICK = Plan("random", (1, 2), 20, 20, prompts=3, prompt_tokens=4, tokens=12, few=1, few_tokens=6)
DELAYS_MS, QUICK_DELAYS_MS = (0, 5, 20, 50), (0, 20)  # one way; the round trip is twice as long
RATE_BPS = 20e6
GOAL_MS = 20
THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 1.0)
SHARE, OVERHEAD_BYTES = 0.5, 16
CALIBRATED, GUESSES, EXACT = "exits, calibrated", "guesses", "guesses, states in float32"
WIDE = ("labels", "asked", "rtt_ms", "first_ms", "link_down_bytes", "down_bytes", "same_text")  # not in the table
ALONE, STREAM, EACH, NAIVE = "device alone", "cloud, streamed", "cloud, per token", "naive split"


@dataclass(frozen=True, slots=True)
class Case:
    """A way to answer, and its name in the rows."""

    name: str
    way: Way
    threshold: float = 1.0
    coding: Coding = "f16"

    @property
    def plain(self) -> bool:
        """Whether it asks the plain cloud."""
        return self.way in ("stream", "each", "resend")


def cases(calibrated: float) -> list[Case]:
    """All ways that are compared."""
    return [
        *(Case(f"exits, {one:g}", "exits", one) for one in THRESHOLDS),
        Case(CALIBRATED, "exits", calibrated),
        Case(GUESSES, "speculative"),
        Case(EXACT, "speculative", coding="f32"),
        Case(ALONE, "standalone"),
        Case(STREAM, "stream"),
        Case(EACH, "each"),
        Case(NAIVE, "resend"),
    ]


def measure(about: Subject, delays: Sequence[int]) -> list[Row]:
    """A row per case and delay; without a delay all prompts are answered, and judged, else a few."""
    plan, context = about.plan, str(about.plan.context)
    with ExitStack() as opened:
        fedge = opened.enter_context(collm_cloud.process("fedge", about.kernel, context, str(about.upper)))
        shards = str(about.whole), str(about.upper)
        plain = opened.enter_context(collm_cloud.process("plain", about.kernel, context, *shards))
        limits: dict[str, Any] = {"up_bps": RATE_BPS, "down_bps": RATE_BPS}
        relays = {
            False: opened.enter_context(Relay(fedge, **limits)),
            True: opened.enter_context(Relay(plain, **limits)),
        }
        device = opened.enter_context(Device(about.halves.path, about.kernel, plan.context))
        model = collm_cloud.model(open_shard(about.whole), about.kernel, plan.context)
        opened.callback(model.close)
        rows = []
        for delay in delays:
            for case in cases(about.calibrated):
                relay = relays[case.plain]
                relay.change(**limits, rtt_s=2e-3 * delay)
                few, most = (plan.few, plan.few_tokens) if delay else (plan.prompts, plan.tokens)
                order = Order(case.way, relay.address, about.prompts[:few], most, case.threshold, case.coding)
                found = _row(case, delay, relay, device, order)
                taken: Taken = found.pop("taken")
                if not delay:
                    found |= _quality(about, case, taken)
                    found["agreement_own"] = round(collm_model.agreement(model, about.prompts, taken.ids), 4)
                rows.append(found)
                say(f"{case.name}, {delay} ms: {found['ms_per_token']} ms per token")
        return rows


def _row(case: Case, delay: int, relay: Relay, device: Device, order: Order) -> Row:
    """What every case has. `asked_share` is questions per token, those without an answer too."""
    before: list[tuple[int, int]] = []
    taken = device.take(order, lambda: before.append(relay.forwarded_bytes))
    passed = [after - start for after, start in zip(relay.forwarded_bytes, before[0])]
    tokens = sum(map(len, taken.ids))
    return {
        "way": case.name,
        "threshold": round(case.threshold, 4) if case.way == "exits" else None,
        "delay_ms": delay,
        "rtt_ms": 2 * delay,
        "tokens": tokens,
        "ms_per_token": round(1e3 * taken.seconds / tokens, 2),
        "first_ms": round(1e3 * taken.first_s, 2),
        "asked_share": round(taken.asked / tokens, 4),
        "asked": taken.asked,
        "up_bytes": round(taken.sent_bytes / tokens, 1),
        "down_bytes": round(taken.received_bytes / tokens, 1),
        "link_up_bytes": round(passed[0] / tokens, 1),
        "link_down_bytes": round(passed[1] / tokens, 1),
        "labels": taken.labels,
        "taken": taken,
    }


def _quality(about: Subject, case: Case, taken: Taken) -> Row:
    """What the answers to all prompts are like. Bytes per position count the prompts' tokens too."""
    pairs = [pair for text, ids in zip(about.texts, taken.ids) for pair in zip(text, ids)]
    positions = sum(map(len, about.prompts)) + sum(map(len, taken.ids))
    found = {
        "same_text": round(sum(text == ids for text, ids in zip(about.texts, taken.ids)) / len(taken.ids), 4),
        "same_tokens": round(sum(one == other for one, other in pairs) / sum(map(len, about.texts)), 4),
        "up_bytes_per_position": round(taken.sent_bytes / positions, 1),
    }
    if case.way == "exits":
        judged = forced(about.seen, [case.threshold] * len(about.exits.exits))
        found |= {"forced_cloud": round(judged.cloud, 4), "forced_agreement": round(judged.agreement, 4)}
    return found


def judged(rows: Sequence[Row], hidden: int) -> list[Goal]:
    """All goals. Where the cloud alone is compared with, there are two: a request per token, and a stream."""
    at = {(row["way"], row["delay_ms"]): row for row in rows}

    def value(way: str, key: str, delay: int = 0) -> float | None:
        found = at.get((way, delay), {}).get(key)
        return None if found is None else float(found)

    def over(way: str, rival: str) -> float | None:
        above, below = value(way, "ms_per_token", GOAL_MS), value(rival, "ms_per_token", GOAL_MS)
        return None if above is None or below is None else above / below

    most = 2 * hidden + OVERHEAD_BYTES
    found = [
        goal("calibrated exits: agreement along the whole model's texts", value(CALIBRATED, "forced_agreement"),
             f">= {AGREEMENT}"),
        goal("calibrated exits: share of tokens that ask the cloud", value(CALIBRATED, "asked_share"), f"<= {SHARE}"),
        goal("calibrated exits: bytes up per position, messages", value(CALIBRATED, "up_bytes_per_position"),
             f"<= {most}"),
        goal("guesses, states in float32: share of answers that are the whole model's", value(EXACT, "same_text"),
             ">= 1"),
    ]  # fmt: skip
    for way in (CALIBRATED, GUESSES):
        for rival in (EACH, STREAM):
            name = f"{way}: time per token over {rival}, {GOAL_MS} ms each way"
            found.append(goal(name, over(way, rival), "< 1"))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Agreement and the cloud's share over the threshold; time per token over the delay."""
    from fedge.report.style import SERIES, context, figure, png, replace_file

    chosen = sorted(
        (row for row in rows if row.get("forced_cloud") is not None), key=lambda row: float(row["threshold"])
    )
    with context("collm"):
        drawn = figure(9.0, 3.6)
        left, right = drawn.subplots(1, 2, width_ratios=(2, 3))
        x = range(len(chosen))
        for colour, key, label in (
            (SERIES[0], "forced_agreement", "agreement with the whole model"),
            (SERIES[1], "forced_cloud", "asked the cloud, its texts"),
            (SERIES[2], "asked_share", "asked the cloud, own texts"),
        ):
            left.plot(x, [100 * row[key] for row in chosen], "o-", color=colour, markersize=4, label=label)
        left.set_xticks(list(x), [f"{row['threshold']:.3g}" for row in chosen])
        left.set_ylim(0, 102)
        left.set_xlabel("threshold")
        left.set_ylabel("% of tokens")
        left.legend(fontsize=7, loc="lower left")
        lines = _lines(list(dict.fromkeys(row["way"] for row in rows)), SERIES)
        for way, style in lines.items():
            mine = [row for row in rows if row["way"] == way]
            times = [row["ms_per_token"] for row in mine]
            right.plot([row["delay_ms"] for row in mine], times, markersize=3, label=way, **style)
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        right.set_xlabel("ms one way")
        right.set_ylabel("ms per token")
        right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, png(drawn))


def _lines(ways: Sequence[str], colours: Sequence[str]) -> dict[str, Row]:
    """How each way is drawn: thresholds in one colour, what is compared with broken."""
    fixed = [way for way in ways if way.startswith("exits") and way != CALIBRATED]
    found: dict[str, Row] = {
        way: {"color": colours[0], "alpha": 0.25 + 0.6 * number / len(fixed), "marker": "."}
        for number, way in enumerate(fixed)
    }
    for colour, way in zip(colours[1:], (CALIBRATED, GUESSES)):
        found[way] = {"color": colour, "linewidth": 2.2, "marker": "o"}
    for colour, way in zip((*colours[3:], "black"), (ALONE, STREAM, EACH, NAIVE)):
        found[way] = {"color": colour, "linestyle": "--", "marker": "."}
    return found


def run(plan: Plan, folder: Path, cache: Path, delays: Sequence[int]) -> tuple[list[Row], list[Goal], Row]:
    """Rows, goals, and facts about what was measured."""
    with collm_model.subject(plan, folder, cache) as about:
        rows = measure(about, delays)
        facts = {
            "model": plan.name,
            "kind": plan.kind,
            "kernel": about.kernel,
            "hidden": about.hidden,
            "rate_bps": RATE_BPS,
            "exits": [
                {"layer": one.layer, "temperature": round(one.temperature, 3), "agreement_alone": round(float(seen), 4)}
                for one, seen in zip(about.exits.exits, about.seen.agrees.mean(axis=1))
            ],
            "calibrated": round(about.calibrated, 4),
            "speeds": "device and cloud are one core each of this machine",
        }
        return rows, judged(rows, about.hidden), facts


def main() -> None:
    """The command."""
    options = arguments(
        str(__doc__).partition("\n")[0],
        figure="a PNG to write",
        model="a small one's name",
        exits="their layers, with commas between",
        kind="float32, int8 or int4",
        cache="a folder",
    )
    cache = Path(options.cache) if options.cache else CACHE
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="fedge-collm-") as scratch:
            path = random_folder(Path(scratch), layers=4, vocab=320, context=64)
            rows, goals, facts = run(QUICK, path, Path(scratch), QUICK_DELAYS_MS)
    else:
        plan = chosen(options.model or next(iter(PLANS)), options.exits, options.kind)
        if not (cache / plan.name / "config.json").exists():
            raise SystemExit(f"missing: {cache / plan.name}, a folder as Hugging Face has it.")
        rows, goals, facts = run(plan, cache / plan.name, cache, DELAYS_MS)
    if options.figure:
        draw(rows, Path(options.figure))
    shown = rows if options.json else [{key: row[key] for key in row if key not in WIDE} for row in rows]
    emit("collm", shown, goals, as_json=options.json, notes={"about": facts})


def chosen(name: str, exits: str, kind: str) -> Plan:
    """The plan of a model, with changes. Ends the process for what cannot be."""
    if name not in PLANS or (kind and kind not in get_args(Kind)):
        raise SystemExit(
            f"There is no plan for {name!r} {kind}; name one of {', '.join(PLANS)}, and a kind of weights."
        )
    plan = PLANS[name]
    try:
        layers = tuple(map(int, exits.split(","))) if exits else plan.exits
    except ValueError:
        raise SystemExit(f"{exits!r} names no layers; say 3,5 for instance.") from None
    return replace(plan, exits=layers, kind=cast("Kind", kind) if kind else plan.kind)


if __name__ == "__main__":
    main()
