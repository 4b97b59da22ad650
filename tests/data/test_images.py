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
from PIL import Image, ImageOps

from densejax.data import crops, images
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
    "4:2:2": photos.encode(photos.photo(101, 67), subsampling=1),
    "4:4:4": photos.encode(photos.photo(64, 80), subsampling=0),
} | photos.odd()
KINDS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@pytest.mark.parametrize("name", JPEGS)
def test_every_kind_is_decoded_as_pillow_does(name):
    found = images.Picture(JPEGS[name]).decode()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pillow(JPEGS[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_by_its_content_whatever_it_is_called(kind):
    encoded = photos.encode(photos.photo(40, 30), kind)
    np.testing.assert_array_equal(images.Picture(encoded).decode(), pillow(encoded))


@pytest.mark.parametrize("name", ["4:2:0", "4:2:2", "4:4:4", "grey", "progressive", "cmyk"])
def test_without_simplejpeg_the_bits_are_the_same(name, monkeypatch):
    found = images.evaluation_crop(JPEGS[name], 30, resize=36)
    monkeypatch.setattr(images, "simplejpeg", None)
    np.testing.assert_array_equal(images.evaluation_crop(JPEGS[name], 30, resize=36), found)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_stands_upright_by_its_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = photos.encode(photos.photo(90, 60), kind, exif=exif)
    with Image.open(io.BytesIO(encoded)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    picture = images.Picture(encoded)
    np.testing.assert_array_equal(picture.decode(), np.asarray(upright))
    assert (picture.width, picture.height) == upright.size
    plain = photos.encode(upright, "PNG")
    for crop in (
        lambda encoded: crops.training_crop(encoded, 40, philox(0), min_area=0.3),
        lambda encoded: images.evaluation_crop(encoded, 40, resize=48),
    ):
        np.testing.assert_array_equal(crop(encoded), crop(plain))


def test_a_large_photo_that_lies_is_decoded_smaller_and_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = images.Picture(photos.encode(photos.photo(300, 200), exif=exif))
    assert (picture.height, picture.width) == (300, 200)
    assert picture.decode(150, 90).shape == (150, 100, 3)
    assert picture.decode(90, 101).shape == (300, 200, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize(
    "exif", [b"no TIFF", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\xff\x01"]
)
def test_exif_data_that_cannot_be_read_say_nothing(exif):
    encoded = photos.encode(photos.photo(40, 30), exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(images.Picture(encoded).decode(), pillow(encoded))


@pytest.mark.parametrize(("least", "factor"), [(200, 1), (101, 1), (100, 2), (76, 2), (50, 4)])
def test_large_jpegs_are_decoded_smaller_by_the_transform_itself(least, factor):
    encoded = photos.encode(photos.photo(300, 200))
    found = images.Picture(encoded).decode(least, least)
    assert found.shape == (200 // factor, 300 // factor, 3)
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft("RGB", (300 // factor, 200 // factor))
        np.testing.assert_array_equal(found, np.asarray(image))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
@pytest.mark.parametrize("name", JPEGS)
def test_a_truncated_image_is_no_image(name, share):
    with pytest.raises(Exception, match="(?i)premature|truncated|not recognised|broken"):
        images.Picture(JPEGS[name][: int(share * len(JPEGS[name]))]).decode()


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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [huge_png, huge_jpeg])
@pytest.mark.parametrize("size", [65_000, 13_000, 9_500])
def test_an_image_that_would_fill_the_memory_is_refused(make, size):
    encoded = make(size, size)
    for read in (
        images.Picture,
        lambda encoded: crops.training_crop(encoded, 8, philox(0), min_area=0.08),
        lambda encoded: images.evaluation_crop(encoded, 8, resize=8),
    ):
        with pytest.raises(Exception, match="exceeds? (the )?limit"):
            read(encoded)


def test_a_strip_that_would_be_resized_to_gigabytes_is_refused():
    strip = photos.encode(Image.new("RGB", (1, 60_000)), "PNG")
    with pytest.raises(ValueError, match="1x60000 pixels cannot be made 256x15360000"):
        images.evaluation_crop(strip, 224, resize=256)
    assert crops.training_crop(strip, 8, philox(0), min_area=0.08).shape == (8, 8, 3)


def test_other_formats_are_no_images_whatever_the_file_is_called():
    # Pillow would start Ghostscript for an EPS: a program, of the file's writing.
    with pytest.raises(ValueError, match="not recognised as BMP, GIF, JPEG, .*WEBP"):
        images.Picture(photos.encode(photos.photo(20, 20), "EPS"))


def damages(content):
    """A JPEG whose second half is lost in the ways that disks and networks lose it."""
    half = len(content) // 2
    yield content[:half] + bytes(len(content) - half - 2) + b"\xff\xd9"
    yield content[:half] + b"\xff\xd9"
    yield content[:half] + content[half + 300 :]


@pytest.mark.parametrize("kind", [{}, {"subsampling": 0}, {"progressive": True}, {"cmyk": True}])
@pytest.mark.parametrize("version", [b"\1\1", b"\0\0"])
def test_half_an_image_is_no_image(kind, version):
    photo, options = photos.photo(300, 200), {key: kind[key] for key in kind if key != "cmyk"}
    content = photos.encode(photo.convert("CMYK") if "cmyk" in kind else photo, **options)
    content = content.replace(b"JFIF\0\1\1", b"JFIF\0" + version, 1)
    images.Picture(content).decode()  # the version alone does no harm
    for damaged in damages(content):
        for crop in (
            lambda encoded: crops.training_crop(encoded, 8, philox(0), min_area=0.08),
            lambda encoded: images.evaluation_crop(encoded, 8, resize=8),
        ):
            with pytest.raises(ValueError, match="Corrupt JPEG data"):
                crop(damaged)


def test_pixels_of_sixteen_bits_are_refused_and_not_clipped():
    deep = Image.fromarray(np.full((20, 20), 1000, np.uint16))
    for kind in ("TIFF", "PPM"):  # whose white may be any level
        with pytest.raises(ValueError, match="more than 8 bits; save it with 8 bits a channel"):
            images.Picture(photos.encode(deep, kind)).decode()


def test_a_png_of_sixteen_bits_has_the_nearest_level_of_eight():
    """Of 65,535 (PNG specification, section 13.12: Sample depth rescaling)."""
    levels = np.array([[0, 128, 129, 257, 1000, 32767, 65406, 65407, 65535]], np.uint16)
    found = images.Picture(photos.encode(Image.fromarray(levels), "PNG")).decode()
    expected = np.floor(levels.astype(np.float64) * 255 / 65535 + 0.5)
    np.testing.assert_array_equal(found, expected[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_an_animation_the_first_image_is_read(kind):
    first, second = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    moving = photos.encode(first, kind, save_all=True, append_images=[second], **lossless)
    np.testing.assert_array_equal(images.Picture(moving).decode(), np.asarray(first))


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
        lambda encoded: crops.training_crop(encoded, 8, philox(0), min_area=0.08),
        lambda encoded: images.evaluation_crop(encoded, 8, resize=8),
    ):
        try:
            found = crop(bytes(content[: int(cut * len(content))]))
        except Exception as error:  # as densejax.data.stream takes it, which names the file
            assert not isinstance(error, MemoryError)
        else:
            assert found.shape == (8, 8, 3) and found.dtype == np.uint8
