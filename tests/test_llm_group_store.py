"""Shards on disk: cut once by the head, fetched whole by a worker whatever happens on the way."""

import fcntl
import hashlib
import threading
from dataclasses import replace

import grpc
import pytest

from fedge.core.errors import ExperimentError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.cuts import Cuts
from fedge.edge.llm.group.download import download
from fedge.edge.llm.group.speeds import FILE, speeds
from fedge.edge.llm.group.store import Store
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.shards.shares import even
from fedge.protos import llm_pb2 as pb
from tests.llm_fixture import folder

LIMITS = LlmLimits(reconnect_s=0.01, max_store_bytes=10_000)
DATA = bytes(range(256)) * 16
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store", LIMITS)
    yield made
    made.close()


class Cut(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "cut"


class Source:
    """A server's side of Fetch: gives `data` in pieces, and is cut after so many of them."""

    def __init__(self, data=DATA, cuts=()):
        self.data, self.cuts, self.offsets = data, list(cuts), []

    def __call__(self, request):
        self.offsets.append(request.offset)
        self.left = self.cuts.pop(0) if self.cuts else None
        return self._call(request.offset)

    def _call(self, offset):
        source = self

        class Call:
            def __iter__(self):
                for number, at in enumerate(range(offset, len(source.data), 1000)):
                    if number == source.left:
                        raise Cut
                    yield pb.Chunk(data=source.data[at : at + 1000])

            def cancel(self):
                source.left = 0

        return Call()


def fetch(store, source, stopping=None):
    return download(store, source, DIGEST, len(DATA), stopping or threading.Event(), LIMITS)


def test_a_shard_is_fetched_once(store):
    source = Source()
    path = fetch(store, source)
    assert path.read_bytes() == DATA
    assert fetch(store, source) == path
    assert source.offsets == [0]
    assert store.whole(DIGEST) == path


def test_fetching_goes_on_where_it_was_cut_also_in_another_process(store):
    source = Source(cuts=[2, 1, 0])
    with pytest.raises(ModelError, match="could not be fetched"):
        fetch(store, source)
    assert store.whole(DIGEST) is None
    store.close()
    again = Store(store.root, LIMITS)
    assert fetch(again, source).read_bytes() == DATA
    assert source.offsets == [0, 2000, 3000, 3000]
    again.close()


def test_bytes_that_are_wrong_are_fetched_again_and_never_have_the_name(store):
    wrong = Source(DATA[:-1] + b"!")
    with pytest.raises(ModelError, match="other bytes than were promised"):
        fetch(store, wrong)
    assert wrong.offsets == [0, 0, 0]
    assert store.whole(DIGEST) is None
    assert fetch(store, Source()).read_bytes() == DATA


@pytest.mark.parametrize(("data", "kept"), [(DATA + b"more", 4000), (DATA[:-1], 4095)])
def test_too_many_bytes_are_not_written_and_too_few_are_no_shard(store, data, kept):
    with pytest.raises(ModelError, match=f"{kept} of 4096 bytes"):
        fetch(store, Source(data))
    assert store.whole(DIGEST) is None
    assert store.fetched(DIGEST) == kept


def test_a_file_that_went_bad_on_disk_is_fetched_again(store):
    path = fetch(store, Source())
    path.write_bytes(DATA[:-1] + b"!")
    source = Source()
    assert fetch(store, source).read_bytes() == DATA
    assert source.offsets == [0]


def test_a_full_disk_is_said_in_a_sentence(store, tmp_path):
    (tmp_path / "store" / f"{DIGEST}.part").symlink_to("/dev/full")
    with pytest.raises(ModelError, match="free some space"):
        fetch(store, Source())


def test_the_oldest_make_room_and_what_never_fits_is_refused(store):
    for number in range(4):
        data = bytes([number]) * 4000
        digest = hashlib.sha256(data).hexdigest()
        download(store, Source(data), digest, len(data), threading.Event(), LIMITS)
    assert len(list(store.root.glob("*.safetensors"))) == 2
    assert store.whole(digest) is not None
    with pytest.raises(ModelError, match="allow more"):
        store.fetch(DIGEST, 10_001, [])


def test_stopping_ends_a_download(store):
    stopping = threading.Event()

    class Endless(Source):
        def __call__(self, request):
            call = super().__call__(request)
            stopping.set()
            return call

    with pytest.raises(RankLost):
        fetch(store, Endless(), stopping)
    with pytest.raises(RankLost):
        fetch(store, Source(), stopping)


def test_one_process_uses_a_folder_at_a_time(store, tmp_path):
    with pytest.raises(ExperimentError, match="Another worker uses"):
        Store(store.root, LIMITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot be used"):
        Store(tmp_path / "file", LIMITS)


def test_a_division_is_cut_once_and_found_again(tmp_path):
    with open_folder(folder(tmp_path)) as model:
        cuts = Cuts(model, "int8", tmp_path / "cuts", LlmLimits())
        made = cuts.make(even(model.config, 2))
        times = [one.path.stat().st_mtime_ns for one in made]
        assert [open_shard(one.path).rank for one in made] == [0, 1]
        for one in made:
            assert hashlib.sha256(one.path.read_bytes()).hexdigest() == one.digest
            assert cuts.find(one.digest) == one.path
        later = Cuts(model, "int8", tmp_path / "cuts", LlmLimits())
        assert later.find(made[0].digest) is None
        assert later.make(even(model.config, 2)) == made
        assert [one.path.stat().st_mtime_ns for one in made] == times
        made[1].path.unlink()
        assert later.make(even(model.config, 2)) == made
        assert made[1].path.exists()
        made[1].path.write_bytes(made[1].path.read_bytes()[:-1] + b"!")
        fresh = Cuts(model, "int8", tmp_path / "cuts", LlmLimits())
        assert fresh.make(even(model.config, 2)) == made
        assert hashlib.sha256(made[1].path.read_bytes()).hexdigest() == made[1].digest
        assert cuts.make(even(model.config, 3))[0] != made[0]


def test_divisions_that_were_not_used_for_long_make_room(tmp_path):
    with open_folder(folder(tmp_path)) as model:
        size = sum(one.bytes for one in Cuts(model, "int8", tmp_path / "a", LlmLimits()).make(even(model.config, 1)))
        cuts = Cuts(model, "int8", tmp_path / "b", replace(LlmLimits(), max_store_bytes=2 * size + size // 2))
        first = cuts.make(even(model.config, 1))
        cuts.make(even(model.config, 2))
        cuts.make(even(model.config, 3))
    assert cuts.find(first[0].digest) is None
    assert len(list((tmp_path / "b").glob("cut-*"))) < 3


def test_what_another_head_serves_is_not_removed(tmp_path):
    with open_folder(folder(tmp_path)) as model:
        small = replace(LlmLimits(), max_store_bytes=1)
        one, other = (Cuts(model, "int8", tmp_path / "cuts", small) for _ in range(2))
        first = one.make(even(model.config, 1))
        second = other.make(even(model.config, 2))
        assert first[0].path.exists()
        one.close()
        other.make(even(model.config, 3))
        assert not first[0].path.exists()
        assert not second[0].path.exists()


def test_one_head_cuts_at_a_time(tmp_path):
    with open_folder(folder(tmp_path)) as model, (tmp_path / "cutting.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cuts, made = Cuts(model, "int8", tmp_path, LlmLimits()), []
        waiting = threading.Thread(target=lambda: made.extend(cuts.make(even(model.config, 1))))
        waiting.start()
        waiting.join(0.5)
        assert not made
        assert not list(tmp_path.glob("cut-*"))
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join(20)
        assert made[0].path.exists()


@pytest.mark.slow
def test_speeds_are_measured_once(tmp_path):
    found = speeds(tmp_path)
    assert set(found.weights_per_s) == {"float32", "int8", "int4"}
    assert min(*found.weights_per_s.values(), found.disk_bytes_per_s) > 1e6
    assert 1e-6 < found.layer_s < 1
    changed = (tmp_path / FILE).read_text().replace(str(found.disk_bytes_per_s), "12345.0")
    (tmp_path / FILE).write_text(changed)
    assert speeds(tmp_path).disk_bytes_per_s == 12345.0
    (tmp_path / FILE).write_text(changed.replace('"machine":"', '"machine":"another '))
    assert speeds(tmp_path).disk_bytes_per_s != 12345.0
