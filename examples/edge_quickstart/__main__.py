"""From nothing to answers of a device and a cloud, on this machine, as two processes.

    python -m examples.edge_quickstart [--out DIR] [--steps N]

Trains a model with two exits on Fashion-MNIST pictures and cuts it. The device may hold less than the whole model, so
it runs the first stages, answers where an exit is sure, and asks the cloud for the rest. Then the cloud is killed. What
is done on a shell is done as a user would, and shown after a `$`; the rest is the Python of a device.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

import fedge
from examples.edge_quickstart.model import trained
from fedge.client.data import load
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, OUTPUT
from fedge.edge.cloud.session import Answer, Session
from fedge.edge.exits.to_onnx import to_onnx
from fedge.edge.plan import profile
from fedge.edge.plan.planner import Bounds
from fedge.edge.plan.profile import piece_key

HELD_OUT = 1000  # of the 2000 test pictures; the others are asked about
ASKED = 400  # with the cloud, and as many without
ALLOWED = 0.015  # of accuracy that exits may lose
ROOM = 0.85  # of the whole model's memory is what the device may use
Labels = NDArray[np.int64]


def pictures(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey as colour: [n, 28, 28, 3]."""
    return np.repeat(images[..., None], 3, axis=3)


def fedge_does(*words: str | Path) -> None:
    """Run a command of `fedge edge` to its end, as on a shell."""
    texts = [str(word) for word in words]
    print("\n$ fedge edge", shlex.join(texts), flush=True)
    subprocess.run([sys.executable, "-m", "fedge", "edge", *texts], check=True)


def prepare(folder: Path, steps: int) -> tuple[Array, Labels]:
    """Write model, held-out samples and a few pictures; the samples to ask about, and their classes."""
    data = load("fashion-mnist")
    x = torch.from_numpy(pictures(data.x_train)).permute(0, 3, 1, 2).float() / 255
    exits = to_onnx(trained(x, torch.from_numpy(np.array(data.y_train)), steps), x[:1], folder / "model.onnx")
    print("exits:", ", ".join(name for name, _ in exits), flush=True)
    held_out, rest = pictures(data.x_test[:HELD_OUT]), pictures(data.x_test[HELD_OUT:])
    np.savez(folder / "held.npz", x=held_out, y=data.y_test[:HELD_OUT])
    for index in range(4):
        PIL.Image.fromarray(rest[index]).save(folder / f"{index}.png")
    return rest, data.y_test[HELD_OUT:]


def asked(session: Session, x: Array, labels: Labels) -> str:
    """Who answered and why not somebody else, how well, how fast, at how many bytes."""
    answers: list[Answer] = []
    sent = 0.0
    for index in range(len(x)):
        option = session.option
        answers.append(session.infer(x[index : index + 1]))
        sent += option.bytes if answers[-1].label == "cloud" else 0.0
    who = Counter(answer.label + (f" ({answer.reason})" if answer.reason else "") for answer in answers)
    right = np.mean([answer.output is not None and answer.output.argmax() == y for answer, y in zip(answers, labels)])
    took_ms = 1e3 * np.array([answer.latency_s for answer in answers])
    return (
        f"  {len(answers)} answers by {', '.join(f'{label} {count}' for label, count in who.most_common())}\n"
        f"  {right:.1%} right; {sent / len(answers):.0f} bytes sent per answer; "
        f"{np.median(took_ms):.2f} ms in the middle, {np.percentile(took_ms, 95):.2f} ms at the 95th percentile"
    )


def device(folder: Path, address: str, memory_bytes: int, x: Array, y: Labels, cloud: "subprocess.Popen[str]") -> None:
    """Infer with the cloud, kill it, and go on."""
    known = profile.load(folder / "device.json")
    bounds = Bounds(memory_bytes=memory_bytes)
    with Session(folder / "bundle", address, deadline_s=0.5, bounds=bounds, profile=known) as session:
        session.wait_for_cloud(5.0)
        print(f"\nthe device runs: {session.option.name}")
        print(asked(session, x[:ASKED], y[:ASKED]))
        print("\nthe cloud is killed")
        cloud.kill()
        print(asked(session, x[ASKED : 2 * ASKED], y[ASKED : 2 * ASKED]))
        print(f"the device runs: {session.option.name}", flush=True)


def main() -> None:
    """Train, cut, measure, serve, infer, kill."""
    parser = argparse.ArgumentParser(description="Split and early-exit inference, from nothing to answers.")
    parser.add_argument("--out", type=Path, default=Path("runs/edge-quickstart"))
    parser.add_argument("--steps", type=int, default=250, help="of training")
    options = parser.parse_args()
    folder: Path = options.out
    if (folder / "bundle").exists():
        raise SystemExit(f"error: {str(folder)!r} is there already; name another folder with --out, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    x, y = prepare(folder, options.steps)
    exits = [word for number in (1, 2) for word in ("--exit", f"exit_{number}=exit_{number}")]
    held = ("--image", "28x28", "--data", folder / "held.npz", "--lose", str(ALLOWED))
    bundle, measured = folder / "bundle", folder / "device.json"
    fedge_does("export", folder / "model.onnx", bundle, *exits, *held)
    fedge_does("bench", bundle, "--sample", folder / "0.png", "--out", measured)
    whole = profile.load(measured).memory_bytes[piece_key(INPUT, OUTPUT)]
    memory_bytes = int(ROOM * whole)
    room = ("--memory", f"{memory_bytes / 1e6:.1f}")
    fedge_does("plan", bundle, "--device", measured, "--cloud", measured, *room, "--bandwidth", "20", "--rtt", "10")
    serve = [sys.executable, "-m", "fedge", "edge", "serve", str(bundle), "--listen", "127.0.0.1:0", "--json"]
    with subprocess.Popen([*serve, "--profile", str(measured)], stdout=subprocess.PIPE, text=True) as cloud:
        try:
            assert cloud.stdout
            address = json.loads(cloud.stdout.readline())["listening"]
            print(f"\n$ fedge edge serve {bundle}    # another process; it listens on {address}")
            some = [folder / f"{index}.png" for index in range(4)]
            fedge_does("infer", bundle, *some, "--cloud", address, "--profile", measured, *room)
            device(folder, address, memory_bytes, x, y, cloud)
            fedge_does("infer", bundle, *some, "--cloud", address, "--profile", measured, *room)
        finally:
            cloud.kill()


if __name__ == "__main__":
    try:
        main()
    except fedge.FedgeError as error:
        raise SystemExit(f"error: {error}") from None
