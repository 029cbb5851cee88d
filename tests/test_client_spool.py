"""What a client keeps on disk: whole, its own, and of this run."""

import os

import numpy as np
import pytest

from fedge.client.spool import Spool
from fedge.core.errors import DataError
from fedge.core.task import Update


def spooled(folder, task_id="t1"):
    update = Update(
        "c", task_id, 3, 4, 5, {"delta": np.arange(3, dtype=np.float32)}, {"a": 1.0}, {"loss": float("nan")}
    )
    state = {"scaffold": {"control/x": np.ones(3, np.float32)}, "pkg.mod:hook": {"n": np.array(7)}}
    spool = Spool(folder, "c", "r")
    spool.keep(update, state)
    return spool, update, state


def test_the_spool_brings_update_and_state_back(tmp_path):
    _, update, state = spooled(tmp_path / "new" / "folder")
    back = Spool(tmp_path / "new" / "folder", "c", "r")
    np.testing.assert_equal(back.state, state)
    for name in ("client", "task_id", "base_version", "steps", "examples", "timings"):
        assert getattr(back.pending, name) == getattr(update, name)
    np.testing.assert_equal(dict(back.pending.metrics), dict(update.metrics))
    np.testing.assert_array_equal(back.pending.delta, update.delta)


def test_a_settled_update_is_not_pending_but_its_state_stays(tmp_path):
    spool, _, state = spooled(tmp_path)
    spool.settle("t1")
    back = Spool(tmp_path, "c", "r")
    assert back.pending is None
    np.testing.assert_equal(back.state, state)


def test_what_another_run_left_is_not_used(tmp_path):
    spooled(tmp_path)
    back = Spool(tmp_path, "c", "another")
    assert back.pending is None
    assert back.state == {}


def test_a_folder_belongs_to_one_client(tmp_path):
    spooled(tmp_path)
    with pytest.raises(DataError, match="belongs to client 'c'"):
        Spool(tmp_path, "d", "r")


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "header"])
def test_a_damaged_spool_is_put_aside(tmp_path, damage, caplog):
    spooled(tmp_path)
    path = tmp_path / "last.safetensors"
    raw = path.read_bytes()
    path.write_bytes(
        {"cut": raw[:-5], "noise": b"\xff" * 100, "empty": b"", "header": raw.replace(b"task_id", b"task_ix")}[damage]
    )
    back = Spool(tmp_path, "c", "r")
    assert back.pending is None
    assert back.state == {}
    assert (tmp_path / "last.broken").exists()
    assert "put aside" in caplog.text


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be used"):
        Spool(tmp_path / "file" / "folder", "c", "r")


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    spool, _, _ = spooled(tmp_path)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        spool.keep(Update("c", "t2", 3, 4, 5, {"delta": np.zeros(3, np.float32)}), {})
    monkeypatch.undo()
    assert Spool(tmp_path, "c", "r").pending.task_id == "t1"
