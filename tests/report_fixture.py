"""Writes a run folder as docs/architecture.md describes it, from a small made-up federation: nothing is trained.

Ten clients with exponential speeds, one that slows down and arrives late, one that leaves and comes back, one refused
update and one failed task; either in groups that arrive together ("compass") or in rounds that wait ("fedavg").
"""

import json
import math
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from fedge.core.random import generator

MIN_STEPS, MAX_STEPS, SLACK, UPDATE_BYTES = 40, 200, 1.2, 431_080


@dataclass
class World:
    """The state of the made-up run."""

    speeds: dict[str, float]
    events: list[dict[str, Any]] = field(default_factory=list)
    queue: list[tuple[float, int, str, str, float]] = field(default_factory=list)  # time, order, client, task, seconds
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    member: dict[str, str] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    version: int = 0
    tasks: int = 0
    formed: int = 0
    updates: int = 0

    def say(self, t: float, event: str, **values: Any) -> None:
        self.events.append({"t": round(t, 6), "event": event, **values})

    def train(self, now: float, client: str, steps: int) -> None:
        self.tasks += 1
        task = f"t{self.tasks:04d}"
        self.base[client], self.steps[client] = self.version, steps
        slow = 2.6 if client == "gateway-05" and 8 < now < 30 else 1.0
        jitter = float(generator(1, client, self.tasks).normal(1.0, 0.04))
        took = 0.5 + steps * self.speeds[client] * slow * jitter
        self.say(now, "dispatched", client=client, task=task, version=self.version, steps=steps)
        heappush(self.queue, (now + took, self.tasks, client, task, took))


def assign(world: World, now: float, client: str) -> None:
    """Join the open group that gives the most steps, else begin one that the fastest clients can make twice."""
    speed, best = world.speeds[client], ("", 0)
    for name, group in world.groups.items():
        steps = int((group["expected"] - now - 0.5) / speed)
        if MIN_STEPS <= steps <= MAX_STEPS and steps > best[1]:
            best = (name, steps)
    name, steps = best
    if not name:
        name, steps = f"group-{world.formed}", MAX_STEPS
        world.formed += 1
        expected = now + 0.5 + steps * speed
        world.groups[name] = {"expected": expected, "latest": now + SLACK * (expected - now), "out": set(), "in": []}
    group = world.groups[name]
    group["out"].add(client)
    world.member[client] = name
    world.say(now, "group", group=name, expected_t=group["expected"], latest_t=group["latest"], client=client)
    world.train(now, client, steps)


def arrive(world: World, now: float, client: str, task: str, took: float, pool: str, late: bool) -> dict[str, Any]:
    stale = world.version - world.base[client]
    timings = {"download_s": 0.2, "compute_s": took - 0.5, "upload_s": 0.3}
    world.updates += 1
    world.say(
        now, "arrived", client=client, task=task, version=world.base[client], staleness=stale, pool=pool, late=late,
        steps=world.steps[client], examples=600, norm=1.5, bytes=UPDATE_BYTES, timings=timings, metrics={"loss": 0.4},
    )  # fmt: skip
    return {"client": client, "task": task, "staleness": stale, "weight": 600.0}


def aggregate(world: World, now: float, pools: list[str], members: list[dict[str, Any]]) -> None:
    world.version += 1
    world.say(now, "aggregated", version=world.version, pools=pools, members=members, step=1.0, norm=0.8)
    accuracy = 0.93 - 0.83 * math.exp(-world.updates / 40) + 0.012 * math.sin(world.version * 1.7)
    world.say(
        now, "evaluated", version=world.version, accuracy=accuracy, loss=2.3 * math.exp(-world.updates / 35) + 0.22
    )


def close(world: World, now: float, name: str, late: list[dict[str, Any]]) -> None:
    group = world.groups.pop(name)
    if not group["in"]:
        return
    aggregate(world, now, ["late", name], group["in"] + late)
    late.clear()
    for member in sorted(group["in"], key=lambda member: world.speeds[member["client"]]):
        assign(world, now, member["client"])


def compass(world: World, updates: int) -> None:
    late: list[dict[str, Any]] = []
    gone_until, spoiled = {"phone-02": 0.0}, {7: "refused", 12: "failed"}
    while world.updates < updates and world.queue:
        now, _, client, task, took = heappop(world.queue)
        for name in [name for name, group in world.groups.items() if group["latest"] < now]:
            close(world, world.groups[name]["latest"], name, late)
        name = world.member.pop(client, "")
        group = world.groups.get(name)
        if client == "phone-02" and gone_until[client] == 0.0 and now > 12:
            gone_until[client] = now + 9
            world.say(now - 0.2 * took, "left", client=client, reason="not connected for 30 s")
            heappush(world.queue, (now + 9, 0, client, "back", 0.0))
        elif task == "back":
            world.say(now, "joined", client=client, examples=600)
            assign(world, now, client)
        elif task.startswith("t") and spoiled.get(int(task[1:])):
            what = spoiled[int(task[1:])]
            world.say(now, what, client=client, task=task, reason="NOT_FINITE", detail="a value is NaN")
            assign(world, now, client)
        elif group is None:
            late.append(arrive(world, now, client, task, took, "late" if name else f"first-{client}", bool(name)))
            if not name:
                aggregate(world, now, ["late", f"first-{client}"], late)
                late = []
            assign(world, now, client)
        else:
            group["in"].append(arrive(world, now, client, task, took, name, False))
            group["out"].discard(client)
            if not group["out"]:
                close(world, now, name, late)


def fedavg(world: World, updates: int) -> None:
    members: list[dict[str, Any]] = []
    while world.updates < updates:
        now, _, client, task, took = heappop(world.queue)
        members.append(arrive(world, now, client, task, took, f"r{world.version}", False))
        if not world.queue:
            aggregate(world, now, [f"r{world.version}"], members)
            members = []
            for name in world.speeds:
                world.train(now, name, MAX_STEPS)


def write_run(folder: Path, kind: str = "compass", updates: int = 160, clients: int = 10, seed: int = 4) -> Path:
    """Write events.jsonl, metrics.jsonl, summary.json and experiment.toml into `folder`, and return it."""
    speeds = sorted(0.008 + float(x) for x in generator(seed, "speeds").exponential(0.014, clients))
    names = [f"{('phone', 'gateway')[i % 2]}-{i:02d}" for i in range(clients)]
    world = World(dict(zip(names, speeds)))
    for name in names:
        world.say(0.0, "joined", client=name, examples=600)
    for name in names:
        world.train(0.0, name, MAX_STEPS)
    {"compass": compass, "fedavg": fedavg}[kind](world, updates)
    end = max(event["t"] for event in world.events)
    world.say(end, "finished", reason=f"{updates} updates")
    world.events.sort(key=lambda event: event["t"])
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event) for event in world.events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    metrics, up, seen, updates_seen = [], 0, 0, 0
    for event in world.events:
        seen += event["event"] == "dispatched"
        if event["event"] == "arrived":
            up, updates_seen = up + event["bytes"], updates_seen + 1
        if event["event"] == "evaluated":
            metrics.append({
                "t": event["t"], "wall_s": event["t"] / 20, "version": event["version"], "updates": updates_seen,
                "accuracy": event["accuracy"], "loss": event["loss"], "train_loss": event["loss"] * 0.9,
                "staleness": 0.7, "bytes_up": up, "bytes_down": seen * UPDATE_BYTES,
            })  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")
    (folder / "summary.json").write_text(json.dumps(summary(world, kind, seed, metrics, names)))
    (folder / "experiment.toml").write_text(
        f'[experiment]\nname = "mnist-{kind}"\nseed = {seed}\n\n[server]\nscheduler = {{ kind = "{kind}" }}\n'
    )
    return folder


def summary(world: World, kind: str, seed: int, metrics: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    hits = [entry["t"] for entry in metrics if entry["accuracy"] >= 0.8]
    counts = generator(seed, "partition").dirichlet([0.5] * 10, len(names)) * 600
    stale = [event["staleness"] for event in world.events if event["event"] == "arrived"]
    return {
        "name": f"mnist-{kind}", "seed": seed, "accuracy": {
            "final": metrics[-1]["accuracy"], "best": max(entry["accuracy"] for entry in metrics)},
        "target": 0.8,
        "time_to_target_s": hits[0] if hits else None, "versions": world.version, "updates": world.updates,
        "refused": {"NOT_FINITE": 1} if kind == "compass" else {}, "bytes_up": metrics[-1]["bytes_up"],
        "bytes_down": metrics[-1]["bytes_down"], "staleness": {"mean": sum(stale) / len(stale), "max": max(stale)},
        "seconds": metrics[-1]["t"], "wall_s": metrics[-1]["wall_s"], "model_sha256": "5e" * 32,
        "partition": {"classes": list(range(10)), "counts": counts.astype(int).tolist(), "clients": names},
    }  # fmt: skip


def judge(folder: Path, hostile: list[str], cached: bool = False, coefficients: bool = True) -> Path:
    """Add verdicts to a run: hostile rows are rejected nearly always, stale ones now and then."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    known: set[str] = set()
    for entry in events:
        if entry["event"] != "aggregated":
            continue
        members = {member["client"]: member for member in entry["members"]}  # the newest row of each
        entry["members"] = list(members.values())
        absent = [{"client": name} for name in sorted(known - set(members))] if cached else []
        known |= set(members)
        for row in [*entry["members"], *absent]:
            draw = generator(5, row["client"], entry["version"]).random()
            odds = 0.96 if row["client"] in hostile else 0.04 + 0.08 * row.get("staleness", 1)
            row |= {"score": round(0.8 + 1.6 * (draw < odds) + 0.3 * draw, 4), "rejected": bool(draw < odds)}
            if coefficients:
                row["coefficient"] = 0.0 if draw < odds else 0.1
        if absent:
            entry["absent"] = absent
    if hostile:
        events.insert(0, {"t": 0.0, "event": "hostile", "clients": hostile, "attack": "sign-flip"})
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    return folder
