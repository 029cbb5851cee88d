"""The journal: every event of a run on disk before the machine hears of it, and snapshots to start again from.

SQLite in WAL mode with synchronous=FULL holds the rows; the bytes of updates and snapshots are files, synced before the
row that names them commits. One process at a time, held by a lock on the state folder. Used by one thread at a time.
Must never acknowledge, and never know what an event means.

    STATE/journal.db  STATE/lock  STATE/updates/SHA256-TASK  STATE/snapshots/SEQ.state
"""

import errno
import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedge.core.errors import ExperimentError, JournalError
from fedge.core.state import Parts
from fedge.server.coordinator.facts import Fact, Stored, pack, unpack
from fedge.server.coordinator.files import digest, sync_folder, write

SCHEMA = 1
_KEPT_SNAPSHOTS = 2
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sessions (client TEXT PRIMARY KEY, incarnation TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, now REAL NOT NULL, kind TEXT NOT NULL, payload BLOB NOT NULL, file TEXT, sha256 TEXT
);
CREATE TABLE snapshots (
    seq INTEGER PRIMARY KEY, now REAL NOT NULL, version INTEGER NOT NULL, shell BLOB NOT NULL,
    file TEXT NOT NULL, sha256 TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One journaled fact and its time; `seq` counts from 1."""

    seq: int
    now: float
    fact: Fact


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after event `seq`: the machine's own bytes, and `shell`, what its shell must remember beside it."""

    seq: int
    now: float
    version: int
    shell: bytes
    machine: bytes


def passing(error: JournalError) -> bool:
    """Whether it is only that the disk is full, so that nothing was written and a later try may succeed."""
    cause = error.__cause__
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def guarded(doing: str) -> Iterator[None]:
    """Errors of SQLite and the file system as JournalError, one sentence."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise JournalError(f"Cannot {doing} ({error}); free or mend the disk and start again.") from error


class Journal:
    """The journal in `folder`, made where there is none. Raises JournalError where it is locked, damaged or newer.

    `identity` tells runs apart: ExperimentError where the folder holds a run of another. With `keep_all`, nothing is
    ever deleted, so that the whole run can be replayed.
    """

    def __init__(self, folder: Path, identity: str, run_id: str, keep_all: bool = False) -> None:
        self.updates = folder / "updates"
        self.snapshots = folder / "snapshots"
        self._keep_all = keep_all
        with guarded(f"use the state folder {folder}"):
            for path in (folder, self.updates, self.snapshots):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise JournalError(
                f"Another coordinator uses the state folder {folder}; stop it or give this one its own."
            ) from None
        try:
            self._db = connect(folder)
            self.run_id = self._identify(identity, run_id)
            self.seq, self.now = self._last()
            self._sweep()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let go of the folder."""
        self._db.close()
        self._lock.close()

    # ---- writing -------------------------------------------------------------------------------

    def append(self, batch: Sequence[tuple[float, Fact]]) -> None:
        """All or none of these, durably, in order. Raises JournalError, and then nothing was written."""
        rows = []
        for seq, (now, fact) in enumerate(batch, self.seq + 1):
            file = (fact.file, fact.sha256) if isinstance(fact, Stored) else (None, None)
            rows.append((seq, now, *pack(fact), *file))
        with guarded("write the journal"), self._transaction():
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
        self.seq += len(rows)
        self.now = batch[-1][0]

    def remember(self, client: str, incarnation: str) -> None:
        """Which process of a client is the latest, durably."""
        with guarded("write the journal"):
            self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (client, incarnation))

    def save(self, now: float, version: int, shell: bytes, machine: Parts) -> None:
        """A snapshot of the state after all events so far; what no kept snapshot needs is deleted."""
        name = f"{self.seq:012d}.state"
        with guarded("write a snapshot"):
            write(self.snapshots / name, machine, durable=True)
            sha256 = digest(self.snapshots / name)
            row = (self.seq, now, version, shell, name, sha256)
            self._db.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", row)
            if not self._keep_all:
                self._prune()

    def _prune(self) -> None:
        kept = self._db.execute("SELECT seq FROM snapshots ORDER BY seq DESC LIMIT ?", (_KEPT_SNAPSHOTS,)).fetchall()
        oldest = kept[-1][0]
        updates = self._db.execute("SELECT file FROM events WHERE seq <= ? AND file IS NOT NULL", (oldest,)).fetchall()
        states = self._db.execute("SELECT file FROM snapshots WHERE seq < ?", (oldest,)).fetchall()
        with self._transaction():
            self._db.execute("DELETE FROM events WHERE seq <= ?", (oldest,))
            self._db.execute("DELETE FROM snapshots WHERE seq < ?", (oldest,))
        for (name,) in updates:
            (self.updates / name).unlink(missing_ok=True)
        for (name,) in states:
            (self.snapshots / name).unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # ---- reading -------------------------------------------------------------------------------

    def rows(self, after: int) -> Iterator[Row]:
        """The facts after event `after`, in order."""
        return rows(self._db, after)

    def newest(self) -> Snapshot | None:
        """The newest snapshot that verifies; None where there never was one. Raises JournalError where all are bad."""
        return snapshot(self._db, self.snapshots, oldest=False)

    def sessions(self) -> dict[str, str]:
        """The latest incarnation of each client."""
        with guarded("read the journal"):
            return dict(self._db.execute("SELECT client, incarnation FROM sessions").fetchall())

    # ---- opening -------------------------------------------------------------------------------

    def _identify(self, identity: str, run_id: str) -> str:
        with guarded("write the journal"):
            put = "INSERT OR IGNORE INTO meta VALUES (?, ?)"
            with self._transaction():
                self._db.executemany(put, [("experiment", identity), ("run_id", run_id)])
            meta = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        if meta["experiment"] != identity:
            raise ExperimentError(
                "The state folder holds a run of another experiment; give a new folder, or that experiment."
            )
        return str(meta["run_id"])

    def _last(self) -> tuple[int, float]:
        query = (
            "SELECT seq, now FROM events UNION ALL SELECT seq, now FROM snapshots ORDER BY seq DESC, now DESC LIMIT 1"
        )
        with guarded("read the journal"):
            found = self._db.execute(query).fetchone()
        return found or (0, 0.0)

    def _sweep(self) -> None:
        """Delete files no row names: left between a rename and its commit by a crash, hence never acknowledged."""
        with guarded("tidy the state folder"):
            for folder, table in ((self.updates, "events"), (self.snapshots, "snapshots")):
                named = self._db.execute(f"SELECT file FROM {table} WHERE file IS NOT NULL").fetchall()  # noqa: S608 -- fixed names
                known = {name for (name,) in named}
                for path in folder.iterdir():
                    if path.name not in known:
                        path.unlink()
            sync_folder(self.updates)


def connect(folder: Path) -> sqlite3.Connection:
    """The database in `folder`, checked. Raises JournalError where it is damaged or of a newer fedge."""
    path = folder / "journal.db"
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            db.executescript(f"BEGIN;{_TABLES}PRAGMA user_version={SCHEMA};COMMIT;")
    except sqlite3.Error as error:
        raise JournalError(f"The journal {path} cannot be opened ({error}); restore it from a copy.") from error
    if damage != "ok":
        raise JournalError(f"The journal {path} is damaged ({damage}); restore it from a copy.")
    if version not in (0, SCHEMA):
        raise JournalError(f"The journal {path} has schema {version}, this fedge reads {SCHEMA}; use a newer fedge.")
    return db


def rows(db: sqlite3.Connection, after: int) -> Iterator[Row]:
    """The facts after event `after`, in order. Raises JournalError where one is missing."""
    with guarded("read the journal"):
        query = "SELECT seq, now, kind, payload FROM events WHERE seq > ? ORDER BY seq"
        for expected, (seq, now, kind, payload) in enumerate(db.execute(query, (after,)), after + 1):
            if seq != expected:
                raise JournalError(f"Event {expected} is missing from the journal; restore it from a copy.")
            yield Row(seq, now, unpack(kind, payload))


def snapshot(db: sqlite3.Connection, folder: Path, *, oldest: bool) -> Snapshot | None:
    """The newest, or oldest, snapshot whose file has its hash; None where there never was one."""
    order = "ASC" if oldest else "DESC"
    with guarded("read the journal"):
        query = f"SELECT seq, now, version, shell, file, sha256 FROM snapshots ORDER BY seq {order}"  # noqa: S608 -- fixed words
        found = db.execute(query).fetchall()
    for seq, now, version, shell, name, sha256 in found:
        path = folder / name
        if path.is_file() and digest(path) == sha256:
            return Snapshot(seq, now, version, shell, path.read_bytes())
    if found:
        raise JournalError(f"No snapshot in {folder} verifies; restore the state folder from a copy.")
    return None
