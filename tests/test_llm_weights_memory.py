"""What weights take of a process: in a process of its own, windows within their budget and copies little more."""

import subprocess
import sys

import pytest

from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.shards.shard import export
from fedge.edge.llm.shards.shares import even
from tests.llm_fixture import folder

FREED = """
import sys
from pathlib import Path
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.runtime.memory import resident
import numpy as np

shard = open_shard(Path(sys.argv[1]))
kernel = KERNELS["onnx-float32"]
whole = Resident(shard, kernel)  # loads what the kernel needs
whole.close()
before = resident()
whole = Resident(shard, kernel)
since = resident().since(before)
print((since.private + since.mapped) / sum(block.bytes for block in shard.blocks))
"""


def test_copies_take_little_more_than_the_weights(tmp_path_factory):
    """In a process of its own: freed memory is the system's again, and no page of the file stays mapped."""
    done = subprocess.run(
        [sys.executable, "-c", FREED, wide(tmp_path_factory)], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(done.stdout) < 1.1


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.compute.window import Window
from fedge.edge.runtime.memory import resident

shard = open_shard(Path(sys.argv[1]))
budget, direct = int(sys.argv[2]), {"True": True, "False": False, "None": None}[sys.argv[3]]
x = {columns: np.ones((1, columns), np.float32) for columns in (64, 512, 1024, 2048)}
def use(views, columns):
    for name, one in views.items():
        if callable(one):
            one(x[columns[name]])
warm = KERNELS["numpy-float32"]
before = resident()
window = Window(shard, warm, budget, direct)
columns = {"qkv": 512, "o": 512, "gate_up": 512, "down": 2048, "head": 512}
most = 0
for _ in range(3):
    for block in shard.blocks:
        use(window.take(block.index), columns)
        since = resident().since(before)
        most = max(most, since.private + since.mapped)
        window.release(block.index)
print(sum(block.bytes for block in shard.blocks), most)
"""


@pytest.mark.parametrize("direct", [True, False, None])
def test_weights_in_memory_stay_within_the_budget(tmp_path_factory, direct):
    """Anonymous and mapped memory together, in a process of its own; 2 MiB for the thread and Python's own."""
    path = wide(tmp_path_factory)
    budget = 40 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, str(budget), str(direct)], capture_output=True, text=True, check=True
    )
    total, most = map(int, done.stdout.split())
    assert total > 2 * budget
    assert budget // 2 < most < budget + (2 << 20)


_made: list[str] = []


def wide(tmp_path_factory):
    """A shard of some 130 MB, made once."""
    if not _made:
        tmp = tmp_path_factory.mktemp("wide")
        opened = open_folder(
            folder(tmp, layers=8, hidden=512, heads=8, kv_heads=8, ffn=2048, vocab=200, initializer_range=0.02)
        )
        _made.append(str(export(opened, tmp / "out", even(opened.config, 1), "float32")[0]))
    return _made[0]
