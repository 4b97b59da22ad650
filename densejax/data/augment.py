"""Normalisation and augmentation in jax.numpy, inside the step, one random key per example."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from densejax.data.mixing import Erasing, Mixing
from densejax.data.operations import Operations

GREY = (0.299, 0.587, 0.114)  # luminance of red, green and blue
CONTRAST, SATURATION = 1, 2  # 0: brightness
ORDERS = tuple(itertools.permutations((0, CONTRAST, SATURATION)))
# Rows: principal colours of ImageNet's pixels times the roots of their variances, in uint8 units.
LIGHTING = (
    255
    * np.array([[0.2175], [0.0188], [0.0045]])
    * np.array([[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]])
)
# Which of an example's random words each part reads; mirror and shifts read the first three.
COLOURS, ERASING, MIXING, OPERATIONS = slice(3, 10), slice(10, 17), slice(17, 21), slice(21, None)


def reverse(array: jax.Array) -> jax.Array:
    """Each example's partner in a whole batch: the first has the last as its partner, and so on."""
    return array[::-1]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How stored images become the network's input.

    Attributes:
      mean: per channel, in uint8 units.
      std: per channel, in uint8 units.
      shift: pixels of padding on each side before the random crop; 0: none.
      flip: mirror half of the images.
      jitter: brightness, contrast and saturation change by factors of 1 - jitter to 1 + jitter.
      lighting: standard deviation of the shift along the principal colours, `LIGHTING`.
      image_size: height and width after a bilinear resize, antialiased where it shrinks; 0: as
        stored.
      operations: those of RandAugment or TrivialAugment, on the images as they are stored.
      erasing: of rectangles, after the shift.
      mixing: of each image with a partner; it comes last.
      crop_size: height and width of the ten crops that are evaluated; 0: the whole image.
      view_shift: two images shifted by so many pixels are evaluated beside the image; 0: none.
      view_mirror: evaluate mirrored views, too; ten crops always have them.
      dtype: of the result.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int = 0
    flip: bool = False
    jitter: float = 0.0
    lighting: float = 0.0
    image_size: int = 0
    operations: Operations = Operations()
    erasing: Erasing = Erasing()
    mixing: Mixing = Mixing()
    crop_size: int = 0
    view_shift: int = 0
    view_mirror: bool = False
    dtype: str = "float32"

    def evaluation(self, images: jax.Array) -> jax.Array:
        """Maps images uint8 [batch, height, width, channels] to normalised floats."""
        return self._resize(self._normalise(images))

    def views(self, images: jax.Array) -> jax.Array:
        """Views of images uint8 [batch, ...] to evaluate: [views, batch, height, width, channels].

        Ten crops are the corners, the centre and the mirrors of all five (Krizhevsky et al. 2012).
        Otherwise the views are the image and, as in airbench (Jordan, arXiv:2404.00498), the image
        shifted to both ends of a diagonal. Each may also be mirrored. Pixels that come in from
        outside the image have the mean colour.
        """
        images, size, shift = self.evaluation(images), self.crop_size, self.view_shift
        height, width = images.shape[1:3]
        places = ((shift, shift), (0, 0), (2 * shift, 2 * shift)) if shift else ((0, 0),)
        if size:
            top, left = height - size, width - size
            places = ((0, 0), (0, left), (top, 0), (top, left), (top // 2, left // 2))
            height = width = size
        images = _pad(images, shift)
        views = jnp.stack([images[:, y : y + height, x : x + width] for y, x in places])
        mirrors = self.view_mirror or size
        return jnp.concatenate([views, views[:, :, :, ::-1]]) if mirrors else views

    def training(
        self,
        batch: dict[str, jax.Array],
        keys: jax.Array,
        partners: Callable[[jax.Array], jax.Array] = reverse,
    ) -> tuple[jax.Array, jax.Array]:
        """Augments and normalises a training batch, with draws from one key per example.

        The order is that of the authors, with newer parts added: operations, colours, normalise,
        mirror, pad with zeros (the mean colour), crop, erase, resize, mix.

        Args:
          batch: image uint8 [batch, height, width, channels], label int32 [batch] and, if the data
            decide which examples are mirrored, mirrored bool [batch].
          keys: one for each example.
          partners: maps an array [batch, ...] to that of the examples to mix with.

        Returns:
          Images, and labels: int32 [batch], or their probabilities [batch, classes] where images
          are mixed.
        """
        # One draw for everything: each threefry call costs seconds of compilation on a CPU.
        number = OPERATIONS.start + self.operations.draws
        bits = jax.vmap(lambda key: jax.random.bits(key, (number,)))(keys)
        # In 64-bit mode a draw has 64 bits; only 32 of them are scaled below.
        words, images = bits.astype(jnp.uint32), batch["image"]
        uniforms = (words >> 8).astype(jnp.float32) * 2.0**-24
        if self.operations.draws:
            images = self.operations(images, uniforms[:, OPERATIONS], self.mean)
        if self.jitter or self.lighting:
            images = self._recolour(images, words[:, COLOURS])
        images = self._normalise(images)
        if self.flip:
            mirrored = batch.get("mirrored", (bits[:, 0] & 1).astype(bool))
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        if self.shift:
            offsets = bits[:, 1:3] % jnp.uint32(2 * self.shift + 1)
            crop = jax.vmap(functools.partial(_crop, shape=images.shape[1:]))
            images = crop(_pad(images, self.shift), offsets.astype(jnp.int32))
        images = self._resize(self.erasing(images, uniforms[:, ERASING]))
        return self.mixing(images, batch["label"], partners, uniforms[:, MIXING])

    def _recolour(self, images, bits):
        """Colour jitter, then PCA lighting (Krizhevsky et al. 2012, section 4.1), unclipped.

        Each change is affine in an image's colours, and contrast needs only the mean colour. So all
        changes are one matrix and one offset per image: pixels are read once more, not four times.
        """
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        images = images.astype(dtype)
        uniforms = (bits[:, :6] >> 8).astype(dtype) * 2.0**-24
        factors = 1 + self.jitter * (2 * uniforms[:, :3] - 1)
        order = jnp.asarray(ORDERS)[bits[:, 6] % jnp.uint32(len(ORDERS))]
        # The middle of each of 2**24 intervals: neither end is infinite.
        normals = jax.scipy.special.ndtri(uniforms[:, 3:] + 2.0**-25)
        mixers = jax.vmap(self._mixer)(images.mean((1, 2)), factors, order)
        matrix, offset = (array[:, None, None] for array in mixers)
        offset += (normals * self.lighting @ jnp.asarray(LIGHTING, dtype))[:, None, None]
        # Three products, not a matrix product: accelerators would round its operands to bfloat16.
        return sum(images[..., c, None] * matrix[..., c] for c in range(3)) + offset

    def _mixer(self, mean, factors, order):
        """The matrix [colour out, colour in] and the offset [colour] of one image's jitter."""
        grey, eye = jnp.asarray(GREY, mean.dtype), jnp.eye(3, dtype=mean.dtype)
        matrix, offset = eye, jnp.zeros_like(mean)
        for which in order:
            factor = factors[which]
            rest = 1 - factor  # the share of what is blended in
            level = (grey * ((matrix * mean).sum(-1) + offset)).sum()
            blend = factor * eye + jnp.where(which == SATURATION, rest * grey, 0)
            matrix, offset = blend @ matrix, blend @ offset
            offset += jnp.where(which == CONTRAST, rest * level, 0)
        return matrix, offset

    def _normalise(self, images):
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        mean, std = jnp.asarray(self.mean, dtype), jnp.asarray(self.std, dtype)
        return (images.astype(dtype) - mean) / std

    def _resize(self, images):
        if self.image_size:
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[-1])
            images = jax.image.resize(images, shape, "bilinear")
        return images.astype(self.dtype)


def _pad(images, pixels):
    return jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))


def _crop(image, offset, shape):
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.int32(0)), shape)


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """One key per example, from the step's key and places int32 [batch] in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
