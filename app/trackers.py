"""Experiment trackers beside the files of a run folder. A tracker is imported only where an experiment asks for it.

Must never change a run: trackers are told, and tell nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedge.core.errors import ExperimentError
from fedge.experiment import Experiment
from fedge.runs import Watcher
from fedge.tally import Tally


class TensorBoard:
    """Metrics as scalars over accepted updates, in FOLDER/tensorboard. Raises ExperimentError where it is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError:
            raise ExperimentError(
                "report.to: TensorBoard is missing; pip install '.[tensorboard]' in fedge's folder, or leave it out."
            ) from None
        self._writer = Writer(str(folder / "tensorboard"))

    def begin(self, tally: Tally) -> None:
        """Nothing to do: the files go on by themselves."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One point in each curve."""
        for name, value in line.items():
            if name != "updates" and isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), step=int(line["updates"]))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


@contextmanager
def opened(experiment: Experiment, folder: Path | None) -> Iterator[list[Watcher]]:
    """The trackers an experiment asks for; none where nothing is written."""
    if folder is None or "tensorboard" not in experiment.report.to:
        yield []
        return
    tracker = TensorBoard(folder)
    try:
        yield [tracker]
    finally:
        tracker.close()
