"""The run as a fold over its journal: the machine and what its shell must know, from a snapshot and the facts after it.

The same fold carries a live run, a restart and an audit, so they cannot differ. Must never write.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fedge.core.errors import JournalError
from fedge.server.coordinator.facts import Stored, at
from fedge.server.coordinator.journal import Row, Snapshot, connect, rows, snapshot
from fedge.server.machine import Federation, Machine
from fedge.server.machine.events import Effect, Evaluated, Event, Record, Ticked, WakeAt


@dataclass(slots=True)
class Shell:
    """What the shell remembers of the effects so far.

    `wakes` are the times at which the machine wants a tick, `records` counts the lines of the run's record, and
    `evaluated` is the version measured last, with its `metrics`.
    """

    wakes: list[float] = field(default_factory=list)
    records: int = 0
    evaluated: int = -1
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """A machine and its shell's memory, moved on by events."""

    machine: Machine
    shell: Shell

    def handle(self, event: Event) -> list[Effect]:
        """The machine's effects, noted down. Raises StrategyError where a plug-in is broken."""
        effects = self.machine.handle(event)
        shell = self.shell
        if isinstance(event, Ticked):
            shell.wakes = [wake for wake in shell.wakes if wake > event.now]
        if isinstance(event, Evaluated):
            shell.evaluated, shell.metrics = event.version, dict(event.metrics)
        shell.wakes += [effect.at for effect in effects if isinstance(effect, WakeAt) and effect.at not in shell.wakes]
        shell.records += sum(isinstance(effect, Record) for effect in effects)
        return effects

    def replay(self, row: Row, updates: Path) -> list[Effect]:
        """One journaled fact again. Raises JournalError where an update's bytes have changed."""
        if isinstance(row.fact, Stored):
            row.fact.verify(updates)
        return self.handle(at(row.now, row.fact, updates))


def resume(federation: Federation, saved: Snapshot) -> Run:
    """The run as it was when `saved` was written. Raises JournalError where it was of other strategies."""
    try:
        shell = msgspec.msgpack.decode(saved.shell, type=Shell)
        return Run(Machine.restore(federation, saved.machine), shell)
    except msgspec.MsgspecError as error:
        raise JournalError(
            f"The snapshot does not fit this experiment ({error}); use the one it was begun with."
        ) from error


def replay(state_dir: Path, federation: Federation) -> Machine:
    """The machine after the whole journal in `state_dir`, from its oldest snapshot on. Raises JournalError."""
    if not (state_dir / "journal.db").is_file():
        raise JournalError(f"There is no journal in {state_dir}; name the folder that a coordinator was given.")
    db = connect(state_dir)
    try:
        saved = snapshot(db, state_dir / "snapshots", oldest=True)
        if saved is None:
            raise JournalError(f"The journal in {state_dir} is empty; there is nothing to replay.")
        run = resume(federation, saved)
        for row in rows(db, saved.seq):
            run.replay(row, state_dir / "updates")
        return run.machine
    finally:
        db.close()
