"""Random crops of image files, to train on."""

import math

import cv2
import numpy as np

from densejax.data.images import Picture

ATTEMPTS = 10  # at a random crop
ASPECT = (3 / 4, 4 / 3)  # width : height of a random crop
cv2.setNumThreads(1)  # many processes decode: each keeps to its core


def crop_box(
    height: int, width: int, min_area: float, bits: np.random.BitGenerator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the random crop of Szegedy et al. 2015, section 6.

    Its share of the area is uniform in [min_area, 1] and its aspect ratio log-uniform in `ASPECT`.
    The first of ten attempts that fits into the image is taken. If none fits, it is the largest
    crop around the middle of the image.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      min_area: least share of the image's area.
      bits: where the draws come from; NumPy never changes the raw output of such a generator.
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

    A crop that is more than twice as large as needed is first made smaller by averaging (a JPEG by
    its decoder). Then the resize is bilinear between the four nearest pixels.
    """
    picture = Picture(encoded)
    height, width = picture.height, picture.width
    top, left, h, w = crop_box(height, width, min_area, bits)
    image = picture.decode(math.ceil(height * size / h), math.ceil(width * size / w))
    factor = image.shape[0] * 8 // height / 8  # what decode reduced by, rounding sizes up
    rows = slice(round(top * factor), round((top + h) * factor))
    columns = slice(round(left * factor), round((left + w) * factor))
    crop = image[rows, columns]
    if (times := min(crop.shape[:2]) // size) > 1:
        crop = cv2.resize(crop, None, fx=1 / times, fy=1 / times, interpolation=cv2.INTER_AREA)
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
