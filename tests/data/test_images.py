"""Decoding is Pillow's bit for bit; crops and filters are the published definitions."""

import hashlib
import io
import math
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from densejax.data import images
from tests import photos


def philox(seed):
    return np.random.Philox(key=[seed, 0])


def pillow(encoded):
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def weights(source, target, antialias):
    """The matrix [target, source] of a bilinear filter between pixel centres."""
    scale = source / target
    support = max(scale, 1.0) if antialias else 1.0
    centres = np.clip((np.arange(target) + 0.5) * scale, 0.5, source - 0.5)
    if antialias:
        centres = (np.arange(target) + 0.5) * scale
    distances = np.abs(np.arange(source) + 0.5 - centres[:, None]) / support
    matrix = np.maximum(0.0, 1 - distances)
    return matrix / matrix.sum(1, keepdims=True)


def resized(image, height, width, antialias):
    rows = weights(image.shape[0], height, antialias)
    columns = weights(image.shape[1], width, antialias)
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)


JPEGS = {
    "4:2:0": photos.encode(photos.photo(101, 67), subsampling=2),
    "4:4:4": photos.encode(photos.photo(64, 80), subsampling=0),
} | photos.odd()


@pytest.mark.parametrize("name", JPEGS)
def test_every_kind_is_decoded_as_pillow_does(name):
    found = images.decode(JPEGS[name])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pillow(JPEGS[name]))


@pytest.mark.parametrize(("least", "factor"), [(200, 1), (101, 1), (100, 2), (76, 2), (50, 4)])
def test_large_jpegs_are_decoded_smaller_by_the_transform_itself(least, factor):
    encoded = photos.encode(photos.photo(300, 200))
    found = images.decode(encoded, least, least)
    assert found.shape == (200 // factor, 300 // factor, 3)
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (300 // factor, 200 // factor))
        np.testing.assert_array_equal(found, np.asarray(image))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
@pytest.mark.parametrize("name", JPEGS)
def test_a_truncated_image_is_no_image(name, share):
    with pytest.raises(Exception, match="(?i)truncated|cannot identify|broken"):
        images.decode(JPEGS[name][: int(share * len(JPEGS[name]))])


def boxes(height, width, min_area, number=4000):
    return np.array(
        [images.crop_box(height, width, min_area, philox(seed)) for seed in range(number)]
    )


def published_boxes(height, width, min_area, number=4000):
    """torchvision's RandomResizedCrop as its documentation and code say, in NumPy."""
    random, found = np.random.default_rng(1), []
    for _ in range(number):
        for _ in range(10):
            area = height * width * random.uniform(min_area, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = random.integers(height - h + 1), random.integers(width - w + 1)
                found.append((top, left, h, w))
                break
    return np.array(found)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 300), (256, 256)])
def test_random_crops_are_distributed_as_published(height, width):
    found, expected = boxes(height, width, 0.08), published_boxes(height, width, 0.08)
    top, left, h, w = found.T
    assert top.min() >= 0 and left.min() >= 0 and min(h.min(), w.min()) > 0
    assert (top + h).max() == height and (left + w).max() == width
    for column in range(4):
        assert scipy.stats.ks_2samp(found[:, column], expected[:, column]).pvalue > 1e-3
    areas = [(box[:, 2] * box[:, 3]) / (height * width) for box in (found, expected)]
    assert scipy.stats.ks_2samp(*areas).pvalue > 1e-3 and areas[0].min() < 0.09


def test_crops_of_the_whole_area_are_whole_where_that_is_possible():
    assert images.crop_box(100, 100, 1.0, philox(0))[2:] != (0, 0)
    assert (boxes(100, 100, 0.9, 200)[:, 2:].prod(1) > 0.88 * 100**2).all()


@pytest.mark.parametrize(
    ("height", "width", "box"), [(30, 1000, (0, 480, 30, 40)), (1000, 30, (480, 0, 40, 30))]
)
def test_no_crop_that_fits_leaves_the_largest_middle(height, width, box):
    # A tenth of these images at any allowed aspect ratio is taller or wider than they are.
    assert images.crop_box(height, width, 0.5, philox(0)) == box


@pytest.mark.parametrize(("width", "height", "size"), [(300, 200, 64), (90, 110, 224), (33, 20, 8)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_training_crop_is_bilinear_between_the_four_nearest_pixels(width, height, size, kind):
    encoded = photos.encode(photos.photo(width, height), kind)
    for seed in range(20):
        top, left, h, w = images.crop_box(height, width, 0.3, philox(seed))
        if kind == "JPEG" and min(h, w) >= 2 * size:
            continue  # decoded smaller
        found = images.training_crop(encoded, size, philox(seed), min_area=0.3)
        crop = pillow(encoded)[top : top + h, left : left + w]
        expected = resized(crop, size, size, antialias=False)
        assert found.shape == (size, size, 3) and found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 1.0


def test_a_training_crop_of_a_large_jpeg_is_of_the_same_place():
    y, x = np.mgrid[:427, :640]
    places = np.stack([255 * (x + 0.5) / 640, 255 * (y + 0.5) / 427, 128 + 0 * x], -1)
    encoded = photos.encode(Image.fromarray(places.round().astype(np.uint8)), quality=95)
    shapes = set()
    for seed in range(20):
        top, left, h, w = images.crop_box(427, 640, 0.1, philox(seed))
        shapes.add(images.decode(encoded, math.ceil(427 * 32 / h), math.ceil(640 * 32 / w)).shape)
        found = images.training_crop(encoded, 32, philox(seed), min_area=0.1)
        ramp = (np.arange(32) + 0.5) / 32  # to half a pixel of an eighth: 4 of 427
        np.testing.assert_allclose(found[..., 0].mean(0), 255 * (left + ramp * w) / 640, atol=3)
        np.testing.assert_allclose(found[..., 1].mean(1), 255 * (top + ramp * h) / 427, atol=3)
    assert len(shapes) == 2  # a quarter and an eighth


@pytest.mark.parametrize(("width", "height"), [(100, 67), (67, 100), (80, 80), (40, 21), (57, 50)])
@pytest.mark.parametrize("size", [48, 33])
def test_the_evaluation_crop_is_the_middle_after_an_antialiased_resize(width, height, size):
    encoded = photos.encode(photos.photo(width, height))
    found = images.evaluation_crop(encoded, size, resize=48)
    short = 48 / min(width, height)
    whole_width = 48 if width <= height else math.floor(width * short + 1e-9)
    whole_height = 48 if height <= width else math.floor(height * short + 1e-9)
    whole = resized(pillow(encoded), whole_height, whole_width, antialias=True)
    top, left = (whole_height - size) / 2, (whole_width - size) / 2
    # Half a pixel is rounded to even, as Python's round does.
    top, left = round(top), round(left)
    expected = whole[top : top + size, left : left + size]
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 1.01


# SHA-256 of the pixels that torchvision 0.29.1 with Pillow makes of the image below by
# Compose([Resize(resize), CenterCrop(size)]): (width, height, resize, size).
TORCHVISION = {
    (500, 375, 256, 224): "04fd574f1ab2c78c305ac7fe2e9e9abd6c05d832420ebab400becb1b24974744",
    (375, 500, 256, 224): "ecde73bd320051a97fd9fa66591cdda67533a6309d4de01b1d28dcf33880c425",
    (333, 500, 256, 224): "a6e6652ebd939e24209a4bd66859d3e52888dfb3b2bed3490008fb3fd18cc741",
    (300, 300, 256, 224): "96b43d2b037bdf8c7bf085dfe5beef1cd00a743ce516c0691c5ea817da5d20e6",
    (97, 131, 256, 224): "68f851f49c9b626faae5314a5fff1b37e388740437b8e71a20cb3157481e6610",
    (1000, 701, 232, 224): "b99995b6c11a3efa85f9ec59703c01453283cd121828c2f41188b6a6c32f6ee8",
    (341, 256, 256, 224): "b5666706bd7fdcb9f14381fc0712fe42e50ed38865c11f400a3eda183a6a9529",
}


@pytest.mark.parametrize("case", TORCHVISION)
def test_the_evaluation_crop_is_torchvisions_bit_for_bit(case):
    width, height, resize, size = case
    y, x, c = np.mgrid[:height, :width, :3]
    pattern = ((x * x * 3 + y * y * 5 + x * y * 7 + c * 85) // 16 % 256).astype(np.uint8)
    encoded = photos.encode(Image.fromarray(pattern), "PNG")
    found = images.evaluation_crop(encoded, size, resize=resize)
    assert hashlib.sha256(found.tobytes()).hexdigest() == TORCHVISION[case]


# --- Files that are not what they say.


def huge_png(width, height):
    """A PNG of a few bytes that says it has so many pixels, of one bit each."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes(1000)),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge_jpeg(width, height):
    """A small JPEG whose frame header says it has so many pixels."""
    content = bytearray(photos.encode(photos.photo(64, 48)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("encoded", [huge_png(50_000, 50_000), huge_jpeg(65_000, 65_000)])
def test_an_image_that_would_fill_the_memory_is_refused(encoded):
    for read in (
        images.decode,
        lambda encoded: images.training_crop(encoded, 8, philox(0), min_area=0.08),
        lambda encoded: images.evaluation_crop(encoded, 8, resize=8),
    ):
        with pytest.raises(Exception, match="exceeds limit"):
            read(encoded)


def test_a_strip_that_would_be_resized_to_gigabytes_is_refused():
    strip = photos.encode(Image.new("RGB", (1, 60_000)), "PNG")
    with pytest.raises(ValueError, match="1x60000 pixels cannot be made 256x15360000"):
        images.evaluation_crop(strip, 224, resize=256)
    assert images.training_crop(strip, 8, philox(0), min_area=0.08).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "BMP"])
def test_other_formats_are_no_images_whatever_the_file_is_called(kind):
    # Pillow would start Ghostscript for an EPS: a program, of the file's writing.
    with pytest.raises(Exception, match="cannot identify"):
        images.decode(photos.encode(photos.photo(20, 20), kind))


def test_pixels_of_sixteen_bits_are_refused_and_not_clipped():
    deep = photos.encode(Image.fromarray(np.full((20, 20), 1000, np.uint16)), "PNG")
    with pytest.raises(ValueError, match="more than 8 bits"):
        images.decode(deep)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    name=st.sampled_from(sorted(JPEGS)),
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    values=st.binary(min_size=4, max_size=4),
    cut=st.floats(0.5, 1),
)
def test_a_damaged_image_is_an_image_of_its_size_or_an_exception(name, places, values, cut):
    content = bytearray(JPEGS[name])
    for place, value in zip(places, values, strict=False):
        content[int(place * len(content))] = value
    for crop in (
        lambda encoded: images.training_crop(encoded, 8, philox(0), min_area=0.08),
        lambda encoded: images.evaluation_crop(encoded, 8, resize=8),
    ):
        try:
            found = crop(bytes(content[: int(cut * len(content))]))
        except Exception as error:  # as densejax.data.stream takes it, which names the file
            assert not isinstance(error, MemoryError)
        else:
            assert found.shape == (8, 8, 3) and found.dtype == np.uint8
