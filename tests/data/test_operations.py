"""Each operation against Pillow's, and how often each is drawn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from densejax.data import operations
from densejax.data.operations import COLOURS, MOVES, Operations
from tests import photos

FILL = (100, 120, 130)
PHOTO = photos.photo(37, 30, 1)
NAMES = [*MOVES, *(function.__name__.lstrip("_") for function in COLOURS)]


def moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=FILL)


def enhanced(kind):
    return lambda image, strength: kind(image).enhance(1 + strength)


PILLOWS = {  # torchvision calls these for RandAugment and TrivialAugmentWide
    "shear_x": lambda image, v: moved(image, 1, v, 0, 0, 1, 0),
    "shear_y": lambda image, v: moved(image, 1, 0, 0, v, 1, 0),
    "translate_x": lambda image, v: moved(image, 1, 0, int(v), 0, 1, 0),
    "translate_y": lambda image, v: moved(image, 1, 0, 0, 0, 1, int(v)),
    "rotate": lambda image, v: image.rotate(v, fillcolor=FILL),
    "brightness": enhanced(ImageEnhance.Brightness),
    "colour": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, v: ImageOps.posterize(image, 8 - round(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, 255 - v),
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "keep": lambda image, v: image,
}


@functools.cache
def compiled():
    return jax.jit(operations.change)


def changed(image, name, strength):
    stored = np.atleast_3d(np.asarray(image, np.float32))
    fill = np.asarray(FILL[: stored.shape[-1]], np.float32)
    return np.asarray(compiled()(stored, NAMES.index(name), np.float32(strength), fill))


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_pillows(name):
    place = NAMES.index(name)
    signs = (1, -1) if place < operations.SIGNED else (1,)
    for largest in (operations.WIDE[place], operations.NARROW[place]):
        largest *= 37 if largest == 150 / 331 else 1
        for strength in (sign * level / 30 * largest for sign in signs for level in (0, 7, 19, 30)):
            expected = np.asarray(PILLOWS[name](PHOTO, strength), np.int32)
            found = changed(PHOTO, name, strength)
            np.testing.assert_array_equal(found, np.round(found))
            off = np.abs(found - expected)
            if place < len(MOVES):  # a place between two pixels may be rounded to the other one
                assert (off > 0).any(-1).mean() < 0.005
            else:
                assert off.max() <= 1 and (off > 0).mean() < 0.01


def test_images_of_one_channel_and_of_one_colour():
    grey = PHOTO.convert("L")
    for name in ("equalize", "autocontrast", "sharpness", "contrast"):
        expected = np.asarray(PILLOWS[name](grey, 0.5), np.int32)
        assert np.abs(changed(grey, name, 0.5)[..., 0] - expected).max() <= 1
    np.testing.assert_array_equal(changed(grey, "colour", 0.9)[..., 0], np.asarray(grey))
    plain = Image.new("RGB", PHOTO.size, (10, 200, 30))
    for name in ("equalize", "autocontrast"):
        np.testing.assert_array_equal(changed(plain, name, 0.0), np.asarray(plain))


def drawn(policy, uniforms, **options):
    """What a policy makes of one stored photo for each row of uniforms."""
    images = np.broadcast_to(np.asarray(PHOTO), (len(uniforms), 30, 37, 3))
    mean = tuple(float(level) for level in FILL)
    return np.asarray(
        jax.jit(Operations(policy, **options), static_argnums=2)(images, uniforms, mean)
    )


def test_randaugment_is_operations_of_one_magnitude_in_turn():
    uniforms = np.random.default_rng(0).random((24, 6), np.float32)
    found = drawn("randaugment", uniforms, number=2, magnitude=9.0)
    seen = set()
    for result, draws in zip(found, uniforms.reshape(-1, 2, 3), strict=True):
        image = PHOTO
        for which, _, sign in draws:
            place = math.floor(which * 14)
            strength = (
                0.9
                * operations.NARROW[place]
                * (-1 if sign < 0.5 and place < operations.SIGNED else 1)
            )
            strength *= {"translate_x": 37, "translate_y": 30}.get(NAMES[place], 1)
            image = PILLOWS[NAMES[place]](image, strength)
            seen.add(NAMES[place])
        # Two operations in turn: what differs by one level may be stretched by the second.
        assert np.mean(np.abs(result - np.asarray(image, np.int32)) > 3) < 0.01
    assert len(seen) > 10


def test_trivialaugment_draws_one_of_31_levels():
    rotate, rows = NAMES.index("rotate"), np.linspace(0, 1, 31, endpoint=False)
    uniforms = np.stack([np.full(31, (rotate + 0.5) / 14), rows + 1e-3, np.full(31, 0.9)], 1)
    found = drawn("trivialaugment", uniforms.astype(np.float32))
    for level, result in enumerate(found):
        expected = np.asarray(PHOTO.rotate(135 * level / 30, fillcolor=FILL), np.int32)
        if level != 20:  # by 90 degrees each place lies between two pixels of this image
            assert (result != expected).any(-1).mean() < 0.01


def test_other_white_levels_are_scaled_and_nothing_is_drawn_by_default():
    uniforms = np.asarray([[(NAMES.index("solarize") + 0.5) / 14, 0.999, 0.9]], np.float32)
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    found = Operations("trivialaugment", white_level=15)(images, uniforms, (3.0,))
    np.testing.assert_allclose(found, 15 - images.astype(np.float32), atol=1e-5)
    assert [Operations(policy).draws for policy in ("none", "trivialaugment")] == [0, 3]
    assert Operations("randaugment", number=3).draws == 9
    assert jnp.asarray(found).dtype == jnp.float32
