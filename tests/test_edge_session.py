"""The device's session: who answers, under which label, and that it is right and in time."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedge.core.errors import AddressError, BadBundle, DataError, ExperimentError, ModelError, RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Bundle, Sent, Tensor, load, write
from fedge.edge.cloud.device import FRESH_S, HALF_LIFE_S, Device, start
from fedge.edge.cloud.request import WAKE_S, _outputs, reserved_s
from fedge.edge.cloud.session import Answer, Session
from fedge.edge.cloud.wire import Reply
from fedge.edge.coding.codings import encode
from fedge.edge.plan.planner import Bounds
from tests import edge_fixture as tiny
from tests.relay import Relay

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ALWAYS_ASK = Bounds(memory_bytes=10)  # with a profile that claims more for every piece after `a`
ASK_FROM_A = Bounds(memory_bytes=10, keep_input=True)
NEVER_S = 60.0  # a piece that takes so long is never begun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "bundle"
    tiny.make(place)
    return place


@pytest.fixture(scope="module")
def leaving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle whose exit answers what it is at least half sure of."""
    place = tmp_path_factory.mktemp("edge") / "leaving"
    tiny.make(place, threshold=0.5)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load(folder)


@pytest.fixture(scope="module")
def address(folder: Path, bundle: Bundle) -> Iterator[str]:
    with tiny.serving(folder, profile=tiny.profile(bundle)) as found:
        yield found


def check(answer: Answer, label: str, reason: str = "", what: Callable[[Any], Any] = tiny.whole, seed: int = 0) -> None:
    """Label and reason, and that the numbers are those of whoever the label names."""
    assert (answer.label, answer.reason) == (label, reason), answer
    assert answer.output is not None
    np.testing.assert_allclose(answer.output, what(tiny.sample(seed)), **CLOSE)
    assert bool(answer.detail) == bool(reason)
    assert answer.latency_s > 0
    assert not answer.late


def ready(session: Session, option: str) -> None:
    assert session.wait_for_cloud(20)
    tiny.until(lambda: session.option.name == option)


# ---- without a cloud -----------------------------------------------------------------------------


def test_without_a_cloud_the_device_answers_by_itself(folder: Path, bundle: Bundle) -> None:
    with Session(folder, profile=tiny.profile(bundle), deadline_s=10) as session:
        for seed in range(3):
            answer = session.infer(tiny.sample(seed))
            check(answer, "device", seed=seed)
            assert (answer.option, answer.version) == ("local", bundle.version)
        assert session.link is None


def test_without_a_profile_the_pieces_are_timed(folder: Path) -> None:
    with Session(folder, deadline_s=10) as session:
        check(session.infer(tiny.sample()), "device")


def test_an_exit_answers_what_it_is_sure_of_and_nothing_else(leaving: Path) -> None:
    profile = tiny.profile(load(leaving), output=0.1)
    with Session(leaving, profile=profile, deadline_s=10) as session:
        labels = set()
        for seed in range(20):
            logits = tiny.early(tiny.sample(seed)).astype(np.float64)
            sure = (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()).max() >= 0.5
            answer = session.infer(tiny.sample(seed))
            check(answer, *(("exit:early", "", tiny.early) if sure else ("device", "", tiny.whole)), seed=seed)
            labels.add(answer.label)
    assert labels == {"exit:early", "device"}


def test_a_batch_leaves_where_all_of_it_does(leaving: Path) -> None:
    profile = tiny.profile(load(leaving), output=0.1)
    with Session(leaving, profile=profile, deadline_s=10) as session:
        alone = [session.infer(tiny.sample(seed)).label == "exit:early" for seed in range(20)]
        sure = [tiny.sample(seed) for seed in range(20) if alone[seed]]
        unsure = tiny.sample(alone.index(False))
        assert session.infer(np.concatenate(sure)).label == "exit:early"
        assert session.infer(np.concatenate([*sure, unsure])).label == "device"


def test_an_exit_with_threshold_one_never_answers(folder: Path, bundle: Bundle) -> None:
    with Session(folder, profile=tiny.profile(bundle), deadline_s=10) as session:
        assert {session.infer(100 * tiny.sample(seed)).label for seed in range(5)} == {"device"}


def test_where_the_rest_takes_too_long_the_exit_answers(folder: Path, bundle: Bundle) -> None:
    slow = tiny.profile(bundle, output=NEVER_S)
    with Session(folder, profile=slow, deadline_s=10) as session:
        check(session.infer(tiny.sample()), "exit:early", "TOO_LATE", tiny.early)


def test_where_nothing_can_be_in_time_there_is_an_answer_that_says_so_at_once(folder: Path, bundle: Bundle) -> None:
    slow = tiny.profile(bundle, piece_s=NEVER_S)
    with Session(folder, profile=slow, deadline_s=10) as session:
        answer = session.infer(tiny.sample())
    assert (answer.label, answer.reason, answer.output, answer.late) == ("none", "TOO_LATE", None, False)


@pytest.mark.parametrize(
    "wrong",
    [tiny.sample()[:, :15], tiny.sample()[0], tiny.sample().astype(np.float64), tiny.sample()[:0]],
    ids=["width", "rank", "type", "empty"],
)
def test_an_input_that_does_not_fit_is_refused(wrong: Any, folder: Path, bundle: Bundle) -> None:
    with Session(folder, profile=tiny.profile(bundle), deadline_s=10) as session:
        with pytest.raises(RefusedTensor):
            session.infer(wrong)
        check(session.infer(tiny.sample()), "device")


def test_what_is_wrong_from_the_start_is_raised_at_the_start(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    tiny.make(tmp_path / "other", seed=1)
    with pytest.raises(BadBundle):
        Session(tmp_path)
    with pytest.raises(AddressError):
        Session(folder, "nonsense", profile=tiny.profile(bundle))
    with pytest.raises(DataError):
        Session(folder, profile=tiny.profile(load(tmp_path / "other")))
    for deadline_s in (0.0, -1.0, float("nan"), 1e6):
        with pytest.raises(ExperimentError):
            Session(folder, deadline_s=deadline_s)


# ---- with a cloud --------------------------------------------------------------------------------


def test_the_cloud_answers_where_the_plan_says_so(folder: Path, bundle: Bundle, address: str) -> None:
    profile = tiny.profile(bundle, memory=100)
    with Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10) as session:
        assert session.wait_for_cloud(20)
        tiny.until(lambda: session.option.boundary is not None)
        for seed in range(5):
            answer = session.infer(tiny.sample(seed))
            check(answer, "cloud", seed=seed)
            assert answer.option == session.option.name
        assert session.link
        assert session.link.bandwidth_bps > 0


def test_a_coding_of_the_plan_travels_and_comes_back(tmp_path: Path) -> None:
    bundle = tiny.make(tmp_path / "b", codings={"a": {"u8": Sent(0.9)}, "input": {"raw": Sent(1.0)}})
    profile = tiny.profile(bundle, memory=100)
    with (
        tiny.serving(tmp_path / "b", profile=profile) as address,
        Session(tmp_path / "b", address, profile=profile, bounds=ASK_FROM_A, deadline_s=10) as session,
    ):
        ready(session, "a as u8")
        answer = session.infer(tiny.sample())
    assert answer.label == "cloud"
    exact = tiny.whole(tiny.sample())
    assert not np.allclose(answer.output, exact, rtol=1e-6)  # type: ignore[arg-type]  # it went through 8 bits
    np.testing.assert_allclose(answer.output, exact, rtol=0.05, atol=0.5)  # type: ignore[arg-type]


def test_an_exit_on_the_way_spares_the_cloud_the_question(leaving: Path) -> None:
    bundle = load(leaving)
    profile = tiny.profile(bundle, memory=100)
    with (
        tiny.serving(leaving, profile=profile) as address,
        Session(leaving, address, profile=profile, bounds=ASK_FROM_A, deadline_s=10) as session,
    ):
        tiny.until(lambda: session.option.boundary == "a" and bool(session.option.exits))
        labels = [session.infer(tiny.sample(seed)).label for seed in range(20)]
    assert set(labels) == {"exit:early", "cloud"}


def test_batches_up_to_the_limit_go_to_the_cloud_and_larger_ones_stay(
    folder: Path, bundle: Bundle, address: str
) -> None:
    profile = tiny.profile(bundle, memory=100)
    with Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10) as session:
        assert session.wait_for_cloud(20)
        tiny.until(lambda: session.option.boundary is not None)
        many, more = session.infer(tiny.sample(rows=16)), session.infer(tiny.sample(rows=17))
    assert (many.label, more.label, more.reason) == ("cloud", "device", "BAD_TENSOR")
    np.testing.assert_allclose(many.output, tiny.whole(tiny.sample(rows=16)), **CLOSE)  # type: ignore[arg-type]
    np.testing.assert_allclose(more.output, tiny.whole(tiny.sample(rows=17)), **CLOSE)  # type: ignore[arg-type]


def test_a_value_that_the_coding_cannot_hold_is_computed_here(tmp_path: Path) -> None:
    bundle = tiny.make(tmp_path / "b", codings={"a": {"u8": Sent(0.9)}, "input": {"raw": Sent(1.0)}})
    profile = tiny.profile(bundle, memory=100)
    with (
        tiny.serving(tmp_path / "b", profile=profile) as address,
        Session(tmp_path / "b", address, profile=profile, bounds=ASK_FROM_A, deadline_s=10) as session,
    ):
        ready(session, "a as u8")
        x = tiny.sample()
        x[0, 0] = np.inf
        answer = session.infer(x)
    assert (answer.label, answer.reason) == ("device", "BAD_TENSOR")


def test_a_stream_that_has_lasted_its_time_is_followed_by_the_next(folder: Path, bundle: Bundle) -> None:
    limits = EdgeLimits(stream_timeout_s=0.3)
    profile = tiny.profile(bundle, memory=100)
    with (
        tiny.serving(folder, profile=profile, limits=limits) as address,
        Session(folder, address, profile=profile, bounds=ALWAYS_ASK, deadline_s=10, limits=limits) as session,
    ):
        labels: list[str] = []
        while labels.count("cloud") < 3:
            assert len(labels) < 20, labels  # a few may meet the end of their stream
            tiny.until(lambda: session.option.boundary is not None)
            labels.append(session.infer(tiny.sample()).label)
            tiny.until(lambda: session.link is None)  # the old stream has ended, the new link is not known yet


def test_a_closed_session_leaves_no_thread_behind(folder: Path, bundle: Bundle, address: str) -> None:
    with Session(folder, address, profile=tiny.profile(bundle), deadline_s=10) as session:
        assert session.wait_for_cloud(20)
        assert {"uplink", "pilot"} <= {thread.name for thread in threading.enumerate()}
    tiny.until(lambda: not {"uplink", "pilot"} & {thread.name for thread in threading.enumerate()})


def test_what_a_device_imports_is_little(folder: Path) -> None:
    program = "import sys, fedge.edge.cloud.session, fedge.edge.cloud.serving; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "matplotlib", "fedge.server", "fedge.client", "scipy"} & set(done.stdout.split())


def test_a_cloud_that_is_not_there_is_no_error(folder: Path, bundle: Bundle) -> None:
    with Session(folder, "127.0.0.1:1", profile=tiny.profile(bundle), deadline_s=10) as session:
        check(session.infer(tiny.sample()), "device")
        assert not session.wait_for_cloud(0.2)


def test_a_session_can_be_closed_twice_and_while_it_connects(folder: Path, bundle: Bundle, address: str) -> None:
    for where in (None, address, "127.0.0.1:1"):
        session = Session(folder, where, profile=tiny.profile(bundle))
        session.close()
        session.close()
        with pytest.raises(ModelError, match="closed"):
            session.infer(tiny.sample())
        assert not session._device._runners
    tiny.until(lambda: not {"uplink", "pilot"} & {thread.name for thread in threading.enumerate()})


def test_close_waits_for_the_request_that_runs(folder: Path, bundle: Bundle) -> None:
    session = Session(folder, profile=tiny.profile(bundle), deadline_s=10)
    closing = threading.Thread(target=session.close)
    with session._turn:  # as a request does
        closing.start()
        closing.join(0.1)
        assert closing.is_alive()
        assert session._device._runners
    closing.join(20)
    assert not session._device._runners


def test_a_model_with_several_inputs_is_refused_at_once(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "two")
    first, *others = bundle.boundaries
    two = msgspec.structs.replace(first, tensors=(*first.tensors, Tensor("z", "float32", (-1, 2))))
    pieces = tuple(
        msgspec.structs.replace(piece, inputs=two.tensors) if piece.start == "input" else piece
        for piece in bundle.pieces
    )
    write(tmp_path / "two", msgspec.structs.replace(bundle, boundaries=(two, *others), pieces=pieces))
    with pytest.raises(ModelError, match="inputs"):
        Session(tmp_path / "two", profile=tiny.profile(bundle))


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_a_reply_with_other_rows_than_were_sent_is_no_answer(
    rows: int, folder: Path, bundle: Bundle, address: str
) -> None:
    with Session(folder, address, profile=tiny.profile(bundle), deadline_s=10) as session:
        wrong = encode("logits", np.zeros((rows, 4), np.float32), "raw")
        right = encode("logits", np.zeros((1, 4), np.float32), "raw")
        assert _outputs(session._ends, Reply((right,), 0.0, ""), 1)["logits"].shape == (1, 4)
        with pytest.raises(RefusedTensor, match="rows"):
            _outputs(session._ends, Reply((wrong,), 0.0, ""), 1)


def test_what_was_observed_is_believed_for_a_while_and_then_forgotten(folder: Path, bundle: Bundle) -> None:
    device = Device(folder, bundle, 1)
    device.took("cloud", 1.0, 1e-3)
    slow, now = device.scale.cloud, time.monotonic()
    device.forget(now + FRESH_S / 2)
    assert device.scale.cloud == slow > 1
    device.forget(now + FRESH_S + HALF_LIFE_S)
    assert device.scale.cloud == pytest.approx(slow**0.5, rel=0.05)
    device.took("cloud", 1.0, 1e-3)
    assert device.scale.cloud > slow**0.5
    device.forget(now + 1000)
    assert (device.scale.device, device.scale.cloud) == pytest.approx((1.0, 1.0))


def test_the_device_keeps_the_time_for_its_deepest_answer_that_leaves_the_cloud_enough(
    folder: Path, bundle: Bundle, address: str
) -> None:
    profile = tiny.profile(bundle, output=1.0, memory=100)
    with (
        Relay(address, rtt_s=0.2) as relay,
        Session(folder, relay.address, profile=profile, bounds=ASK_FROM_A, deadline_s=10) as session,
    ):
        ready(session, "a as raw")
        ends, option = session._ends, session.option
        walk = start(bundle, tiny.sample())
        ends.device.advance(walk, ("input", "a"))
        ends.device.forget(time.monotonic() + 1000)  # how long that took
        whole_s = ends.device.takes_s([("a", "output")])
        assert reserved_s(ends, option, walk, 10.0) == whole_s + WAKE_S > ends.device.scale.device
        assert reserved_s(ends, option, walk, whole_s / 2) <= WAKE_S  # only the exit that was passed
        assert reserved_s(ends, option, walk, whole_s + 0.3) <= WAKE_S  # less than twice what a reply takes
        walk.passed.clear()
        assert reserved_s(ends, option, walk, whole_s + 1.1 * WAKE_S) == whole_s + WAKE_S
        assert reserved_s(ends, option, walk, whole_s / 2) <= WAKE_S
