"""Groups of ranks against transformers in float32: every family, prompts in chunks, then one token at a time."""

from pathlib import Path

import numpy as np
import pytest

from fedge.edge.llm.shards.shares import Share
from tests.llm_ranks import chunks, difference, group
from tests.test_llm_oracle import CASES, build, theirs

pytestmark = pytest.mark.slow  # the import of transformers alone

IDS = np.random.default_rng(9).integers(0, 128, 40)
SHARES = {
    "1": (Share((0, 2), (0, 96)),),
    "2": (Share((0, 1), (0, 32)), Share((1, 2), (32, 96))),
    "3": (Share((0, 0), (0, 64)), Share((0, 1), (64, 64)), Share((1, 2), (64, 96))),
    "4": (Share((0, 1), (0, 32)), Share((1, 1), (32, 32)), Share((1, 1), (32, 64)), Share((1, 2), (64, 96))),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_ranks_compute_what_transformers_does(case: str, tmp_path: Path) -> None:
    model = build(*CASES[case])
    model.save_pretrained(tmp_path)
    wanted = theirs(model, IDS)
    for ranks, shares in SHARES.items():
        with group(tmp_path, tmp_path / ranks, shares) as (lead, _):
            for sizes in ([40], [11, 3, 1, 17, 1, 1, 1, 5], [30, *[1] * 10]):
                got = chunks(lead, IDS.tolist(), sizes)
                assert difference(got, wanted) < 1e-4, (ranks, sizes)
                assert np.array_equal(got.argmax(1), wanted.argmax(1))
