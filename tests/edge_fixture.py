"""A tiny split model made by hand: 16 numbers, two cuts `a` [32] and `b` [8], the exit `early` at `a`, 4 classes."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedge.core.params import Array
from fedge.edge.bundle import FORMAT, Boundary, Bundle, Exit, Piece, Sent, Tensor, load, write
from fedge.edge.cloud.serving import serve_tail, tail_at
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key

NODES = {
    "a": [("MatMul", ["x", "w1"], "h1"), ("Relu", ["h1"], "a")],
    "early": [("MatMul", ["a", "we"], "early_logits")],
    "b": [("MatMul", ["a", "w2"], "h2"), ("Relu", ["h2"], "b")],
    "output": [("MatMul", ["b", "w3"], "logits")],
    "rigid": [("Reshape", ["b", "one"], "b1"), ("MatMul", ["b1", "w3"], "logits")],
}
WIDTHS = {"x": 16, "a": 32, "b": 8, "logits": 4, "early_logits": 4}
TENSOR_AT = {"input": "x", "a": "a", "b": "b", "output": "logits"}
PIECES = (("input", "a"), ("a", "b"), ("a", "output"), ("b", "output"), ("input", "output"))


def weights(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (16, 32), "we": (32, 4), "w2": (32, 8), "w3": (8, 4)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made["one"] = np.array([1, 8])
    return made | {"we": made["we"] / 10}  # so that the exit is sure of some samples only


def sample(seed: int = 0, rows: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)


def whole(x: Array, seed: int = 0) -> Array:
    """What the uncut model answers, by NumPy."""
    w = weights(seed)
    output: Array = np.maximum(np.maximum(x @ w["w1"], 0) @ w["w2"], 0) @ w["w3"]
    return output


def early(x: Array, seed: int = 0) -> Array:
    w = weights(seed)
    output: Array = np.maximum(x @ w["w1"], 0) @ w["we"]
    return output


def make(
    folder: Path,
    *,
    seed: int = 0,
    threshold: float = 1.0,
    codings: dict[str, dict[str, Sent]] | None = None,
    rigid: bool = False,
) -> Bundle:
    """Write the bundle to `folder`. Another `seed` is another version with other weights.

    `rigid`: from `b` on, no batch but 1 is possible, though the bundle says so.
    """
    (folder / "pieces").mkdir(parents=True)
    tensors = {name: Tensor(name, "float32", (-1, width)) for name, width in WIDTHS.items()}
    order = list(TENSOR_AT)
    pieces = []
    for start, end in PIECES:
        leaves = ("early",) if (start, end) == ("input", "a") else ()
        inputs = (tensors[TENSOR_AT[start]],)
        outputs = (tensors[TENSOR_AT[end]], *(tensors[f"{leave}_logits"] for leave in leaves))
        steps = [*order[order.index(start) + 1 : order.index(end) + 1], *leaves]
        file = f"pieces/{start}-{end}.onnx"
        (folder / file).write_bytes(_model(["rigid"] if rigid and start == "b" else steps, inputs, outputs, seed))
        pieces.append(Piece(file, start, end, inputs, outputs, leaves))
    boundaries = tuple(Boundary(name, (tensors[TENSOR_AT[name]],), 2 * at) for at, name in enumerate(order))
    took = {"share": 0.5, "accuracy": 0.9, "final_accuracy": 0.9}
    exits = (Exit("early", "a", tensors["early_logits"], threshold=threshold, **took),)
    known = codings or {
        "input": {"raw": Sent(1.0)},
        "a": {"raw": Sent(1.0), "u8": Sent(0.9)},
        "b": {"raw": Sent(1.0)},
    }
    return write(folder, Bundle(FORMAT, "", "tiny", boundaries, tuple(pieces), {}, exits, codings=known))


def profile(bundle: Bundle, *, piece_s: float = 1e-4, memory: int = 0, **slower: float) -> Profile:
    """A profile that claims `piece_s` for every piece but those that end as `slower` says, and `memory` for all but
    the first.
    """
    code_s = 1e-5
    costs = {
        coding_key(name, coding): CodingCost(code_s, code_s, 4.0 * WIDTHS[TENSOR_AT[name]])
        for name, codings in bundle.codings.items()
        for coding in codings
    }
    keys = [piece_key(start, end) for start, end in PIECES]
    return Profile(
        "test",
        bundle.version,
        1,
        pieces={piece_key(start, end): slower.get(end, piece_s) for start, end in PIECES},
        codings=costs,
        memory_bytes=dict.fromkeys(keys, memory) | {piece_key("input", "a"): 0},
    )


def _model(steps: list[str], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], seed: int) -> bytes:
    import onnx  # a process that only serves does without
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node(kind, ins, [out], name=out) for step in steps for kind, ins, out in NODES[step]]
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(value, name) for name, value in weights(seed).items() if name in used]

    def infos(tensors: tuple[Tensor, ...]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, ["n", *t.shape[1:]]) for t in tensors]

    graph = helper.make_graph(nodes, "piece", infos(inputs), infos(outputs), constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def until(condition: Callable[[], bool], most_s: float = 30.0) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[str]:
    """The tail in this process, in a loop and a thread of its own; its address."""
    address: Future[str] = Future()
    end = threading.Event()

    async def serve() -> None:
        async with tail_at(folder, "127.0.0.1:0", **settings) as found:
            address.set_result(found)
            await asyncio.to_thread(end.wait)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: asyncio.run(serve()))
        try:
            wait((running, address), return_when=FIRST_COMPLETED)
            yield address.result(0) if address.done() else running.result()
        finally:
            end.set()
            running.result()


@contextmanager
def tail_process(folder: Path, port: int | str = 0) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The tail as a process that can be killed, and its address."""
    command = [sys.executable, "-m", "tests.edge_fixture", str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def main() -> None:
    folder, port = Path(sys.argv[1]), sys.argv[2]
    measured = profile(load(folder))
    show = partial(print, flush=True)
    asyncio.run(serve_tail(folder, listen=f"127.0.0.1:{port}", profile=measured, on_listening=show))


if __name__ == "__main__":
    main()
