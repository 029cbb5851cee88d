"""A plan for a bundle, or for an ONNX file that is not cut yet, out of profiles or of measurements here."""

import functools
import tempfile
from pathlib import Path

import msgspec

from fedge import edge_inputs
from fedge.core.errors import ExperimentError
from fedge.edge import bundle as bundles
from fedge.edge.bundle import Bundle
from fedge.edge.plan import options, planner, profile
from fedge.edge.plan.link import Link
from fedge.edge.plan.planner import Bounds, Plan
from fedge.edge.plan.profile import CodingCost, Profile


def of(model: Path, device: Path | None, cloud: Path | None, slower: float, link: Link, bounds: Bounds) -> Plan:
    """The plan for the bundle or ONNX file `model` on this link; a missing profile is measured here.

    The device is `slower` times slower than its profile. Raises the errors of loading, measuring and planning.
    """
    if not 0 < slower <= 1e9:
        raise ExperimentError(f"--slower {slower}: give a factor above 0 and 1e9 at most.")
    if model.is_dir():
        return _planned(model, bundles.load(model), device, cloud, slower, link, bounds)
    edge_inputs.needs("onnx", "export")
    from fedge.edge.assess import offer, suited
    from fedge.edge.split.export import export

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export(model, path)
        return _planned(path, offer(path, suited), device, cloud, slower, link, bounds)


def measured(folder: Path, sample: Path | None, threads: int) -> Profile:
    """What this machine needs for the bundle, on the input in the file `sample` or on noise. Raises as they do."""
    from fedge.edge.runtime.measure import profile_bundle

    bundle = bundles.load(folder)
    inputs = None
    if sample:
        _, array = next(edge_inputs.read(sample, bundle))
        inputs = {bundle.boundary(bundles.INPUT).tensors[0].name: array}
    return profile_bundle(folder, bundle, threads=threads, inputs=inputs)


def _planned(
    path: Path, bundle: Bundle, device: Path | None, cloud: Path | None, slower: float, link: Link, bounds: Bounds
) -> Plan:
    @functools.cache
    def here() -> Profile:
        from fedge.edge.runtime.measure import profile_bundle

        return profile_bundle(path, bundle)

    def at(known: Path | None) -> Profile:
        return profile.load(known) if known else here()

    own = at(device)
    planner.check_memory(own, bounds)
    found = options.build(bundle, _slowed(own, slower), at(cloud))
    if bounds.accuracy is not None and all(option.accuracy is None for option in found):
        raise ExperimentError("No accuracy of this model is known; export it with --data, or leave out --accuracy.")
    return planner.plan(found, link, bounds)


def _slowed(known: Profile, factor: float) -> Profile:
    codings = {
        key: CodingCost(factor * cost.encode_s, factor * cost.decode_s, cost.bytes)
        for key, cost in known.codings.items()
    }
    pieces = {key: factor * seconds for key, seconds in known.pieces.items()}
    return msgspec.structs.replace(known, pieces=pieces, codings=codings)
