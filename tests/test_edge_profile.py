"""A profile survives its file, and what is no profile is refused."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import DataError
from fedge.edge.plan import profile
from fedge.edge.plan.profile import CodingCost, Profile

FIGURE = st.floats(0, 1e9)
PROFILES = st.builds(
    Profile,
    device=st.text(max_size=5),
    version=st.text(max_size=5),
    threads=st.integers(1, 64),
    operators=st.lists(st.tuples(st.text(max_size=5), FIGURE), max_size=3).map(tuple),
    pieces=st.dictionaries(st.text(max_size=5), FIGURE, max_size=3),
    codings=st.dictionaries(st.text(max_size=5), st.builds(CodingCost, FIGURE, FIGURE, FIGURE), max_size=3),
    memory_bytes=st.dictionaries(st.text(max_size=5), st.integers(0, 1 << 62), max_size=3),
)


@given(PROFILES)
def test_a_profile_survives_its_file(tmp_path_factory: pytest.TempPathFactory, written: Profile) -> None:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    profile.save(path, written)
    assert profile.load(path) == written


HEAD = b'{"device":"d","version":"v","threads":1'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 10_000,
        b"{}",
        HEAD + b',"more":1}',
        HEAD + b',"pieces":{"a..b":-1.0}}',
        HEAD + b',"pieces":{"a..b":1e999}}',
        HEAD + b',"pieces":{"a..b":1e308}}',
        HEAD + b',"codings":{"a u8":{"encode_s":0,"decode_s":0,"bytes":1e308}}}',
        HEAD + b',"pieces":{"a..b":NaN}}',
        HEAD + b',"memory_bytes":{"a..b":' + b"9" * 400 + b"}}",
        HEAD + b',"operators":[["a",-1]]}',
        HEAD + b',"codings":{"a u8":{"encode_s":0,"decode_s":-1,"bytes":1}}}',
        HEAD.replace(b"1", b"0") + b"}",
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match="measure"):
        profile.load(path)


@pytest.mark.parametrize("figure", [-1.0, math.nan, math.inf, 1e308])
def test_a_profile_with_impossible_figures_is_not_written(tmp_path: Path, figure: float) -> None:
    with pytest.raises(DataError, match="measure"):
        profile.save(tmp_path / "p", Profile("d", "v", 1, operators=(("a", figure), ("a", 1.0))))
    assert not (tmp_path / "p").exists()
    for act in (lambda: profile.load(tmp_path / "no"), lambda: profile.save(tmp_path, Profile("d", "v", 1))):
        with pytest.raises(DataError, match="name"):
            act()
