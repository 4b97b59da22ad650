"""Hides a part of an image or mixes two images: cutout, random erasing, mixup and cutmix.

All random numbers are arguments: `uniforms`, float32 [batch, n] in [0, 1), with n for each example.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

ASPECT = 0.3  # the least of an erased rectangle, height : width; the greatest is its inverse


@dataclasses.dataclass(frozen=True)
class Erasing:
    """Rectangles of an image, set to zero: after normalisation that is the mean colour.

    Attributes:
      cutout: height and width of a square around a random pixel, cut off at the image's edge
        (DeVries and Taylor, arXiv:1708.04552); even; 0: none.
      probability: of a rectangle within the image (Zhong et al., arXiv:1708.04896).
      area: its least and greatest share of the image, uniform between. Its aspect ratio is
        log-uniform between `ASPECT` and its inverse, as far as the rectangle fits.
    """

    cutout: int = 0
    probability: float = 0.0
    area: tuple[float, float] = (0.02, 0.4)

    def __call__(self, images: jax.Array, uniforms: jax.Array) -> jax.Array:
        """Erases in images [batch, height, width, channels]; seven uniforms for each."""
        sides = images.shape[1:3]
        if self.cutout:
            size = jnp.full(len(images), self.cutout, jnp.int32)
            images = jnp.where(_around_a_pixel(sides, uniforms[:, :2], size, size), 0, images)
        if self.probability:
            is_inside = self._rectangle(sides, uniforms[:, 2:6])
            is_erased = is_inside & (uniforms[:, 6] < self.probability)[:, None, None, None]
            images = jnp.where(is_erased, 0, images)
        return images

    def _rectangle(self, sides, uniforms):
        least, greatest = self.area
        area = sides[0] * sides[1] * (least + (greatest - least) * uniforms[:, 0])
        tallest = sides[0] ** 2 / area
        lowest = jnp.minimum(jnp.maximum(ASPECT, area / sides[1] ** 2), tallest)
        highest = jnp.maximum(jnp.minimum(1 / ASPECT, tallest), lowest)
        aspect = lowest * (highest / lowest) ** uniforms[:, 1]
        height, width = (jnp.round(jnp.sqrt(area * ratio)) for ratio in (aspect, 1 / aspect))
        top = jnp.floor(uniforms[:, 2] * (sides[0] - height + 1))
        left = jnp.floor(uniforms[:, 3] * (sides[1] - width + 1))
        return _rectangle(sides, top, left, top + height, left + width)


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mixes each image and its label with those of a partner.

    An image keeps the share lambda of itself. Lambda is drawn from Beta(alpha, alpha) for each
    image (the authors draw one for a batch: the mean loss is the same, but varies more). If both
    alphas are above 0, one of the two methods is chosen at random for each image, as in timm.

    Attributes:
      mixup: alpha of Zhang et al., arXiv:1710.09412: both images are added with weights; 0: none.
      cutmix: alpha of Yun et al., arXiv:1905.04899: the partner fills a rectangle around a random
        pixel, cut off at the image's edge; lambda is then the share that is left; 0: none.
      classes: the number of classes of the labels.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    classes: int = 0

    def __call__(
        self,
        images: jax.Array,
        labels: jax.Array,
        partners: Callable[[jax.Array], jax.Array],
        uniforms: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the mixed images, and labels as probabilities, float32 [batch, classes].

        Args:
          images: float [batch, height, width, channels].
          labels: int32 [batch].
          partners: maps an array [batch, ...] to that of the partners.
          uniforms: four for each image.
        """
        if not (self.mixup or self.cutmix):
            return images, labels
        cuts = uniforms[:, 0] < (0.5 if self.mixup and self.cutmix else float(self.cutmix > 0))
        drawn = (_beta(alpha or 1.0, uniforms[:, 1]) for alpha in (self.cutmix, self.mixup))
        share = jnp.where(cuts, *drawn)
        sides = images.shape[1:3]
        height, width = ((side * jnp.sqrt(1 - share)).astype(jnp.int32) for side in sides)
        is_filled = _around_a_pixel(sides, uniforms[:, 2:4], height, width)
        left = 1 - is_filled.mean((1, 2, 3), dtype=jnp.float32)
        pixels = (slice(None), None, None, None)
        kept = jnp.where(cuts[pixels], (~is_filled).astype(jnp.float32), share[pixels])
        dtype = jnp.promote_types(images.dtype, jnp.float32)
        own, other = images.astype(dtype), partners(images).astype(dtype)
        mixed = (kept * own + (1 - kept) * other).astype(images.dtype)
        share = jnp.where(cuts, left, share)[:, None]
        labels = jax.nn.one_hot(labels, self.classes, dtype=jnp.float32)
        return mixed, share * labels + (1 - share) * partners(labels)


def _beta(alpha: float, uniform: jax.Array) -> jax.Array:
    """Draws from Beta(alpha, alpha): its quantiles, exact at 4,097 points and linear between.

    jax.random.beta is exact everywhere, but its loops take 4 s to compile on a CPU.
    """
    points = np.linspace(0, 1, 4097)
    quantiles = scipy.special.betaincinv(alpha, alpha, points)
    return jnp.interp(uniform, *(jnp.asarray(array, jnp.float32) for array in (points, quantiles)))


def _around_a_pixel(sides, uniforms, height, width):
    """The rectangles of a height and width, int32 [batch], around a random pixel."""
    row, column = (jnp.floor(uniforms[:, i] * sides[i]).astype(jnp.int32) for i in range(2))
    half_height, half_width = height // 2, width // 2
    top, left = row - half_height, column - half_width
    return _rectangle(sides, top, left, row + half_height, column + half_width)


def _rectangle(sides, top, left, bottom, right):
    """Where the pixels of rectangles are, bool [batch, height, width, 1]."""
    row, column = (jnp.arange(side, dtype=top.dtype) for side in sides)
    rows = (row >= top[:, None]) & (row < bottom[:, None])
    columns = (column >= left[:, None]) & (column < right[:, None])
    return (rows[:, :, None] & columns[:, None])[..., None]
