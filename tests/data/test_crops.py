"""Random crops are distributed and filtered as published."""

import math

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from densejax.data import crops, images
from tests import photos
from tests.data.test_images import philox, pillow, resized


def boxes(height, width, min_area, number=4000):
    return np.array(
        [crops.crop_box(height, width, min_area, philox(seed)) for seed in range(number)]
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
    assert crops.crop_box(100, 100, 1.0, philox(0)) == (0, 0, 100, 100)
    assert (boxes(100, 100, 0.9, 200)[:, 2:].prod(1) > 0.88 * 100**2).all()


@pytest.mark.parametrize(
    ("height", "width", "box"), [(30, 1000, (0, 480, 30, 40)), (1000, 30, (480, 0, 40, 30))]
)
def test_no_crop_that_fits_leaves_the_largest_middle(height, width, box):
    # A tenth of these images at any allowed aspect ratio is taller or wider than they are.
    assert crops.crop_box(height, width, 0.5, philox(0)) == box


@pytest.mark.parametrize(
    ("width", "height", "size"), [(300, 200, 101), (90, 110, 224), (33, 20, 11)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_training_crop_is_bilinear_between_the_four_nearest_pixels(width, height, size, kind):
    encoded = photos.encode(photos.photo(width, height), kind)
    for seed in range(20):
        top, left, h, w = crops.crop_box(height, width, 0.3, philox(seed))
        assert min(h, w) < 2 * size  # else it is first made smaller
        found = crops.training_crop(encoded, size, philox(seed), min_area=0.3)
        crop = pillow(encoded)[top : top + h, left : left + w]
        expected = resized(crop, size, size, antialias=False)
        assert found.shape == (size, size, 3) and found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 1.0


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF"])
def test_lines_finer_than_a_pixel_of_the_crop_become_grey(kind):
    lines = np.zeros((400, 400, 3), np.uint8)
    lines[::2] = 255
    encoded = photos.encode(Image.fromarray(lines), kind)
    for seed in range(10):
        *_, h, w = crops.crop_box(400, 400, 0.5, philox(seed))
        found = crops.training_crop(encoded, 32, philox(seed), min_area=0.5).astype(float)
        # Of an odd number of lines, one is not in balance; without antialiasing, whole lines stay.
        assert np.abs(found - 127.5).max() <= 127.5 / (min(h, w) // 32) + 8


def test_a_training_crop_of_a_large_jpeg_is_of_the_same_place():
    y, x = np.mgrid[:427, :640]
    places = np.stack([255 * (x + 0.5) / 640, 255 * (y + 0.5) / 427, 128 + 0 * x], -1)
    encoded = photos.encode(Image.fromarray(places.round().astype(np.uint8)), quality=95)
    shapes = set()
    for seed in range(20):
        top, left, h, w = crops.crop_box(427, 640, 0.1, philox(seed))
        least = math.ceil(427 * 32 / h), math.ceil(640 * 32 / w)
        shapes.add(images.Picture(encoded).decode(*least).shape)
        found = crops.training_crop(encoded, 32, philox(seed), min_area=0.1)
        ramp = (np.arange(32) + 0.5) / 32  # to half a pixel of an eighth: 4 of 427
        np.testing.assert_allclose(found[..., 0].mean(0), 255 * (left + ramp * w) / 640, atol=3)
        np.testing.assert_allclose(found[..., 1].mean(1), 255 * (top + ramp * h) / 427, atol=3)
    assert len(shapes) == 2  # a quarter and an eighth
