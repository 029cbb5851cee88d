"""What a piece takes of a machine's memory, measured in a process of its own so that nothing else is counted.

Owns the reading of Linux's /proc/self/smaps_rollup; elsewhere nothing is measured. Run as a module it is that process.
"""

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedge.core.errors import ModelError
from fedge.edge.bundle import Bundle

ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory of a process, in bytes: `private` must stay, `mapped` are pages of files, which the system may drop."""

    private: int
    mapped: int

    def since(self, before: "Resident") -> "Resident":
        """What came on top."""
        return Resident(max(self.private - before.private, 0), max(self.mapped - before.mapped, 0))


def resident() -> Resident | None:
    """Of this process, now; None where the system does not say."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in ROLLUP.read_text().splitlines()]
        sizes = {words[0]: int(words[1]) << 10 for words in lines if words[-1] == "kB"}
        return Resident(sizes["Anonymous:"], sizes["Rss:"] - sizes["Anonymous:"])
    return None


def piece_memory(
    folder: Path, bundle: Bundle, start: str, end: str, *, threads: int = 1, cache: Path | None = None
) -> Resident | None:
    """What opening a piece of the verified bundle and running it adds to a process; None where that cannot be told.

    Raises ModelError where the piece does not run.
    """
    command = [sys.executable, "-m", __name__, str(folder), start, end, str(threads), str(cache or "")]
    done = subprocess.run(command, input=msgspec.json.encode(bundle), capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise ModelError(
            f"The memory of the piece from {start!r} to {end!r} cannot be measured ({last}); run it alone."
        )
    return msgspec.json.decode(done.stdout, type=Resident | None)


def main(folder: str, start: str, end: str, threads: str, cache: str) -> None:
    """The child: the bundle comes on the standard input, the result goes to the standard output."""
    from fedge.edge.runtime.sessions import open_piece  # onnxruntime, which who only asks for `resident` may not need
    from fedge.edge.runtime.tensors import example

    bundle = msgspec.json.decode(sys.stdin.buffer.read(), type=Bundle)
    before = resident()
    runner = open_piece(Path(folder), bundle, start, end, threads=int(threads), cache=Path(cache) if cache else None)
    runner.run(example(runner.piece.inputs))
    after = resident()
    sys.stdout.buffer.write(msgspec.json.encode(after.since(before) if after and before else None))


if __name__ == "__main__":
    main(*sys.argv[1:])
