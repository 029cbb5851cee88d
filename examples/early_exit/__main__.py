"""A federation trains a model with exits; the model is calibrated, cut, and runs on a device that leaves early.

    python -m examples.early_exit [--out DIR] [--set KEY=VALUE ...]

FedCompass trains the output and, through a client hook, the exits (model.py). Half of the test images choose
temperatures and thresholds; others go, one by one, through a device: once with exits where the planner finds them
worth it, and once with all of them off. `examples/edge_quickstart` has a cloud as well.
"""

import argparse
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

import fedge
from examples.early_exit.model import factory
from fedge.client.data import load
from fedge.core.params import Array
from fedge.edge.assess import assess
from fedge.edge.bundle import write
from fedge.edge.cloud.session import Session
from fedge.edge.exits.rules import NEVER
from fedge.edge.exits.to_onnx import to_onnx
from fedge.edge.exits.train import EarlyExit
from fedge.edge.split.export import export

EXPERIMENT = Path(__file__).with_name("experiment.toml")
ALLOWED = 0.02  # of accuracy may be lost to early exits
ASKED = 300  # images that the deployed model answers
Labels = NDArray[np.int64]


def inputs(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As the trainer feeds them: [n, 1, 28, 28] in [0, 1]."""
    return np.divide(images[:, None], 255.0, dtype=np.float32)


def inner(model: dict[str, Array]) -> EarlyExit:
    """The federation's model, without the wrapper that trained it."""
    whole = factory()
    whole.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in model.items()})
    return whole.inner


def deployed(folder: Path, x: Array, labels: Labels) -> str:
    """What the planner chose, who answered, how many answers were right, and how fast."""
    with Session(folder) as session:
        answers = [session.infer(x[index : index + 1]) for index in range(len(x))]
        plan = session.option.name
    who = Counter(answer.label for answer in answers)
    right = [answer.output is not None and answer.output.argmax() == label for answer, label in zip(answers, labels)]
    took_ms = 1e3 * np.mean([answer.latency_s for answer in answers])
    named = ", ".join(f"{name}: {count}" for name, count in who.most_common())
    return f"planned {plan!r}; {np.mean(right):.1%} right, {took_ms:.2f} ms in the mean; answered by {named}"


def main() -> None:
    """Train, cut, calibrate, run."""
    parser = argparse.ArgumentParser(description="A federation trains a model with exits, which a device then runs.")
    parser.add_argument("--out", type=Path, default=Path("runs/early-exit"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    run = fedge.simulate(fedge.load_experiment(EXPERIMENT, options.set), options.out)
    print(f"federation: {run.summary['updates']} updates, accuracy {run.metrics['accuracy'][-1]:.1%}", flush=True)
    data = load("fashion-mnist")
    x, y, half = inputs(data.x_test), data.y_test, len(data.x_test) // 2
    exits = to_onnx(inner(run.model), torch.zeros(1, 1, 28, 28), options.out / "model.onnx")
    folder = options.out / "bundle"
    export(options.out / "model.onnx", folder, exits=exits)
    bundle = assess(folder, x[:half], y[:half], lose=ALLOWED)
    for leave in bundle.exits:
        shares = (
            f"{leave.share:.0%} leave, {leave.accuracy:.1%} of them right (the full model {leave.final_accuracy:.1%})"
        )
        print(f"{leave.name}: {shares}; threshold {leave.threshold:.3f}, T {leave.temperature:.2f}", flush=True)
    print("with exits:   ", deployed(folder, x[half : half + ASKED], y[half : half + ASKED]))
    never = tuple(msgspec.structs.replace(leave, threshold=NEVER) for leave in bundle.exits)
    write(folder, msgspec.structs.replace(bundle, exits=never))
    print("without exits:", deployed(folder, x[half : half + ASKED], y[half : half + ASKED]))


if __name__ == "__main__":
    try:
        main()
    except fedge.FedgeError as error:
        raise SystemExit(f"error: {error}") from None
