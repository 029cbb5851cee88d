"""Figures of split inference are drawn, whatever they are given, and say so where there is nothing to draw."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option, build
from fedge.edge.plan.planner import Bounds
from fedge.edge_figures import draw_plan, draw_rates
from tests.edge_lines import Line, lines

FAST = Option((), (), "input", "jpeg90", 0.0, 0.0, 1.0, bytes=10_000, tail_s=0.01)
LOCAL = Option((), (), None, None, 0.1, 0.1)


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"), dtype=np.int16)


def _has(path: Path, colour: tuple[int, int, int], least: int) -> bool:
    return int((np.abs(_pixels(path) - np.asarray(colour)).max(axis=2) < 8).sum()) >= least


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines(), st.none() | st.builds(Link, st.floats(1, 1e12), st.floats(0, 1)), st.sampled_from([None, 0.01, 0.5]))
def test_any_line_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, line: Line, link: Link | None, deadline_s: float | None
) -> None:
    path = tmp_path_factory.mktemp("figure") / "plan.png"
    draw_plan(path, build(line.bundle, line.device, line.cloud), link, Bounds(deadline_s=deadline_s))
    assert _pixels(path).shape[0] > 500


def test_both_winners_are_drawn_thick_in_their_colours(tmp_path: Path) -> None:
    draw_plan(tmp_path / "plan.png", (LOCAL, FAST), Link(5e6, 0.02), Bounds())
    assert _has(tmp_path / "plan.png", (0x00, 0x72, 0xB2), 4500)  # local, below the switch point
    assert _has(tmp_path / "plan.png", (0xD5, 0x5E, 0x00), 6000)  # the cloud above
    draw_plan(tmp_path / "none.png", (LOCAL, FAST), None, Bounds(deadline_s=1e-6))
    assert not _has(tmp_path / "none.png", (0xD5, 0x5E, 0x00), 3000)  # nobody wins


def test_rates_are_drawn_with_names_as_they_are(tmp_path: Path) -> None:
    lines = {"input $jpeg$": [(16_000, 0.75), (4_000, 0.7)], "b\n1 u8": [(900, 0.5)], "empty": []}
    draw_rates(tmp_path / "rates.png", lines)
    assert _has(tmp_path / "rates.png", (0x00, 0x72, 0xB2), 300)
    assert _has(tmp_path / "rates.png", (0xD5, 0x5E, 0x00), 30)


def test_nothing_to_draw_and_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="measure"):
        draw_plan(tmp_path / "plan.png", (), None, Bounds())
    with pytest.raises(ExperimentError, match="measure"):
        draw_rates(tmp_path / "rates.png", {"none": []})
    with pytest.raises(DataError, match="cannot be written"):
        draw_plan(tmp_path / "no" / "plan.png", (LOCAL,), None, Bounds())
