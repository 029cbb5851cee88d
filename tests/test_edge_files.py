"""Files that are there whole or not at all, and the writers that rely on it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge.core.errors import ModelError
from fedge.edge.files import replacing
from fedge.edge.llm.collab import exits, halves
from tests.llm_fixture import folder


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> None:
    raise KeyboardInterrupt


def half(path: Path, fault: Callable[[], None]) -> None:
    """Begin to write another file of this name, and fail."""
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        fault()


@pytest.mark.parametrize(
    ("fault", "error", "sentence"), [(full, ModelError, "free some space"), (interrupted, KeyboardInterrupt, "^$")]
)
def test_what_fails_midway_leaves_the_old_file_and_nothing_else(
    fault: Callable[[], None], error: type[BaseException], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"old", b"newer"):
        with replacing(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    with pytest.raises(error, match=sentence):
        half(path, fault)
    assert [(one, one.read_bytes()) for one in path.parent.iterdir()] == [(path, b"newer")]


def test_a_full_disk_leaves_the_old_halves_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = folder(tmp_path, layers=3, vocab=320), tmp_path / "out"
    halves.cut(model, out, (1,))
    before = {one: one.read_bytes() for one in out.rglob("*") if one.is_file()}
    found = halves.open_halves(out).edge()[1]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for write in (lambda: halves.cut(model, out, (2,)), lambda: exits.save(out / halves.EXITS, found)):
            with pytest.raises(ModelError, match="free some space"):
                write()
            assert {one: one.read_bytes() for one in out.rglob("*") if one.is_file()} == before
    assert halves.open_halves(out).exits == (1,)
