"""A language model over machines that share nothing: each has a network, an address, a disk folder and less memory than
the model's weights; one is killed, one unplugged.

What small devices need beyond processes on one machine is only seen here: TLS on addresses that are not loopback, links
with a rate, and a kernel that kills whoever takes more memory than there is, cached files included.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedge.edge.llm.group.speeds import FILE
from fedge.edge.llm.mesh.security import make_ticket
from fedge.edge.llm.models.folder import open_folder
from fedge.llm import Engine
from tests.llm_fixture import folder
from tests.llm_machines import NAME, Machine, Tap, complete, evict, get, hub, inside, machines, missing, until

SIZES = {"layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 8, "ffn": 2048, "vocab": 512, "context": 512}
KERNEL = "numpy-float32"
PART = 0.6  # of the weights, which each machine has in memory for everything
WINDOW = "64"  # megabytes for weights, keys and values
SMALL_WINDOW = "40"  # two machines can hold the model so, one cannot
RATE_MBIT = 400
PROMPT = [1, 5, 9, 20, 77, 3, 250, 411]
TOKENS = 30
CONTROL, FORM_S = 7450, 120
PLAIN = b"words that nobody has hidden"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of 292 MiB of weights that no page is cached of."""
    path = folder(tmp_path_factory.mktemp("model"), **SIZES)
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def answer(model, tmp_path_factory):
    """The text after PROMPT of one process without any limit."""
    settings = {"kind": "float32", "kernel": KERNEL, "context": 256, "slots": 2, "memory_bytes": 1 << 32}
    with Engine(model, store=tmp_path_factory.mktemp("alone"), **settings) as engine:
        pieces = list(engine.generate(PROMPT, max_tokens=TOKENS))
    assert [piece.finish for piece in pieces if piece.finish] == ["length"]
    evict(model)
    return "".join(piece.text for piece in pieces)


@pytest.fixture
def permitted(tmp_path):
    if what := missing(tmp_path):
        pytest.skip(f"This machine does not permit {what}.")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_machines_with_less_memory_than_the_model_answer_as_one_without_limits(permitted, model, answer, tmp_path):
    with machines(["laptop", "phone", "board"], limit_bytes(model), RATE_MBIT, tmp_path) as three:
        laptop, phone, board = three
        ticket = serve(laptop, model, tmp_path, three)
        refused(board, laptop, ticket, tmp_path)
        with Tap(hub(), "phone", needles(model, ticket)) as tap:
            heard(tap, phone, board)
            join(phone, laptop, ticket)
            join(board, laptop, ticket)
            until(lambda: "serving" in laptop.said, FORM_S, lambda: everything(three))
            assert "ranks: head, phone, board" in laptop.said or "ranks: head, board, phone" in laptop.said
            assert complete(laptop, prompt=PROMPT, max_tokens=TOKENS) == answer
            killed_while_answering(laptop, board, answer)
            back_again(laptop, board, ticket, three)
            assert complete(laptop, prompt=PROMPT, max_tokens=TOKENS) == answer
            killed_between_answers(laptop, phone, answer)
            back_again(laptop, phone, ticket, three)
            unplugged_while_answering(laptop, phone, answer, three)
            back_again(laptop, phone, None, three)
            assert complete(laptop, prompt=PROMPT, max_tokens=TOKENS) == answer
        assert tap.bytes > limit_bytes(model) / 3, "the tap has seen less than one shard"
        assert dict(tap.found) == {"plain": tap.found["plain"]}
        for one in three:
            assert not one.group.killed, everything(three)
            assert 0 < one.group.peak_bytes <= limit_bytes(model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_one_machine_cannot_hold_ends_with_a_sentence_until_another_is_back(permitted, model, answer, tmp_path):
    with machines(["laptop", "phone"], limit_bytes(model), RATE_MBIT, tmp_path) as both:
        laptop, phone = both
        ticket = serve(laptop, model, tmp_path, both, window=SMALL_WINDOW, devices=1)
        join(phone, laptop, ticket, window=SMALL_WINDOW)
        until(lambda: "serving" in laptop.said, FORM_S, lambda: everything(both))
        with pytest.raises(AssertionError, match="cannot hold"):
            complete(laptop, lambda chunks: phone.kill() if chunks == 3 else None, prompt=PROMPT, max_tokens=TOKENS)
        began = time.monotonic()
        with pytest.raises(AssertionError, match="unavailable"):
            complete(laptop, prompt=PROMPT, max_tokens=TOKENS)
        assert time.monotonic() - began < 60
        join(phone, laptop, ticket, window=SMALL_WINDOW)
        until(lambda: phone.said.count("waiting for work") == 2, 60, lambda: everything(both))
        assert complete(laptop, prompt=PROMPT, max_tokens=TOKENS) == answer
        assert not laptop.group.killed
        assert not phone.group.killed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_the_fastest_kernel_is_found_in_the_memory_of_a_small_device(permitted, kind, tmp_path):
    """Of which the kernel kills whoever takes more."""
    with machines(["board"], 180 << 20, RATE_MBIT, tmp_path) as (board,):
        words = f"from fedge.edge.llm.compute import kernels; print(kernels.choose({kind!r}, shape=(2048, 1024)).name)"
        assert board.python("-c", words).wait(60) == 0, board.said
        assert kind in board.said
        assert not board.group.killed


def limit_bytes(model: Path) -> int:
    """What each machine has; not enough for the model's weights."""
    return int(PART * sum(path.stat().st_size for path in model.glob("*.safetensors")))


def serve(
    machine: Machine, model: Path, tmp: Path, all_: list[Machine], *, window: str = WINDOW, devices: int = 2
) -> Path:
    """Start the head; the ticket. Speeds are those of this machine for all, since measuring takes 300 MB."""
    measured = subprocess.run(
        [sys.executable, "-m", "fedge.edge.llm.group.speeds", str(tmp)],
        env=machine.environment,
        capture_output=True,
        check=True,
    )
    for one in all_:
        place = store(one) if one is machine else store(one) / one.folder.name
        place.mkdir(parents=True)
        (place / FILE).write_bytes(measured.stdout)
    words = ["--kind", "float32", "--kernel", KERNEL, "--devices", str(devices), "--all", "--memory", window]
    words += ["--context", "256", "--slots", "2", "--name", NAME, "--control", f"{machine.address}:{CONTROL}"]
    machine.start("llm", "serve", str(model), *words, "--ticket", str(tmp / "secrets"), "--store", str(store(machine)))
    ticket = tmp / "secrets" / "ticket.json"
    until(ticket.exists, 60, lambda: machine.said)
    time.sleep(1)
    return ticket


def join(machine: Machine, head: Machine, ticket: Path | None, *, window: str = WINDOW) -> subprocess.Popen[bytes]:
    words = [f"{head.address}:{CONTROL}", "--name", machine.folder.name, "--memory", window, "--kernel", KERNEL]
    words += ["--store", str(store(machine))]
    return machine.start("llm", "join", *words, *(["--ticket", str(ticket)] if ticket else []))


def store(machine: Machine) -> Path:
    return machine.folder / "store"


def refused(machine: Machine, head: Machine, ticket: Path, tmp: Path) -> None:
    """Without a ticket, with another one's word, and with another certificate."""
    assert join(machine, head, None).wait(60)
    assert "give the ticket" in machine.said
    word = tmp / "word.json"
    word.write_text(ticket.read_text().replace('"token": "', '"token": "another'))
    assert word.read_text() != ticket.read_text()
    until(lambda: inside(machine.namespace, lambda: reached(head)), 60, lambda: head.said)
    assert join(machine, head, word).wait(60)
    assert "ticket is another one" in machine.said
    stranger = join(machine, head, make_ticket(tmp / "other"))
    until(lambda: "waiting for the head" in machine.said, 60, lambda: machine.said)
    time.sleep(2)
    assert stranger.poll() is None
    assert "waiting for work" not in machine.said
    stranger.kill()
    stranger.wait()


def reached(machine: Machine) -> bool:
    try:
        socket.create_connection((machine.address, CONTROL), 1).close()
    except OSError:
        return False
    return True


def needles(model: Path, ticket: Path) -> dict[str, bytes]:
    """What must not be seen on the link, and what shows that the tap sees."""
    with open_folder(model) as opened:
        embedded = zip(PROMPT, opened.embed(np.array(PROMPT)))
        rows = {f"embedding of {token}": row[:12].tobytes() for token, row in embedded}
        weight = opened.rows("model.layers.3.mlp.up_proj.weight", 0, 1)[0, :12].tobytes()
    header = {"header": b'"data_offsets"', "weights": weight, "config": b"rms_norm_eps"}
    return rows | header | {"word": ticket.read_bytes().partition(b'"token": "')[2][:16], "plain": PLAIN}


def heard(tap: Tap, sender: Machine, receiver: Machine) -> None:
    """The tap sees what is sent in the clear."""

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            made.sendto(PLAIN, (receiver.address, 9))

    inside(sender.namespace, send)
    until(lambda: tap.found["plain"], 10, lambda: f"{tap.packets} packets")


def killed_while_answering(head: Machine, machine: Machine, answer: str) -> None:
    """Nobody of the user's sees it."""
    hit: list[int] = []

    def strike(chunks: int) -> None:
        if chunks == 5:
            machine.kill()
            hit.append(chunks)

    assert complete(head, strike, prompt=PROMPT, max_tokens=TOKENS) == answer
    assert hit == [5]
    assert ranks(head) == 2


def killed_between_answers(head: Machine, machine: Machine, answer: str) -> None:
    """Who asks next does not wait for it to come back."""
    machine.kill()
    time.sleep(2)
    assert complete(head, prompt=PROMPT, max_tokens=TOKENS, timeout_s=60) == answer
    assert ranks(head) == 2


def unplugged_while_answering(head: Machine, machine: Machine, answer: str, three: list[Machine]) -> None:
    """Its process lives and its connections stand; only nothing comes any more."""

    def strike(chunks: int) -> None:
        if chunks == 5:
            machine.cable(plugged=False)

    try:
        assert complete(head, strike, prompt=PROMPT, max_tokens=TOKENS) == answer, everything(three)
        assert ranks(head) == 2
    finally:
        machine.cable(plugged=True)


def back_again(head: Machine, machine: Machine, ticket: Path | None, three: list[Machine]) -> None:
    """Started again with a ticket, or just plugged in again: it is used between requests."""
    if ticket is not None:
        join(machine, head, ticket)
    until(lambda: ranks(head) == 3, FORM_S, lambda: everything(three))


def ranks(head: Machine) -> int:
    """Of the group at this moment."""
    return get(head, "/metrics").count("memory_private_bytes{")


def everything(three: list[Machine]) -> str:
    return "\n".join(
        f"--- {one.folder.name}, killed for memory: {one.group.killed}\n{one.said[-2000:]}" for one in three
    )
