"""Encoded images to uint8 arrays on the host: random crops to train on, one crop to evaluate."""

import contextlib
import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image

ATTEMPTS = 10  # at a random crop
ASPECT = (3 / 4, 4 / 3)  # width : height of a random crop
FORMATS = ("JPEG", "PNG")  # Pillow knows others, of which some run programs of the machine
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # above it Pillow refuses: made to fill the memory
cv2.setNumThreads(1)  # many processes decode: each keeps to its core


def decode(encoded: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """Decodes an image to RGB uint8 [height, width, 3]; its EXIF orientation is not read.

    A JPEG of at least twice the least size that is asked for is decoded at a half, 3/8, a quarter
    or an eighth: its cosine transform is then its own low-pass filter. Pillow reads what simplejpeg
    does not (PNG, CMYK, JPEGs with flaws that do no harm), at full size.

    Raises:
      Exception: whatever Pillow raises for an image that it cannot read, or will not.
    """
    with contextlib.suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours in ("YCbCr", "RGB", "Gray") and height * width <= MOST_PIXELS:
            least = {"min_height": min_height, "min_width": min_width, "min_factor": 2}
            return simplejpeg.decode_jpeg(encoded, **least if min_height else {})
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        if image.mode.startswith(("I", "F")):  # converted, it would be white without a word
            raise ValueError("its pixels have more than 8 bits")
        return np.asarray(image.convert("RGB"))


def crop_box(
    height: int, width: int, min_area: float, bits: np.random.BitGenerator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the random crop of Szegedy et al. 2015, section 6.

    Its share of the area is uniform in [min_area, 1] and its aspect ratio log-uniform in `ASPECT`;
    the first of ten attempts that lies within the image is taken, after that the largest middle.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      min_area: least share of the image's area.
      bits: where the draws come from; its raw output is what NumPy keeps fixed for good.
    """
    draws = (bits.random_raw((ATTEMPTS, 4)) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    for area, aspect, down, right in draws.tolist():
        area = height * width * (min_area + area * (1 - min_area))
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h = min(height, round(width / ASPECT[0]))
    w = min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def training_crop(
    encoded: bytes, size: int, bits: np.random.BitGenerator, *, min_area: float
) -> np.ndarray:
    """A random crop of an image, uint8 [size, size, 3].

    The resize is bilinear between the four nearest pixels (OpenCV's), without antialiasing: after
    `decode` it shrinks by less than two in one direction at least.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
    top, left, h, w = crop_box(height, width, min_area, bits)
    image = decode(encoded, math.ceil(height * size / h), math.ceil(width * size / w))
    factor = image.shape[0] * 8 // height / 8  # what decode reduced by, rounding sizes up
    rows = slice(round(top * factor), round((top + h) * factor))
    columns = slice(round(left * factor), round((left + w) * factor))
    return cv2.resize(image[rows, columns], (size, size), interpolation=cv2.INTER_LINEAR)


def evaluation_crop(encoded: bytes, size: int, *, resize: int) -> np.ndarray:
    """The middle of an image whose shorter side was resized, uint8 [size, size, 3].

    The definition is that of torchvision's `Resize` and `CenterCrop` on Pillow images: an
    antialiased bilinear filter, the longer side rounded down, the crop's corner to even.

    Args:
      encoded: the image.
      size: of the crop, pixels; at most `resize`.
      resize: the shorter side, pixels.
    """
    image = Image.fromarray(decode(encoded))
    short, long = sorted(image.size)
    long = int(resize * long / short)
    width, height = (resize, long) if image.width <= image.height else (long, resize)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels cannot be made {width}x{height}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))
