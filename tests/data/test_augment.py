"""Augmentation: what every output may be, how often, and that it follows the example's key."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from densejax.data.augment import Preparation, example_keys, reverse
from densejax.data.mixing import Erasing, Mixing

PLAIN = {"mean": (0.0,), "std": (1.0,)}


def keys(number, seed=0):
    return example_keys(jax.random.key(seed), jnp.arange(number, dtype=jnp.int32))


def train(preparation, images, keys):
    batch = {"image": images, "label": jnp.zeros(len(images), jnp.int32)}
    return np.asarray(jax.jit(preparation.training)(batch, keys)[0])


def test_evaluation_normalises_per_channel():
    images = np.asarray([[[[0, 100, 255]]], [[[10, 20, 30]]]], np.uint8)
    found = Preparation((1.0, 2.0, 3.0), (2.0, 4.0, 5.0)).evaluation(jnp.asarray(images))
    expected = (images - np.asarray([1.0, 2.0, 3.0])) / [2.0, 4.0, 5.0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == jnp.float32


def test_padding_is_the_mean_colour():
    mean, std = (125.0, 123.0, 114.0), (63.0, 62.0, 67.0)
    preparation = Preparation(mean, std, shift=4, flip=True)
    grey = np.broadcast_to(np.uint8(mean), (64, 8, 8, 3))
    np.testing.assert_array_equal(train(preparation, grey, keys(64)), 0.0)
    white = np.full((64, 8, 8, 3), 255, np.uint8)
    found = train(preparation, white, keys(64))
    inside = (255 - np.asarray(mean)) / std
    is_inside = np.isclose(found, inside, rtol=1e-5).all(-1)
    assert (is_inside | (found == 0).all(-1)).all()
    assert 0 < is_inside.mean() < 1


def test_every_window_and_mirror_occurs_as_often_as_the_others():
    shift, size, number = 4, 8, 16_200
    image = np.arange(1, size * size + 1, dtype=np.uint8).reshape(size, size, 1)
    images = np.broadcast_to(image, (number, size, size, 1))
    found = train(Preparation(**PLAIN, shift=shift, flip=True), images, keys(number))[..., 0]
    windows = {}
    for mirrored in (False, True):
        padded = np.pad(image[:, ::-1, 0] if mirrored else image[:, :, 0], shift)
        for row in range(2 * shift + 1):
            for column in range(2 * shift + 1):
                window = padded[row : row + size, column : column + size]
                windows[window.astype(np.float32).tobytes()] = 0
    assert len(windows) == 2 * 81
    for crop in found:
        windows[crop.tobytes()] += 1  # a KeyError is a crop that is no window
    counts = np.asarray(list(windows.values()))
    assert counts.min() > 0
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert abs(chi_square - 161) < 5 * np.sqrt(2 * 161)


@pytest.mark.parametrize("shift, flip", [(0, True), (2, False), (0, False)])
def test_each_part_can_be_turned_off(shift, flip):
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    images = np.broadcast_to(image, (200, 8, 8, 1))
    found = train(Preparation(**PLAIN, shift=shift, flip=flip), images, keys(200))
    assert len(np.unique(found, axis=0)) == (25 if shift else 2 if flip else 1)
    if not shift:
        same = (found == images).all((1, 2, 3))
        np.testing.assert_array_equal(found[~same], images[~same][:, :, ::-1])
        assert abs(same.mean() - (0.5 if flip else 1)) < 5 * 0.5 / np.sqrt(200)


def test_an_example_follows_its_own_key():
    images = np.random.Generator(np.random.PCG64(3)).integers(256, size=(8, 8, 8, 3))
    images, order = images.astype(np.uint8), np.asarray([3, 1, 4, 0, 5, 7, 2, 6])
    preparation = Preparation((0.0,) * 3, (1.0,) * 3, shift=4, flip=True)
    whole = train(preparation, images, keys(8))
    np.testing.assert_array_equal(train(preparation, images[order], keys(8)[order]), whole[order])
    half = train(preparation, images[4:], keys(8)[4:])
    np.testing.assert_array_equal(half, whole[4:])
    assert (train(preparation, images, keys(8, seed=1)) != whole).any((1, 2, 3)).all()


def test_keys_are_a_function_of_the_place_in_the_global_batch():
    positions = jnp.arange(1000, dtype=jnp.int32)
    whole = np.asarray(jax.random.key_data(example_keys(jax.random.key(0), positions)))
    half = example_keys(jax.random.key(0), positions[500:])
    np.testing.assert_array_equal(jax.random.key_data(half), whole[500:])
    assert len(np.unique(whole, axis=0)) == 1000
    np.testing.assert_array_equal(
        whole[7], jax.random.key_data(jax.random.fold_in(jax.random.key(0), 7))
    )


def test_resize():
    columns = np.asarray([[0, 100], [0, 100]], np.uint8).reshape(1, 2, 2, 1)
    preparation = Preparation(**PLAIN, image_size=4)
    found = np.asarray(preparation.evaluation(jnp.asarray(columns)))
    expected = np.broadcast_to([0.0, 25.0, 75.0, 100.0], (4, 4))  # pixel centres, bilinear
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-4)
    training = Preparation(**PLAIN, image_size=4, shift=1, flip=True)
    assert train(training, columns, keys(1)).shape == (1, 4, 4, 1)


def test_shrinking_is_antialiased_as_pillows():
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    found = Preparation(**PLAIN, image_size=14).evaluation(jnp.asarray(image)[None, ..., None])
    expected = Image.fromarray(image.astype(np.float32)).resize((14, 14), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(found[0, ..., 0], np.asarray(expected), rtol=1e-4)


@pytest.mark.parametrize("colours", [{}, {"jitter": 0.4, "lighting": 0.1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_result_has_the_dtype_of_the_computation(dtype, colours):
    preparation = Preparation((0.0,) * 3, (1.0,) * 3, 1, True, image_size=6, dtype=dtype, **colours)
    images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
    with jax.numpy_dtype_promotion("standard"):
        evaluation = jax.eval_shape(preparation.evaluation, images)
        training, _ = jax.eval_shape(preparation.training, batch, keys(4))
    for result in (evaluation, training):
        assert (result.shape, result.dtype) == ((4, 6, 6, 3), dtype)


def test_normalisation_is_rounded_once():
    # In bfloat16 the mean itself would round to 249.
    images = jnp.full((1, 1, 1, 1), 250, jnp.uint8)
    with jax.numpy_dtype_promotion("standard"):
        found = Preparation((249.25,), (1.0,), dtype="bfloat16").evaluation(images)
    assert found.astype(jnp.float32) == 0.75


def test_ten_crops_are_corners_centre_and_mirrors():
    image = np.arange(7 * 6 * 2, dtype=np.uint8).reshape(1, 7, 6, 2)
    views = np.asarray(Preparation((0.0,) * 2, (1.0,) * 2, crop_size=4).views(image))
    assert views.shape == (10, 1, 4, 4, 2)
    places = [(0, 0), (0, 2), (3, 0), (3, 2), (1, 1)]
    for view, (y, x) in zip(views, places, strict=False):
        np.testing.assert_array_equal(view, image[:, y : y + 4, x : x + 4])
    np.testing.assert_array_equal(views[5:], views[:5, :, :, ::-1])
    assert Preparation((0.0,) * 2, (1.0,) * 2).views(image).shape == (1, 1, 7, 6, 2)


def test_views_are_two_shifts_along_the_diagonal_and_mirrors():
    image = np.arange(1, 21, dtype=np.uint8).reshape(1, 4, 5, 1)
    views = np.asarray(Preparation(**PLAIN, view_shift=1, view_mirror=True).views(image))
    assert views.shape == (6, 1, 4, 5, 1)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))  # with the mean colour
    expected = [image, padded[:, :4, :5], padded[:, 2:, 2:]]
    for view, mirrored, wanted in zip(views[:3], views[3:], expected, strict=True):
        np.testing.assert_array_equal(view, wanted)
        np.testing.assert_array_equal(mirrored, wanted[:, :, ::-1])
    two = np.asarray(Preparation(**PLAIN, view_mirror=True).views(image))
    np.testing.assert_array_equal(two, views[[0, 3]])
    assert Preparation(**PLAIN, view_shift=1).views(image).shape == (3, 1, 4, 5, 1)


def test_the_data_may_decide_what_is_mirrored():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    images, mirrored = np.broadcast_to(image, (16, 8, 8, 1)), np.arange(16) % 3 == 0
    batch = {"image": images, "label": np.arange(16), "mirrored": mirrored}
    found, labels = Preparation(**PLAIN, flip=True).training(batch, keys(16))
    for result, is_mirrored in zip(found, mirrored, strict=True):
        np.testing.assert_array_equal(result, image[0, :, ::-1] if is_mirrored else image[0])
    np.testing.assert_array_equal(labels, np.arange(16))


class Ramp:
    """In the place of operations, whose program is large; no mirror or shift commutes with it."""

    draws = 3

    def __call__(self, images, uniforms, mean):
        scaled = images.astype("float32") * uniforms[:, 1].reshape(-1, 1, 1, 1)
        return scaled + np.arange(8, dtype=np.float32)[:, None] + np.float32(mean)


def test_the_order_is_operations_normalise_mirror_shift_erase_mix():
    """Each part alone, on what the one before made, with the words that are its own."""
    images = random_images(32, 8)
    labels = np.arange(32, dtype=np.int32) % 10
    batch, mean, std = {"image": images, "label": labels}, (99.0, 80.0, 60.0), (50.0, 60.0, 70.0)
    parts = {
        "operations": Ramp(),
        "erasing": Erasing(3, 0.5),
        "mixing": Mixing(0.4, 1.0, 10),
    }
    preparation = Preparation(mean, std, shift=1, flip=True, **parts)
    found = jax.jit(preparation.training)(batch, keys(32))
    bits = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (24,)))(keys(32)))
    uniforms = ((bits >> 8) * 2.0**-24).astype(np.float32)
    expected = parts["operations"](images, uniforms[:, 21:], mean)
    expected = (expected - np.float32(mean)) / np.float32(std)
    mirrored = (bits[:, 0] % 2 == 1)[:, None, None, None]
    expected = np.where(mirrored, expected[:, :, ::-1], expected)
    padded = np.pad(expected, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = bits[:, 1:3] % 3
    expected = np.stack(
        [one[y : y + 8, x : x + 8] for one, (y, x) in zip(padded, corners, strict=True)]
    )
    expected = parts["erasing"](expected, uniforms[:, 10:17])
    expected = parts["mixing"](expected, labels, reverse, uniforms[:, 17:21])
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-5, atol=1e-5)


# --- Colours.


def draws(keys):
    """What each key gives: three factors of 0.6 to 1.4, the order, three uniforms."""
    bits = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (10,)))(keys)).astype(np.uint64)
    uniforms = (bits[:, 3:9] >> np.uint64(8)) / 2.0**24
    return 0.6 + 0.8 * uniforms[:, :3], bits[:, 9] % 6


def blended(image, which, factor):
    """Brightness, contrast or saturation as torchvision defines them, but unclipped."""
    grey = image @ np.array([0.299, 0.587, 0.114])
    other = (0.0, grey.mean(), grey[..., None])[which]
    return factor * image + (1 - factor) * other


def random_images(number, size=6):
    random = np.random.Generator(np.random.PCG64(1))
    return random.integers(0, 256, (number, size, size, 3)).astype(np.uint8)


def test_jitter_is_brightness_contrast_and_saturation_in_a_random_order():
    number = 64
    images, found_orders = random_images(number), set()
    preparation = Preparation((0.0,) * 3, (1.0,) * 3, jitter=0.4)
    found = train(preparation, images, keys(number))
    factors, orders = draws(keys(number))
    for image, result, factor, order in zip(images, found, factors, orders, strict=True):
        whole = image.astype(np.float64)
        order = list(itertools.permutations(range(3)))[order]
        for which in order:
            whole = blended(whole, which, factor[which])
        np.testing.assert_allclose(result, whole, rtol=1e-4, atol=1e-2)
        found_orders.add(order)
    assert len(found_orders) == 6


def test_lighting_shifts_all_pixels_along_the_principal_colours():
    number, std = 8000, 0.1
    images = random_images(number, 2)
    found = train(Preparation((0.0,) * 3, (1.0,) * 3, lighting=std), images, keys(number))
    shifts = found - images
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:, :1, :1], shifts.shape), atol=1e-3)
    # AlexNet's eigenvalues and eigenvectors, as fb.resnet.torch has them (columns are vectors).
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    alphas = np.linalg.solve(vectors * values, shifts[:, 0, 0].T / 255).T / std
    for alpha in alphas.T:
        assert scipy.stats.kstest(alpha, "norm").pvalue > 1e-3
    correlations = np.corrcoef(alphas.T) - np.eye(3)
    assert np.abs(correlations).max() < 5 / np.sqrt(number)


def test_colours_come_before_normalisation_and_mirror_and_follow_the_key():
    mean, std = (120.0, 115.0, 104.0), (58.0, 57.0, 57.0)
    colours = {"jitter": 0.4, "lighting": 0.1}
    images = random_images(16)
    plain = train(Preparation((0.0,) * 3, (1.0,) * 3, **colours), images, keys(16))
    found = train(Preparation(mean, std, flip=True, **colours), images, keys(16))
    expected = (plain - np.array(mean)) / std
    same = np.isclose(found, expected, atol=1e-3).all((1, 2, 3))
    assert 0 < same.sum() < 16
    np.testing.assert_allclose(found[~same], expected[~same][:, :, ::-1], atol=1e-3)
    preparation = Preparation(mean, std, flip=True, **colours)
    half = train(preparation, images[8:], keys(16)[8:])
    np.testing.assert_allclose(half, found[8:], rtol=1e-5, atol=1e-5)
    evaluation = preparation.evaluation(jnp.asarray(images))
    np.testing.assert_allclose(evaluation, (images - np.array(mean)) / std, rtol=1e-4, atol=1e-5)


def test_colours_in_float64_are_as_random_as_in_float32():
    """There a draw of JAX has 64 bits."""
    grey, scale = np.full((2000, 1, 1, 3), 200, np.uint8), ((0.0,) * 3, (1.0,) * 3)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        factors = train(Preparation(*scale, jitter=0.4, dtype="float64"), grey, keys(2000))
    assert factors.dtype == np.float64  # of one grey pixel only the brightness can change
    assert scipy.stats.kstest(factors[:, 0, 0, 0] / 200, "uniform", (0.6, 0.8)).pvalue > 1e-3
