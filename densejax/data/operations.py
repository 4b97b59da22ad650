"""RandAugment and TrivialAugment: Pillow's operations on images in jax.numpy.

Cubuk et al., arXiv:1909.13719, and Mueller and Hutter, arXiv:2103.10158. The operations and their
largest strengths are those of torchvision's RandAugment and TrivialAugmentWide. Each operation
takes one image, float32 [height, width, channels] of whole numbers from 0 to 255, and gives one.
"""

import dataclasses

import jax
import jax.numpy as jnp

LEVELS = 30  # TrivialAugment draws zero or one of so many levels above it


def _move(image, which, strength, fill):
    """Moves the nearest pixel to each place; what comes from outside of the image is `fill`.

    The pixel that comes to (x, y) was at (ax + by + c, dx + ey + f), in pixels from the upper left
    corner.
    """
    height, width, _ = image.shape
    x, y, angle, pixels = width / 2, height / 2, jnp.deg2rad(strength), jnp.trunc(strength)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    moves = (  # each a to f, in the order of `MOVES`
        (1, strength, 0, 0, 1, 0),
        (1, 0, 0, strength, 1, 0),
        (1, 0, pixels, 0, 1, 0),
        (1, 0, 0, 0, 1, pixels),
        (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y),
        (1, 0, 0, 0, 1, 0),  # stays
    )
    a, b, c, d, e, f = jnp.asarray(moves, image.dtype)[which]
    y, x = (jnp.arange(side, dtype=image.dtype) + 0.5 for side in (height, width))
    y = y[:, None]
    column, row = (
        jnp.floor(place).astype(jnp.int32) for place in (a * x + b * y + c, d * x + e * y + f)
    )
    is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    moved = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(is_inside[..., None], moved, fill)


# --- Changes of colour.


def _brightness(image, strength):
    return _blend(jnp.zeros_like(image), image, strength)


def _colour(image, strength):
    return _blend(_grey(image), image, strength)


def _contrast(image, strength):
    return _blend(jnp.floor(_grey(image).mean() + 0.5), image, strength)


def _sharpness(image, strength):
    rows = image[:-2] + image[1:-1] + image[2:]
    middle = image[1:-1, 1:-1]
    nine = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    smooth = jnp.floor((nine + 4 * middle) / 13 + 0.5)
    return _blend(image.at[1:-1, 1:-1].set(smooth), image, strength)


def _posterize(image, strength):
    lost_bits = jnp.round(strength).astype(jnp.int32)
    return ((image.astype(jnp.int32) >> lost_bits) << lost_bits).astype(image.dtype)


def _solarize(image, strength):
    return jnp.where(image < 255 - strength, image, 255 - image)


def _autocontrast(image, strength):
    low, high = image.min((0, 1)), image.max((0, 1))
    # A result that should be a whole number may come out a little smaller. All other results are
    # at least 1/255 away from a whole number.
    wide = jnp.floor((image - low) * 255 / jnp.maximum(high - low, 1) + 2.0**-10)
    return jnp.where(high > low, wide, image)


def _equalize(image, strength):
    def of_channel(values):
        counts = jnp.bincount(values, length=256).astype(jnp.int32)
        before = jnp.cumsum(counts, dtype=jnp.int32) - counts
        step = (len(values) - counts[values.max()]) // 255
        table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[values], values)

    values = image.reshape(-1, image.shape[-1]).astype(jnp.int32)
    found = jax.vmap(of_channel, 1, 1)(values)
    return found.reshape(image.shape).astype(image.dtype)


def _keep(image, strength):
    return image


def _blend(other, image, strength):
    """Pillow's enhancements: multiplies the difference from the other image by 1 + strength."""
    return jnp.clip(jnp.floor(other + (1 + strength) * (image - other)), 0, 255)


def _grey(image):
    """Pillow's luminance of RGB; with another number of channels, their mean."""
    if image.shape[-1] != 3:
        return jnp.floor(image.mean(-1, keepdims=True) + 0.5)
    red, green, blue = (image[..., i : i + 1] for i in range(3))
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOURS = (_brightness, _colour, _contrast, _sharpness)
COLOURS += (_posterize, _solarize, _autocontrast, _equalize, _keep)
SIGNED = 9  # the first so many, in this order, have a random sign
# The largest strength of each, in this order; for RandAugment's translations a share of the side.
NARROW = (0.3, 0.3, 150 / 331, 150 / 331, 30.0, 0.9, 0.9, 0.9, 0.9, 4.0, 255.0, 0.0, 0.0, 0.0)
WIDE = (0.99, 0.99, 32.0, 32.0, 135.0, 0.99, 0.99, 0.99, 0.99, 6.0, 255.0, 0.0, 0.0, 0.0)


def change(image: jax.Array, which: jax.Array, strength: jax.Array, fill: jax.Array) -> jax.Array:
    """Applies one operation to one image: number `which`, traced, of `MOVES` and `COLOURS`.

    A switch over a batch computes each branch for all images. So all moves share one gather.
    """
    image = _move(image, jnp.minimum(which, len(MOVES)), strength, fill)
    colour = jnp.where(which < len(MOVES), len(COLOURS) - 1, which - len(MOVES))
    return jax.lax.switch(colour, COLOURS, image, strength)


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations on each image; each is drawn from `MOVES` and `COLOURS`.

    Attributes:
      policy: "randaugment", "trivialaugment" (one operation, its level drawn as well) or "none".
      number: how many operations RandAugment applies to an image, one after the other.
      magnitude: of RandAugment's strengths, from 0 to 10 for the largest, as in its paper;
        torchvision counts to 30.
      white_level: the stored value that stands for 255.
    """

    policy: str = "none"
    number: int = 2
    magnitude: float = 9.0
    white_level: int = 255

    @property
    def draws(self) -> int:
        """How many random numbers an image needs."""
        return {"none": 0, "randaugment": 3 * self.number, "trivialaugment": 3}[self.policy]

    def __call__(
        self, images: jax.Array, uniforms: jax.Array, mean: tuple[float, ...]
    ) -> jax.Array:
        """Maps stored images [batch, height, width, channels] to the same in float32.

        Args:
          images: uint8.
          uniforms: float32 [batch, draws] in [0, 1).
          mean: of each channel; it fills the places that a moved image leaves empty.
        """
        _, height, width, channels = images.shape
        scale, wide = 255 / self.white_level, self.policy == "trivialaugment"
        sides = (1, 1, width, height) + (1,) * 10
        narrow = [share * side for share, side in zip(NARROW, sides, strict=True)]
        largest = jnp.asarray(WIDE if wide else narrow, jnp.float32)
        fill = jnp.broadcast_to(jnp.round(jnp.asarray(mean, jnp.float32) * scale), (channels,))

        def one(images, uniforms):
            which = jnp.floor(uniforms[:, 0] * len(largest)).astype(jnp.int32)
            level = (
                jnp.floor(uniforms[:, 1] * (LEVELS + 1)) / LEVELS if wide else self.magnitude / 10
            )
            sign = jnp.where((uniforms[:, 2] < 0.5) & (which < SIGNED), -1.0, 1.0)
            strength = (sign * level).astype(jnp.float32) * largest[which]
            return jax.vmap(change, (0, 0, 0, None))(images, which, strength, fill), None

        rounds = uniforms.reshape(len(images), -1, 3).swapaxes(0, 1)
        images, _ = jax.lax.scan(one, jnp.round(images.astype(jnp.float32) * scale), rounds)
        return images / scale
