"""A learned bottleneck: few channels at a cut, trained so that the rest of the model, frozen, does not notice.

An encoder of two convolutions stands in for the last stage before a cut (or follows it), a decoder for the way back.
Head network distillation (HND; Matsubara et al., "Distilled Split Deep Neural Networks for Edge-Assisted Real-Time
Systems", HotEdgeVideo 2019) teaches them to reproduce the original model's features at the cut; the generalised form
(GHND; Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
Challenged Networks", ICPR 2020) also those at boundaries behind it, where errors that matter show. Here the squared
errors of each boundary are divided by its variance, so that no boundary outweighs the others by its scale alone.

Training sees the 8-bit coding: values are rounded forward, gradients pass as if they were not. No labels are needed.
Owns training; `fedge.edge.split.inject` puts the result into the graph. Runs in the cloud, never on a device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedge.core.errors import DataError
from fedge.core.params import Array

LEVELS = 255
WIDTH = 48  # channels between the convolutions


def train_bottleneck(
    features_in: Array,
    features_out: Array,
    channels: int,
    *,
    stride: int = 1,
    later: Sequence[nn.Module] = (),
    steps: int = 1000,
    batch: int = 16,
    crop: int | None = None,
    rate: float = 3e-3,
    width: int = WIDTH,
    seed: int = 0,
) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder with decoder(encoder(features_in)) close to features_out, by (G)HND.

    Features are float32 [n, C, H, W], collected from the frozen model on the same images; H and W of `features_in` are
    a whole multiple of those of `features_out`. The code has `channels` and is `stride` times smaller than
    `features_out`. `later` are the model's next stages, differentiable: each one's output is compared too (GHND);
    without them it is HND. `crop` trains on random squares of so many points of `features_out` instead of whole maps,
    which is cheaper and does for convolutions. Raises DataError on features that do not fit each other.
    """
    ratio = _check(features_in, features_out, channels, stride)
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder, decoder = networks(features_in.shape[1], features_out.shape[1], channels, ratio, stride, width)
    spread_in = _spread(features_in)[0]
    spread, mean = _spread(features_out)
    stages = [stage.eval().requires_grad_(requires_grad=False) for stage in later]
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        x, y = _draw(random, features_in, features_out, batch, (crop or max(features_out.shape[2:])) // stride, stride)
        loss = distance(decoder(rounded(encoder(x / spread_in))) * spread + mean, y, stages, spread)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    _fold(encoder[0], decoder[-1], spread_in, spread, mean)
    return encoder.eval(), decoder.eval()


def networks(
    inputs: int, outputs: int, channels: int, ratio: int, stride: int, width: int = WIDTH
) -> tuple[nn.Sequential, nn.Sequential]:
    """An untrained encoder, `ratio` * `stride` times smaller in each direction, and its decoder, `stride` times up."""
    encoder = nn.Sequential(_down(inputs, width, ratio), nn.ReLU(), _down(width, channels, stride))
    middle = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    size, padding = _window(stride)  # the way down, backwards
    return encoder, nn.Sequential(*middle, nn.ConvTranspose2d(width, outputs, size, stride, padding))


def rounded(code: Tensor) -> Tensor:
    """The code as the 8-bit coding brings it back, one range per sample; the gradient passes unchanged.

    The straight-through estimator of Bengio et al. (2013).
    """
    low, high = code.detach().amin((1, 2, 3), keepdim=True), code.detach().amax((1, 2, 3), keepdim=True)
    step = (high - low).clamp_min(1e-12) / LEVELS
    return code + (torch.round((code.detach() - low) / step) * step + low - code.detach())


def distance(student: Tensor, teacher: Tensor, later: Sequence[nn.Module], spread: Tensor) -> Tensor:
    """Mean squared error at the cut, in units of its channels' spread, plus that behind each later stage."""
    loss = functional.mse_loss(student / spread, teacher / spread)
    for stage in later:
        student, teacher = stage(student), stage(teacher)
        rest = [axis for axis in range(teacher.ndim) if axis != 1]
        loss = loss + functional.mse_loss(student, teacher) / teacher.var(rest, correction=0).mean().clamp_min(1e-12)
    return loss


def _down(inputs: int, outputs: int, factor: int) -> nn.Conv2d:
    """A convolution that divides height and width by `factor` exactly."""
    size, padding = _window(factor)
    return nn.Conv2d(inputs, outputs, size, factor, padding)


def _window(factor: int) -> tuple[int, int]:
    """Kernel size and padding: windows of three points, or of about two steps, with which sizes divide exactly."""
    return (3, 1) if factor == 1 else (2 * factor - factor % 2, factor // 2)


def _spread(features: Array) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of each channel, [C, 1, 1] each; a dead channel has the spread 1."""
    deviation, mean = features.std(axis=(0, 2, 3)), features.mean(axis=(0, 2, 3))
    deviation = np.where(deviation > 1e-6 * max(1.0, np.abs(mean).max()), deviation, 1.0)
    to = [torch.from_numpy(each.astype(np.float32)).reshape(-1, 1, 1) for each in (deviation, mean)]
    return to[0], to[1]


def _fold(first: nn.Module, last: nn.Module, spread_in: Tensor, spread: Tensor, mean: Tensor) -> None:
    """Put the scales that training used around the networks into their outermost convolutions."""
    with torch.no_grad():
        weight, bias = last.get_parameter("weight"), last.get_parameter("bias")
        first.get_parameter("weight").div_(spread_in)
        weight.mul_(spread)  # [in, out, height, width]
        bias.copy_(bias * spread.flatten() + mean.flatten())


def _draw(
    random: np.random.Generator, features_in: Array, features_out: Array, batch: int, extent: int, stride: int
) -> tuple[Tensor, Tensor]:
    """A batch of pairs: of each image the square of `extent` points of the code, somewhere, or all where it is less."""
    ratio = features_in.shape[2] // features_out.shape[2]
    pairs = []
    for row in random.choice(len(features_in), min(batch, len(features_in)), replace=False):
        places = [int(random.integers(0, max(0, size // stride - extent) + 1)) for size in features_out.shape[2:]]
        pair = []
        for features, points in ((features_in, stride * ratio), (features_out, stride)):
            rows, columns = (slice(place * points, (place + extent) * points) for place in places)
            pair.append(features[row, :, rows, columns])
        pairs.append(pair)
    x, y = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
    return x, y


def _check(features_in: Array, features_out: Array, channels: int, stride: int) -> int:
    """How many times smaller the features leave the stage than they enter it. Raises DataError."""
    if not features_in.ndim == features_out.ndim == 4 or not 0 < len(features_in) == len(features_out):
        raise DataError("A bottleneck learns from pairs of features [n, channels, height, width]; give both, of one n.")
    if not features_in.dtype == features_out.dtype == np.float32:
        raise DataError("A bottleneck learns from float32 features; convert them first.")
    (high, wide), (less_high, less_wide) = features_in.shape[2:], features_out.shape[2:]
    ratio = int(high // less_high)
    if ratio < 1 or (high, wide) != (ratio * less_high, ratio * less_wide) or less_high % stride or less_wide % stride:
        raise DataError("Height and width must divide exactly from stage to code; take another stride or image size.")
    if channels < 1 or not np.isfinite(features_in).all() or not np.isfinite(features_out).all():
        raise DataError("A bottleneck needs at least one channel and finite features; check the model that made them.")
    return ratio
