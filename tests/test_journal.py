"""The journal and the spool alone: what is on disk stays, what is torn or foreign is refused in one sentence."""

import hashlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError, JournalError, TaskSpent, WrongHash, WrongOffset, WrongSize
from fedge.core.task import DELTA
from fedge.protos import fedge_pb2 as pb
from fedge.protos import wire
from fedge.server.coordinator import journal as journals
from fedge.server.coordinator.facts import Fact, Stored, at, pack, unpack
from fedge.server.coordinator.journal import Journal, passing
from fedge.server.coordinator.spool import Spool
from fedge.server.machine.events import Arrived, Evaluated, Failed, Joined, Left, Ticked

FACTS: list[Fact] = [
    Joined(0.0, "a", 5, "hash"),
    Ticked(0.0),
    Failed(0.0, "a", "t", "out of memory"),
    Evaluated(0.0, 3, {"accuracy": 0.1 + 0.2}),
    Left(0.0, "a", "left"),
]


def opened(folder: Path, identity: str = "x", keep_all: bool = False) -> Journal:
    return Journal(folder, identity, "run", keep_all)


def stored(journal: Journal, task_id: str, vector: np.ndarray) -> Stored:
    manifest, buffers = wire.encode_blobs({DELTA: vector})
    begin = pb.UploadBegin(sender=pb.Sender(client="a", incarnation="i"), task_id=task_id, manifest=manifest, steps=1)
    name = f"{manifest.sha256.hex()}-{task_id}"
    (journal.updates / name).write_bytes(b"".join(buffers))
    return Stored(begin.SerializeToString(), name, manifest.sha256.hex())


def test_facts_come_back_as_they_went_in(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    times = [0.1 * count for count in range(len(FACTS))]
    journal.append(list(zip(times, FACTS)))
    journal.close()
    again = opened(tmp_path)
    found = list(again.rows(0))
    assert [row.fact for row in found] == FACTS
    assert [row.now for row in found] == times
    assert [row.seq for row in found] == [1, 2, 3, 4, 5]
    assert (again.seq, again.now) == (5, times[-1])
    again.close()


@given(st.floats(allow_nan=False), st.dictionaries(st.text(), st.floats(allow_nan=False)), st.integers(0, 2**62))
def test_a_payload_keeps_every_bit(now: float, metrics: dict[str, float], version: int) -> None:
    fact = Evaluated(now, version, metrics)
    assert unpack(*pack(fact)) == fact


def test_an_update_is_a_read_only_view_of_its_file(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    vector = np.arange(7, dtype=np.float32)
    fact = stored(journal, "t1", vector)
    journal.append([(1.5, fact)])
    (row,) = journal.rows(0)
    event = at(row.now, row.fact, journal.updates)
    assert isinstance(event, Arrived)
    assert event.now == 1.5
    np.testing.assert_array_equal(event.update.delta, vector)
    assert not event.update.delta.flags.writeable
    journal.close()


def test_a_changed_update_does_not_verify(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    fact = stored(journal, "t1", np.ones(7, np.float32))
    fact.verify(journal.updates)
    path = journal.updates / fact.file
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with pytest.raises(JournalError, match="has changed"):
        fact.verify(journal.updates)
    path.unlink()
    with pytest.raises(JournalError, match="cannot be read"):
        fact.verify(journal.updates)
    journal.close()


def test_unknown_rows_are_refused() -> None:
    with pytest.raises(JournalError, match="cannot be read"):
        unpack("Exploded", b"\x80")
    with pytest.raises(JournalError, match="cannot be read"):
        unpack("Joined", b"\xff")


def test_a_missing_row_is_noticed(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append([(0.0, fact) for fact in FACTS])
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("DELETE FROM events WHERE seq = 2")
    db.close()
    again = opened(tmp_path)
    with pytest.raises(JournalError, match="Event 2 is missing"):
        list(again.rows(0))
    again.close()


def test_snapshots_keep_two_and_delete_what_they_cover(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for number in range(4):
        fact = stored(journal, f"t{number}", np.full(4, number, np.float32))
        journal.append([(float(number), fact)])
        journal.save(float(number), number, b"shell", [f"state {number}".encode()])
    assert sorted(path.name for path in journal.snapshots.iterdir()) == ["000000000003.state", "000000000004.state"]
    assert [row.seq for row in journal.rows(3)] == [4]
    assert [path.name.partition("-")[2] for path in journal.updates.iterdir()] == ["t3"]
    newest = journal.newest()
    assert newest is not None
    assert (newest.seq, newest.machine, newest.shell) == (4, b"state 3", b"shell")
    journal.close()


def test_keep_all_keeps_all(tmp_path: Path) -> None:
    journal = opened(tmp_path, keep_all=True)
    for number in range(4):
        journal.append([(float(number), stored(journal, f"t{number}", np.ones(4, np.float32)))])
        journal.save(float(number), number, b"", [b"state"])
    assert len(list(journal.rows(0))) == 4
    assert len(list(journal.updates.iterdir())) == 4
    assert len(list(journal.snapshots.iterdir())) == 4
    journal.close()


def test_a_torn_snapshot_gives_way_to_the_one_before(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for number in range(2):
        journal.append([(0.0, Ticked(0.0))])
        journal.save(0.0, number, b"", [f"state {number}".encode()])
    (journal.snapshots / "000000000002.state").write_bytes(b"stat")
    found = journal.newest()
    assert found is not None
    assert found.machine == b"state 0"
    assert [row.seq for row in journal.rows(found.seq)] == [2]
    (journal.snapshots / "000000000001.state").unlink()
    with pytest.raises(JournalError, match="No snapshot"):
        journal.newest()
    journal.close()


def test_files_no_row_names_are_swept_on_start(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    kept = stored(journal, "t1", np.ones(4, np.float32))
    journal.append([(0.0, kept)])
    (journal.updates / "never-committed").write_bytes(b"x")
    (journal.snapshots / "000000000009.tmp").write_bytes(b"x")
    journal.close()
    again = opened(tmp_path)
    assert [path.name for path in again.updates.iterdir()] == [kept.file]
    assert not list(again.snapshots.iterdir())
    again.close()


def test_only_one_coordinator_per_folder(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(JournalError, match="Another coordinator"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_another_experiment_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, "one").close()
    with pytest.raises(ExperimentError, match="another experiment"):
        opened(tmp_path, "two")
    opened(tmp_path, "one").close()


def test_the_run_id_is_drawn_once(tmp_path: Path) -> None:
    Journal(tmp_path, "x", "first").close()
    again = Journal(tmp_path, "x", "second")
    assert again.run_id == "first"
    again.close()


@pytest.mark.parametrize("damage", [b"this is no database" * 300, b""])
def test_a_damaged_journal_is_refused(tmp_path: Path, damage: bytes) -> None:
    journal = opened(tmp_path)
    journal.append([(0.0, fact) for fact in FACTS * 50])
    journal.close()
    path = tmp_path / "journal.db"
    whole = path.read_bytes()
    path.write_bytes(damage or whole[: len(whole) // 2])
    with pytest.raises(JournalError, match="restore it from a copy"):
        opened(tmp_path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute(f"PRAGMA user_version={journals.SCHEMA + 1}")
    db.close()
    with pytest.raises(JournalError, match="newer fedge"):
        opened(tmp_path)


def test_a_full_disk_loses_nothing_and_passes(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append([(0.0, Joined(0.0, "a"))])
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JournalError, match="write the journal") as caught:
        journal.append([(1.0, Failed(0.0, "a", "t", "x" * 100_000))])
    assert passing(caught.value)
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.append([(2.0, Left(0.0, "a"))])
    assert [row.fact for row in journal.rows(0)] == [Joined(0.0, "a"), Left(0.0, "a")]
    journal.close()


def test_sessions_are_remembered(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.remember("a", "one")
    journal.remember("a", "two")
    journal.close()
    again = opened(tmp_path)
    assert again.sessions() == {"a": "two"}
    again.close()


# ---- the spool -----------------------------------------------------------------------------------


def begin_for(data: bytes, task_id: str = "ab12") -> pb.UploadBegin:
    blob = pb.Blob(name=DELTA, dtype="uint8", shape=[len(data)])
    manifest = pb.Manifest(blobs=[blob], size_bytes=len(data), sha256=hashlib.sha256(data).digest())
    return pb.UploadBegin(task_id=task_id, manifest=manifest)


@settings(max_examples=25, deadline=None)
@given(data=st.binary(min_size=1, max_size=400), cuts=st.lists(st.integers(1, 400), max_size=4), restart=st.booleans())
def test_an_upload_cut_anywhere_arrives_whole(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], restart: bool
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    target = folder / "done"
    target.mkdir()
    spool = Spool(folder / "spool")
    begin = begin_for(data)
    for cut in sorted(cuts):
        if restart:
            spool = Spool(folder / "spool")
        upload = spool.begin(begin)
        assert upload.offset == spool.offset("ab12")
        for chunk in wire.chunks([data[:cut]], upload.offset, 64):
            upload.take(chunk)
        spool.end(upload, "ab12")
    upload = spool.begin(begin)
    for chunk in wire.chunks([data], upload.offset, 64):
        upload.take(chunk)
    stored_ = upload.finish(target)
    assert (target / stored_.file).read_bytes() == data
    assert stored_.sha256 == hashlib.sha256(data).hexdigest()
    assert spool.offset("ab12") == 0


def test_a_wrong_hash_drops_the_bytes(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    begin = begin_for(b"right")
    upload = spool.begin(begin)
    upload.take(pb.Chunk(offset=0, data=b"wrong"))
    with pytest.raises(WrongHash):
        upload.finish(tmp_path)
    spool.end(upload, begin.task_id)
    assert spool.offset(begin.task_id) == 0


def test_other_bytes_for_the_task_replace_the_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.begin(begin_for(b"one!"))
    first.take(pb.Chunk(offset=0, data=b"on"))
    second = spool.begin(begin_for(b"two?"))
    assert second.offset == 0
    with pytest.raises(TaskSpent, match="Another upload"):
        first.take(pb.Chunk(offset=2, data=b"e!"))
    second.take(pb.Chunk(offset=0, data=b"two?"))
    second.finish(tmp_path)


def test_gaps_overlaps_and_excess_are_refused(tmp_path: Path) -> None:
    upload = Spool(tmp_path).begin(begin_for(b"12345678"))
    upload.take(pb.Chunk(offset=0, data=b"1234"))
    for offset in (2, 5):
        with pytest.raises(WrongOffset, match="go on at 4"):
            upload.take(pb.Chunk(offset=offset, data=b"5"))
    with pytest.raises(WrongSize, match="ends after 4"):
        upload.finish(tmp_path)
    with pytest.raises(WrongSize, match="More bytes"):
        upload.take(pb.Chunk(offset=4, data=b"56789"))
    upload.close()


def test_a_sender_may_start_anew(tmp_path: Path) -> None:
    upload = Spool(tmp_path).begin(begin_for(b"12345678"))
    upload.take(pb.Chunk(offset=0, data=b"1234"))
    upload.take(pb.Chunk(offset=0, data=b"123456"))
    assert upload.offset == 6
    upload.take(pb.Chunk(offset=6, data=b"78"))
    assert upload.finish(tmp_path).file.endswith("ab12")


def test_what_nobody_waits_for_is_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    upload = spool.begin(begin_for(b"12345678"))
    upload.take(pb.Chunk(offset=0, data=b"1234"))
    assert [task for task, _ in spool.tasks()] == ["ab12"]
    spool.drop("ab12")
    assert spool.tasks() == []
    with pytest.raises(TaskSpent):
        upload.take(pb.Chunk(offset=4, data=b"5678"))
