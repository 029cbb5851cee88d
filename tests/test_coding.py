"""Codings: what comes back, how wrong it is, and that no bytes from outside do harm."""

import io
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fedge.core.errors import RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Tensor
from fedge.edge.coding import affine, codings, report
from fedge.edge.coding.codings import decode, encode

EXACT = ["raw", "raw+zlib", "raw+zstd"]
LOSSY = ["f16", "u8", "u8c", "u8@99.9", "u8c@99", "f16+zlib", "u8+zstd", "u8c+zlib", "u8c@99.99+zstd"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=5)
FLOATS = st.floats(-60000, 60000, width=32)


def wanted(array, free=False):
    shape = (-1, *array.shape[1:]) if free and array.ndim else array.shape
    return Tensor("x", array.dtype.name, shape)


def back(array, coding):
    return decode(encode("x", array, coding), wanted(array))


def ramp(*shape):
    return np.linspace(-3, 5, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def photo(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6 % 256, y * 10 % 256, (x + y) * 4 % 256], -1).astype(np.uint8)[None]


@pytest.mark.parametrize("coding", EXACT)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_raw_is_exact_for_every_type_and_rank(coding, data):
    array = data.draw(hnp.arrays(st.sampled_from(sorted(codings.DTYPES)), SHAPES))
    again = decode(encode("x", array, coding), wanted(array, free=True))
    assert again.dtype == array.dtype
    assert again.shape == array.shape
    assert again.tobytes() == array.tobytes()


@pytest.mark.parametrize("coding", ["f16", "f16+zstd"])
@given(array=hnp.arrays(np.float32, SHAPES, elements=FLOATS))
@settings(max_examples=60, deadline=None)
def test_half_precision_is_off_by_half_a_unit_of_its_last_place(coding, array):
    again = back(array, coding)
    assert again.dtype == np.float32
    assert (np.abs(again - array) <= np.maximum(np.abs(array) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("coding", ["u8", "u8c", "u8+zlib", "u8c+zstd"])
@given(array=hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=60, deadline=None)
def test_eight_bits_are_off_by_half_a_step_of_their_range(coding, array):
    again = back(array, coding)
    assert again.shape == array.shape
    if array.size:
        x = array.reshape(1, 1, -1) if coding.startswith(("u8+",)) or coding == "u8" or array.ndim < 2 else array
        spans = np.ptp(x, axis=tuple(i for i in range(x.ndim) if i != 1), keepdims=True).astype(np.float64)
        rounding = 4 * np.spacing(np.abs(x).max()) + float(affine.LEAST)
        assert (np.abs(again.reshape(x.shape) - x.astype(np.float64)) <= spans / 510 + rounding).all()


@pytest.mark.parametrize("coding", [name for name in LOSSY if "@" not in name])  # clipped again, it is another range
@given(array=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=5, max_side=6), elements=FLOATS))
@settings(max_examples=40, deadline=None)
def test_coding_a_second_time_loses_nothing_more(coding, array):
    once = back(array, coding)
    np.testing.assert_allclose(back(once, coding), once, rtol=1e-6, atol=1e-6 * (1 + np.abs(array).max()))


def test_rounding_is_to_the_nearest_and_without_bias():
    array = np.random.default_rng(1).uniform(-1, 1, 100_000).astype(np.float32)
    assert abs(float(np.mean(back(array, "u8") - array))) < 1e-4  # rounding down would give 4e-3


@pytest.mark.parametrize("coding", LOSSY)
@pytest.mark.parametrize("value", [0.0, -7.25, 1e-38])
def test_a_constant_tensor_comes_back_to_the_bit(coding, value):
    array = np.full((2, 3, 4), value, np.float32)
    np.testing.assert_allclose(back(array, coding), array, atol=2**-25, rtol=0)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 4), (1, 1, 70000), (300, 2), (1, 3, 70001), (5, 3, 30000), ()])
@pytest.mark.parametrize("coding", ["u8", "u8c", "u8c@99+zstd"])
def test_every_block_of_a_large_tensor_is_coded(shape, coding):
    array = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    tolerance = 4.0 if "@" in coding else 0.02
    np.testing.assert_allclose(back(array, coding), array, atol=tolerance)
    ends = np.array(back(array, coding)).ravel()[-1:], array.ravel()[-1:]
    np.testing.assert_allclose(*ends, atol=tolerance)


def test_one_range_per_channel_keeps_small_channels():
    array = ramp(1, 2, 50).copy()
    array[:, 1] *= 1000
    assert np.abs(back(array, "u8c") - array)[:, 0].max() < 0.02
    assert np.abs(back(array, "u8") - array)[:, 0].max() > 1


def test_a_percentile_leaves_the_outlier_out():
    array = np.concatenate([np.random.default_rng(3).normal(size=9999), [1e4]]).astype(np.float32)
    assert np.abs(back(array, "u8@99.9") - array)[:-1].mean() < 0.02 < np.abs(back(array, "u8") - array)[:-1].mean()
    assert back(array, "u8@99.9").max() < 10


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("coding", ["f16", "u8", "u8c"])
def test_other_floats_come_back_in_their_own_type(dtype, coding):
    array = ramp(2, 3, 5).astype(dtype)
    assert back(array, coding).dtype == dtype
    np.testing.assert_allclose(back(array, coding), array, atol=0.02)


def test_an_array_that_does_not_lie_in_one_piece_is_coded_all_the_same():
    array = ramp(3, 4, 6).T[::2]
    for coding in ("raw", "raw+zlib", "f16", "u8", "u8c+zstd"):
        np.testing.assert_allclose(back(array, coding), array, atol=0.02)


@pytest.mark.parametrize("coding", [c for c in LOSSY if "@" not in c])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_lossy_codings_refuse_what_is_not_finite_and_raw_keeps_it(coding, bad):
    array = ramp(2, 3).copy()
    array[1, 1] = bad
    with pytest.raises(RefusedTensor, match="NaN"):
        encode("x", array, coding)
    np.testing.assert_array_equal(back(array, "raw"), array)


def test_what_half_precision_or_a_range_cannot_hold_is_refused():
    for coding, value in (("f16", 65520.0), ("u8", 3e38)):
        with pytest.raises(RefusedTensor, match="raw"):
            encode("x", np.array([value, -value], np.float32), coding)
    assert back(np.array([65504, 65519], np.float32), "f16").tolist() == [65504, 65504]


NO_CODINGS = ["", "RAW", "u8@50", "u8@100.1", "u8@1e2", "u8\n", "f16@99", "raw@99", "u8+gzip", "u8c@99.9+zstd+zlib"]
NO_IMAGES = ["jpeg", "jpeg0", "jpeg101", "jpeg9٩", "png+zlib", "png@99"]


@pytest.mark.parametrize("coding", NO_CODINGS + NO_IMAGES)
def test_other_names_are_no_codings(coding):
    with pytest.raises(RefusedTensor, match="No coding is called"):
        codings.check(coding)


def test_a_coding_is_refused_for_a_type_it_does_not_suit():
    for array, coding in (
        (np.zeros(3, np.int64), "u8"),
        (np.zeros(3, bool), "f16"),
        (np.zeros((1, 4, 4, 3), np.float32), "png"),
        (np.zeros((2, 4, 4, 3), np.uint8), "jpeg90"),
        (np.zeros((1, 4, 0, 3), np.uint8), "png"),
        (np.array(["a"]), "raw"),
        (np.zeros(2, complex), "raw"),
    ):
        with pytest.raises(RefusedTensor):
            encode("x", array, coding)


def test_png_is_exact_and_jpeg_is_close_and_smaller():
    image = photo(96, 128)
    np.testing.assert_array_equal(back(image, "png"), image)
    coarse, fine = (np.abs(back(image, name).astype(int) - image).mean() for name in ("jpeg20", "jpeg95"))
    assert fine < coarse < 40
    assert len(encode("x", image, "jpeg20").data) < len(encode("x", image, "jpeg95").data) < image.size


# What comes from outside


@pytest.mark.parametrize("change", [
    {"name": "y"}, {"dtype": "float64"}, {"dtype": "object"}, {"shape": (2, 6)}, {"shape": (2, 3, 1)}, {"shape": ()},
    {"shape": (2, -3)}, {"shape": (2**62, 3)}, {"shape": (0, 3)}, {"data": b""}, {"data": b"1234567"}, {"low": ()},
    {"low": (0.0, 0.0)}, {"high": (float("nan"),)}, {"high": (float("inf"),)}, {"low": (-3e38,), "high": (3e38,)},
    {"low": (2.0,), "high": (1.0,)}, {"coding": "u8c"}, {"coding": "raw"}, {"coding": "u8+zlib"},
    {"coding": "u8+zstd"}, {"coding": "png"}, {"coding": "?" * 1000},
])  # fmt: skip
def test_whatever_does_not_fit_is_refused(change):
    coded = encode("x", ramp(2, 3), "u8")
    tensor = Tensor("x", "float32", (-1, 3))
    assert decode(coded, tensor).shape == (2, 3)
    with pytest.raises(RefusedTensor) as refused:
        decode(replace(coded, **change), tensor)
    assert len(str(refused.value)) < 400


def test_a_truth_value_is_zero_or_one():
    coded = encode("x", np.array([True, False]), "raw")
    with pytest.raises(RefusedTensor, match="truth"):
        decode(replace(coded, data=b"\x01\x02"), Tensor("x", "bool", (2,)))


def test_more_than_the_limit_is_refused_whole_or_packed():
    coded = encode("x", np.zeros((1, 1000), np.float32), "raw+zlib")
    with pytest.raises(RefusedTensor, match="larger than 3999"):
        decode(coded, Tensor("x", "float32", (-1, -1)), EdgeLimits(max_tensor_bytes=3999))
    with pytest.raises(RefusedTensor):
        decode(replace(coded, shape=(0, *[2**25] * 7)), Tensor("x", "float32", (-1,) * 8))
    with pytest.raises(RefusedTensor):
        decode(encode("x", np.zeros((1,) * 9, np.float32), "raw"), Tensor("x", "float32", (1,) * 9))


def zlib_bomb():
    packer, zeros = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(100)) + packer.flush()


def zstd_claim(claimed):
    """A frame that claims so many bytes and holds six."""
    return (
        struct.pack("<IB", 0xFD2FB528, 0xE0)
        + struct.pack("<Q", claimed)
        + struct.pack("<I", 6 << 3 | 1)[:3]
        + b"123456"
    )


@pytest.mark.parametrize("coding", ["u8+zlib", "u8+zstd"])
def test_a_decompression_bomb_costs_nothing(coding):
    bombs = [zlib_bomb()] if "zlib" in coding else [
        zstandard.ZstdCompressor(level=1).compress(bytes(100 << 20)), zstd_claim(10 << 30), zstd_claim(2**64 - 1),
    ]  # fmt: skip
    coded = encode("x", ramp(2, 3), coding)
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(RefusedTensor):
                decode(replace(coded, data=bomb), wanted(ramp(2, 3)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert zstandard.decompress(zstd_claim(6)) == b"123456"


@pytest.mark.parametrize("coding", ["raw+zlib", "raw+zstd"])
def test_bytes_after_or_missing_from_a_compressed_tensor_are_refused(coding):
    coded = encode("x", ramp(2, 3), coding)
    for data in (coded.data + b"x", coded.data[:-1], coded.data[:3], b"", coded.data * 2):
        with pytest.raises(RefusedTensor):
            decode(replace(coded, data=data), wanted(ramp(2, 3)))


def image_file(mode, size, kind):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def huge_png():
    """The header of an image of 30000 x 30000 pixels, more than Pillow's own guard lets pass."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def test_an_image_of_another_size_kind_or_colour_is_refused_before_it_is_decoded():
    png, jpeg = encode("x", photo(), "png"), encode("x", photo(), "jpeg90")
    bad = [image_file("RGB", (24, 40), "PNG"), image_file("L", (40, 24), "PNG"), image_file("RGBA", (40, 24), "PNG"),
           image_file("P", (40, 24), "PNG"), image_file("RGB", (9000, 9000), "PNG"), huge_png(), jpeg.data,
           png.data[:-30], b"", image_file("RGB", (40, 24), "GIF")]  # fmt: skip
    for data in bad:
        with pytest.raises(RefusedTensor):
            decode(replace(png, data=data), wanted(photo()))
    for data in (image_file("CMYK", (40, 24), "JPEG"), image_file("L", (40, 24), "JPEG"), jpeg.data[:200], png.data):
        with pytest.raises(RefusedTensor):
            decode(replace(jpeg, data=data), wanted(photo()))


def test_a_jpeg_of_thousands_of_scans_or_a_file_larger_than_its_pixels_is_refused():
    file = io.BytesIO()
    image = photo(64, 64)
    Image.fromarray(image[0]).save(file, "JPEG", progressive=True)
    honest = replace(encode("x", image, "jpeg90"), data=file.getvalue())
    assert decode(honest, wanted(image)).shape == image.shape
    at = honest.data.rindex(b"\xff\xda")
    scans = honest.data[:at] + honest.data[at:-2] * 40 + honest.data[-2:]
    padded = honest.data + bytes(1 << 17)
    for data in (scans, padded):
        with pytest.raises(RefusedTensor, match="scans"):
            decode(replace(honest, data=data), wanted(image))
    noise = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    assert decode(encode("x", noise, "jpeg100"), wanted(noise)).shape == noise.shape


def mutated(data):
    """Bytes of a real message with some of them changed, or any bytes at all."""
    places = st.lists(st.tuples(st.integers(0, max(0, len(data) - 1)), st.integers(0, 255)), max_size=6)

    def change(edits, end):
        out = bytearray(data)
        for place, value in edits:
            out[place] = value
        return bytes(out[:end])

    return st.binary(max_size=200) | st.builds(change, places, st.integers(len(data) // 2, len(data)))


@pytest.mark.parametrize("coding", [*EXACT, *LOSSY, "png", "jpeg90"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_the_declared_shape_or_are_refused(coding, data):
    array = photo(8, 8) if coding in ("png", "jpeg90") else ramp(2, 3, 4)
    coded = encode("x", array, coding)
    ranges = st.just(coded.low) | st.lists(st.floats(width=32), max_size=4).map(tuple)
    bad = replace(coded, data=data.draw(mutated(coded.data)), low=data.draw(ranges), high=data.draw(ranges))
    try:
        again = decode(bad, wanted(array))
    except RefusedTensor:
        return
    assert again.shape == array.shape
    assert again.dtype == array.dtype


# What it costs


def test_the_message_counts_names_ranges_and_shape_too():
    coded = encode("x", ramp(1, 4, 8), "u8c")
    size = report.message_bytes("cut", [coded])
    assert size == report.message_bytes("cu", [coded]) + 1
    assert size > len(coded.data) + 4 * 2 * 4 + 64  # 4 channels, two float32 each, and the version's digest
    assert report.bits_per_point(32, [(1, 4, 4), (1, 16)]) == 8.0
