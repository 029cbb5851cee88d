"""Rate and distortion at the cuts of two real networks: codings, learned bottlenecks, and a prefilter.

A small classifier of CIFAR-10, trained here, and the text detector of PP-OCRv4 on pages, signs and photographs. At
each place the bytes of the real message (one sample, serialized), bits per feature point, the size of what the device
holds more than the head, and the accuracy behind the coding: the share of right classes, or the mean intersection over
union of the detector's text map with the full model's.

CIFAR-10 and the wheels lie in $FEDGE_DATA (~/.cache/fedge-data); what is missing is named and left out. `--quick`
trains less, and leaves the detector out.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy loads

import itertools
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from benchmarks import text_images
from benchmarks.harness import MISSING, Goal, arguments, emit, goal
from fedge.core.params import Array
from fedge.edge.bundle import Tensor
from fedge.edge.coding.codings import decode, encode
from fedge.edge.coding.report import bits_per_point, message_bytes
from fedge.edge.split import bottleneck, inject, prefilter

DATA = Path(os.environ.get("FEDGE_DATA") or Path.home() / ".cache" / "fedge-data")
CODINGS = ("raw", "f16", "u8", "u8c", "u8c@99.9", "u8+zlib", "u8+zstd", "u8c+zstd")
IMAGES = ("raw", "png", "jpeg90", "jpeg50", "jpeg20")
CLASSIFIER, DETECTOR = "CIFAR-10 classifier", "PP-OCRv4 detector"
CUT, MAP = "p2o.Add.43", "sigmoid_0.tmp_0"  # in the detector: 48 channels at a quarter of the size, and the answer
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
TEXT = 0.3  # of the map, from which the detector takes a pixel for text


@dataclass(frozen=True)
class Row:
    """One place and coding. `encoder_bits` are those of parameters that the bottleneck adds to the device."""

    network: str
    place: str
    coding: str
    bytes: float
    bits_per_point: float
    accuracy: float
    encoder_bits: int = 0


def coded(place: str, samples: Array, coding: str) -> tuple[Array, float, float]:
    """The samples [n, ...] as they arrive, each sent by itself; mean bytes and bits per point of the messages."""
    tensor = Tensor(place, samples.dtype.name, (1, *samples.shape[1:]))
    sent = [encode(place, samples[row : row + 1], coding) for row in range(len(samples))]
    size = fmean(message_bytes(place, [one]) for one in sent)
    return np.concatenate([decode(one, tensor) for one in sent]), size, bits_per_point(size, [samples[0].shape])


def rows(
    network: str,
    place: str,
    samples: Array,
    codings: Iterable[str],
    judge: Callable[[Array], float],
    encoder_bits: int = 0,
) -> list[Row]:
    """One row per coding of the samples at a place; `judge` gives the accuracy of what arrives."""
    found = []
    for coding in codings:
        back, size, bpp = coded(place, samples, coding)
        found.append(Row(network, place, coding, round(size, 1), round(bpp, 3), round(judge(back), 4), encoder_bits))
    return found


# The classifier


def stages() -> list[nn.Sequential]:
    """Four stages of a small network for 32 x 32 pixels: three halve the picture, the last one is the classifier."""
    widths = (3, 32, 64, 128)
    made = [
        nn.Sequential(nn.Conv2d(low, high, 3, padding=1), nn.ReLU(), nn.Conv2d(high, high, 3, 2, padding=1), nn.ReLU())
        for low, high in itertools.pairwise(widths)
    ]
    return [*made, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))]


def floats(pictures: Array) -> torch.Tensor:
    """uint8 [n, H, W, 3] as the networks take it."""
    return torch.from_numpy(((pictures.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2).copy())


def train(parts: Sequence[nn.Module], pictures: Array, labels: Array, steps: int) -> None:
    """Fit the classifier; deterministic."""
    network, random = nn.Sequential(*parts), np.random.default_rng(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        picked = random.integers(0, len(pictures), 64)
        loss = nn.functional.cross_entropy(network(floats(pictures[picked])), torch.from_numpy(labels[picked]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval().requires_grad_(requires_grad=False)


def classifier(*, quick: bool) -> list[Row]:
    """All codings at every cut of the classifier, its input, and bottlenecks trained by GHND at the first cut."""
    with np.load(DATA / "cifar10.npz") as data:
        pictures, labels = data["x_train"][:20_000], data["y_train"][:20_000]
        tests, truth = data["x_test"][: 200 if quick else 1000], data["y_test"][: 200 if quick else 1000]
    torch.manual_seed(0)
    parts = stages()
    train(parts, pictures, labels, 150 if quick else 1500)

    def right(tail: Sequence[nn.Module]) -> Callable[[Array], float]:
        network = nn.Sequential(*tail)
        return lambda x: float((network(torch.from_numpy(np.array(x))).argmax(1).numpy() == truth).mean())

    found = rows(CLASSIFIER, "input", tests, IMAGES, lambda x: right(parts)(floats(x).numpy()))
    boundaries = [floats(tests)]
    for index, part in enumerate(parts[:-1]):
        boundaries.append(part(boundaries[-1]))
        found += rows(CLASSIFIER, f"cut {index + 1}", boundaries[-1].numpy(), CODINGS, right(parts[index + 1 :]))
    for channels in (3, 12) if quick else (3, 6, 12):
        few = floats(pictures[: 500 if quick else 4000])
        encoder, decoder = bottleneck.train_bottleneck(
            few.numpy(),
            parts[0](few).numpy(),
            channels,
            stride=2,
            later=parts[1:-1],
            steps=60 if quick else 600,
            batch=32,
        )
        tail = [decoder.requires_grad_(requires_grad=False), *parts[1:]]
        code = encoder.requires_grad_(requires_grad=False)(boundaries[0]).numpy()
        place = f"bottleneck of {channels}"  # in the place of stage 1
        found += rows(CLASSIFIER, place, code, ("u8", "u8+zstd"), right(tail), inject.bits(encoder))
    return found


# The detector


def member(pattern: str, ending: str) -> bytes:
    """A file out of a wheel in the cache. Raises FileNotFoundError."""
    with zipfile.ZipFile(wheel(pattern)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))


def wheel(pattern: str) -> Path:
    """The newest wheel in the cache with this name. Raises FileNotFoundError."""
    found = sorted((DATA / "wheels").glob(f"{pattern}-*.whl"))
    if not found:
        raise FileNotFoundError(f"{pattern} is not in {DATA / 'wheels'}; `pip download --no-deps {pattern}` there.")
    return found[-1]


class Parts:
    """A model whose inner tensors can be asked for and, by name, be fed in the place of what it computes."""

    def __init__(self, model: onnx.ModelProto, starts: Sequence[str], ends: Sequence[str]) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        inferred = onnx.shape_inference.infer_shapes(copy)
        kinds = {value.name: value for value in [*inferred.graph.value_info, *inferred.graph.input]}
        inner = onnx.utils.Extractor(inferred) if starts else None
        made = inner.extract_model(list(starts), list(ends)) if inner else copy
        have = {value.name for value in made.graph.output}
        made.graph.output.extend(kinds.get(name) or onnx.ValueInfoProto(name=name) for name in ends if name not in have)
        self._ends, self._input = list(ends), made.graph.input[0].name
        self._session = ort.InferenceSession(made.SerializeToString())

    def __call__(self, samples: Array) -> list[Array]:
        """The outputs for samples [n, ...], computed one by one."""
        found = [self._session.run(self._ends, {self._input: samples[row : row + 1]}) for row in range(len(samples))]
        return [np.concatenate(each) for each in zip(*found)]


def overlap(found: Array, full: Array) -> float:
    """Mean intersection over union of text maps, of the images where either has text."""
    one, other = found > TEXT, full > TEXT
    both, either = (one & other).sum((1, 2, 3)), (one | other).sum((1, 2, 3))
    return float((both[either > 0] / either[either > 0]).mean())


def detector(counts: tuple[int, int, int] = (160, 240, 120), steps: int = 1000) -> tuple[list[Row], dict[str, Any]]:
    """JPEG of the input, codings at a cut, bottlenecks there by HND, and the prefilter; (train, held-out, test) images.

    Raises FileNotFoundError where a wheel is missing.
    """
    model = onnx.load_from_string(member("rapidocr_onnxruntime", "det_infer.onnx"))
    photos = [text_images.photographs(wheel("scikit_image"), test=test) for test in (False, False, True)]
    drawn = [text_images.images(own, count, 320, seed) for seed, (own, count) in enumerate(zip(photos, counts))]
    (_, train_text), (_, held_text), (tests, has_text) = drawn
    head, tail = Parts(model, (), (CUT, MAP)), Parts(model, (CUT,), (MAP,))
    (features, _), (held, _), (cut, full) = (head(floats(pictures).numpy()[:, ::-1].copy()) for pictures, _ in drawn)
    texts = has_text == 1

    def agree(run: Parts) -> Callable[[Array], float]:
        return lambda x: overlap(run(x)[-1], full[texts])

    found = rows(
        DETECTOR, "input", tests[texts], IMAGES, lambda x: agree(head)(floats(x).numpy()[:, ::-1].copy())
    )  # blue comes first
    found += rows(DETECTOR, "cut", cut[texts], ("f16", "u8", "u8c", "u8c+zstd"), agree(tail))
    for channels in (3, 6, 12):
        networks = bottleneck.train_bottleneck(features, features, channels, stride=2, crop=24, steps=steps, batch=8)
        injected = inject.bottleneck(model, CUT, CUT, *networks)
        code = Parts(injected, (), ("bottleneck", MAP))(floats(tests[texts]).numpy()[:, ::-1].copy())[0]
        after = Parts(injected, ("bottleneck",), (MAP,))
        place = f"bottleneck of {channels}"  # after the cut
        found += rows(DETECTOR, place, code, ("u8", "u8c+zstd"), agree(after), inject.bits(networks[0]))
    network = prefilter.train_prefilter(features, train_text)
    threshold = prefilter.threshold_for(prefilter.scores(network, held), held_text, 0.99)
    sent = prefilter.scores(network, cut) >= threshold
    return found, {
        "threshold": round(threshold, 4),
        "recall": round(float(sent[texts].mean()), 4),
        "spared": round(float(1 - sent[~texts].mean()), 4),
        "bits": inject.bits(network),
        "images_with_text": int(texts.sum()),
    }


def judged(found: Sequence[Row], filtered: dict[str, Any] | None) -> list[Goal]:
    """u8c costs next to nothing, a bottleneck is smaller than the image, the filter keeps the recall."""

    def pick(network: str, coding: str, place: str = "") -> list[Row]:
        return [row for row in found if row.network == network and row.coding == coding and row.place.startswith(place)]

    loss = [raw.accuracy - own.accuracy for raw, own in zip(pick(CLASSIFIER, "raw", "cut"), pick(CLASSIFIER, "u8c"))]
    goals = [goal("accuracy lost by u8c at the worst cut of the classifier", max(loss, default=None), "<= 0.01")]
    if filtered:
        image = pick(DETECTOR, "jpeg90")[0].bytes
        code = pick(DETECTOR, "u8", "bottleneck of 6")[0].bytes
        goals += [
            goal("bytes of the detector's bottleneck of 6 over JPEG-90", code / image, "< 1"),
            goal("recall of the prefilter on fresh images", filtered["recall"], ">= 0.99"),
        ]
    return goals


def draw(found: Sequence[Row], path: Path) -> None:
    """Accuracy against bytes, one line per place; the second network's figure lies beside the first's."""
    from fedge.edge_figures import draw_rates

    for network, ending in ((CLASSIFIER, ""), (DETECTOR, "-detector")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in found:
            if row.network == network:
                lines.setdefault(row.place, []).append((row.bytes, row.accuracy))
        if lines:
            draw_rates(path.with_stem(path.stem + ending), lines)


def main() -> None:
    options = arguments(
        str(__doc__).splitlines()[0], figure="a PNG to write, accuracy against bytes (and NAME-detector.png)"
    )
    torch.set_num_threads(1)
    found: list[Row] = []
    notes: dict[str, Any] = {}
    if (DATA / "cifar10.npz").exists():
        found = classifier(quick=options.quick)
    else:
        notes["cifar10"] = MISSING
    if not options.quick:
        try:
            more, notes["prefilter"] = detector()
            found += more
        except FileNotFoundError as error:
            notes["detector"] = f"{MISSING}: {error}"
    if options.figure and found:
        draw(found, Path(options.figure))
    goals = judged(found, notes.get("prefilter"))
    emit("feature_coding", [asdict(row) for row in found], goals, as_json=options.json, notes=notes)
    if not options.json:
        print(notes)


if __name__ == "__main__":
    main()
