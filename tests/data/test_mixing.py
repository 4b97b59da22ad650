"""Erased and exchanged rectangles against loops in NumPy; shares of labels; distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from densejax.data.augment import reverse
from densejax.data.mixing import Erasing, Mixing

NUMBER, HEIGHT, WIDTH = 512, 12, 9
IMAGES = np.random.default_rng(0).normal(1, 0.1, (NUMBER, HEIGHT, WIDTH, 2)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 10, NUMBER).astype(np.int32)
UNIFORMS = np.random.default_rng(2).random((NUMBER, 7), np.float32)


def box(row, column, height, width):
    """A published box around a pixel: half of the size to both sides, cut off at the edge."""
    rows = max(row - height // 2, 0), min(row + height // 2, HEIGHT)
    columns = max(column - width // 2, 0), min(column + width // 2, WIDTH)
    return slice(*rows), slice(*columns)


def mixed(mixing, images=IMAGES):
    return jax.jit(lambda *arrays: mixing(*arrays, reverse, UNIFORMS))(images, LABELS)


@pytest.mark.parametrize("size", [4, 6, 30])
def test_cutout_is_the_published_square(size):
    found = np.asarray(jax.jit(Erasing(cutout=size))(IMAGES, UNIFORMS))
    for image, result, (down, right) in zip(IMAGES, found, UNIFORMS[:, :2], strict=True):
        expected = image.copy()
        expected[box(int(down * HEIGHT), int(right * WIDTH), size, size)] = 0  # the mean colour
        np.testing.assert_array_equal(result, expected)


def test_an_erased_rectangle_has_the_published_area_and_aspect_and_lies_within():
    number, side = 4000, 64
    uniforms = np.random.default_rng(3).random((number, 7), np.float32)
    images = jnp.ones((number, side, side, 1))
    found = np.asarray(jax.jit(Erasing(probability=0.25, area=(0.05, 0.3)))(images, uniforms))
    erased = found[..., 0] == 0
    is_any = erased.any((1, 2))
    assert abs(is_any.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / number)
    heights, widths = (erased.any(axis)[is_any].sum(1) for axis in (2, 1))
    np.testing.assert_array_equal(erased[is_any].sum((1, 2)), heights * widths)  # a rectangle
    np.testing.assert_array_equal(found[~is_any], 1)
    areas, aspects = heights * widths / side**2, np.log(heights / widths)
    assert scipy.stats.kstest(areas, "uniform", (0.05, 0.25)).pvalue > 1e-3
    # All fit below 0.3; rounded sides shift an aspect by less than a bin of this width.
    counts, _ = np.histogram(aspects, np.linspace(np.log(0.3) - 1e-6, -np.log(0.3) + 1e-6, 5))
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert heights.max() > 1.2 * np.sqrt(0.3) * side
    for axis in (1, 2):  # every place occurs, up to the edges
        lines = erased.any(axis).mean(0)
        assert lines[0] > 0 and lines[-1] > 0


@pytest.mark.parametrize("sides", [(6, 40), (40, 6)])
def test_an_erased_rectangle_of_an_oblong_image_has_its_area(sides):
    images = jnp.ones((NUMBER, *sides, 1))
    found = np.asarray(Erasing(probability=1.0, area=(0.3, 0.9))(images, UNIFORMS))
    share = (found == 0).mean((1, 2, 3))
    wanted = 0.3 + 0.6 * UNIFORMS[:, 2]
    half_a_pixel = 0.5 * (1 / sides[0] + 1 / sides[1]) + 0.25 / (sides[0] * sides[1])
    assert np.abs(share - wanted).max() <= half_a_pixel


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    uniforms = np.random.default_rng(4).random((20_000, 7), np.float32)
    labels = np.arange(20_000) % 2  # partners, from the other end, are of the other class
    images = jnp.zeros((20_000, 1, 1, 1))
    found = Mixing(mixup=alpha, classes=2)(images, labels.astype(np.int32), reverse, uniforms)[1]
    shares = np.asarray(found)[np.arange(20_000), labels]
    expected = scipy.stats.beta.ppf(uniforms[:, 1], alpha, alpha)
    assert np.abs(shares - expected).mean() < 1e-4
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_mixup_adds_images_and_labels_with_the_same_weights():
    images, labels = mixed(Mixing(mixup=0.4, classes=10))
    one_hot = np.eye(10)[LABELS]
    shares = scipy.stats.beta.ppf(UNIFORMS[:, 1], 0.4, 0.4)
    for i, share in enumerate(shares):
        j = NUMBER - 1 - i
        expected = share * IMAGES[i] + (1 - share) * IMAGES[j]
        np.testing.assert_allclose(images[i], expected, atol=1e-5)
        np.testing.assert_allclose(
            labels[i], share * one_hot[i] + (1 - share) * one_hot[j], atol=1e-5
        )


def by_hand(i):
    """CutMix of image i by the authors' code, with lambda uniform: alpha is 1."""
    j, share = NUMBER - 1 - i, UNIFORMS[i, 1]
    side = np.sqrt(np.float32(1) - share)
    middle = int(UNIFORMS[i, 2] * HEIGHT), int(UNIFORMS[i, 3] * WIDTH)
    place = box(*middle, int(HEIGHT * side), int(WIDTH * side))
    image = IMAGES[i].copy()
    image[place] = IMAGES[j][place]
    left = 1 - image[place][..., 0].size / (HEIGHT * WIDTH)
    return image, left * np.eye(10)[LABELS[i]] + (1 - left) * np.eye(10)[LABELS[j]]


def test_cutmix_exchanges_the_published_rectangle_and_labels_by_its_area():
    images, labels = mixed(Mixing(cutmix=1.0, classes=10))
    for i in range(NUMBER):
        image, label = by_hand(i)
        np.testing.assert_array_equal(images[i], image)
        np.testing.assert_allclose(labels[i], label, atol=1e-6)


def test_with_both_one_of_the_two_is_drawn_for_each_image():
    both, cut, added = (
        mixed(Mixing(*alphas, classes=10)) for alphas in ((0.4, 1.0), (0.0, 1.0), (0.4, 0.0))
    )
    cuts = UNIFORMS[:, 0] < 0.5
    assert 0.4 < cuts.mean() < 0.6
    for found, first, second in zip(both, cut, added, strict=True):
        mask = cuts.reshape(-1, *(1,) * (found.ndim - 1))
        np.testing.assert_array_equal(found, np.where(mask, first, second))


def test_nothing_is_mixed_by_default_and_the_type_of_images_stays():
    images, labels = mixed(Mixing())
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    with jax.numpy_dtype_promotion("standard"):
        half = mixed(Mixing(0.4, 1.0, 10), jnp.asarray(IMAGES, jnp.bfloat16))
    assert half[0].dtype == jnp.bfloat16 and half[1].dtype == jnp.float32
