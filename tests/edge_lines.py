"""Random cut models with profiles and exit statistics, for the tests of the planner. No files, no sessions."""

from dataclasses import dataclass

from hypothesis import strategies as st

from fedge.edge.bundle import INPUT, OUTPUT, Boundary, Bundle, Exit, Sent, Tensor
from fedge.edge.plan.profile import CodingCost, Profile, coding_key, piece_key

SAMPLES = 40  # samples of the held-out data
VERSION = "0" * 64
_SECONDS = st.floats(1e-4, 0.3)


@dataclass(frozen=True)
class Line:
    """A model, what was measured of it, and where each held-out sample leaves."""

    bundle: Bundle
    device: Profile
    cloud: Profile
    leaves: tuple[str | None, ...]  # per sample the exit that would answer it
    right: tuple[tuple[bool, bool], ...]  # per sample: whether that exit, and the whole model, are right


def bundle_of(middle: int, exits: list[Exit], codings: dict[str, dict[str, Sent]]) -> Bundle:
    names = [INPUT, *(f"b{index}" for index in range(middle)), OUTPUT]
    boundaries = tuple(
        Boundary(name, (Tensor(f"t_{name}", "float32", (-1, 5 + index)),), index) for index, name in enumerate(names)
    )
    return Bundle(1, VERSION, "line", boundaries, (), {}, tuple(exits), codings=codings)


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """A line of up to four inner boundaries with up to three exits, every coding and tail measured."""
    middle = draw(st.integers(1, 4))
    inner = [f"b{index}" for index in range(middle)]
    places = draw(st.lists(st.sampled_from(inner), max_size=3))
    exits = [(f"e{index}", place) for index, place in enumerate(places)]
    leaves = tuple(
        draw(st.lists(st.sampled_from([None, *(name for name, _ in exits)]), min_size=SAMPLES, max_size=SAMPLES))
    )
    right = tuple((draw(st.booleans()), draw(st.booleans())) for _ in range(SAMPLES))
    whole = sum(final for _, final in right) / SAMPLES
    codings = {INPUT: {"raw": Sent(whole)}, **{name: {"u8": Sent(whole)} for name in inner}}
    bundle = bundle_of(middle, [_exit(name, place, leaves, right) for name, place in exits], codings)
    names = [boundary.name for boundary in bundle.boundaries]
    pairs = [(start, end) for index, start in enumerate(names) for end in names[index + 1 :]]
    device = {piece_key(*pair): draw(_SECONDS) for pair in pairs}
    costs = {
        coding_key(name, "u8"): CodingCost(draw(_SECONDS), draw(_SECONDS), draw(st.integers(1, 10**6)))
        for name in inner
    }
    return Line(
        bundle,
        Profile("device", VERSION, 1, pieces=device, codings=costs, memory_bytes=dict.fromkeys(device, 100)),
        Profile("cloud", VERSION, 1, pieces={piece_key(name, OUTPUT): draw(_SECONDS) for name in names[:-1]}),
        leaves,
        right,
    )


def _exit(name: str, place: str, leaves: tuple[str | None, ...], right: tuple[tuple[bool, bool], ...]) -> Exit:
    here = [each for leave, each in zip(leaves, right) if leave == name]
    early, final = (sum(each[side] for each in here) / max(1, len(here)) for side in (0, 1))
    logits = Tensor(f"logits_{name}", "float32", (-1, 10))
    return Exit(name, place, logits, threshold=0.5, share=len(here) / SAMPLES, accuracy=early, final_accuracy=final)
