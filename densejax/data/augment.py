"""Normalisation and augmentation in jax.numpy, inside the step, one random key per example."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

GREY = (0.299, 0.587, 0.114)  # luminance of red, green and blue
CONTRAST, SATURATION = 1, 2  # 0: brightness
ORDERS = tuple(itertools.permutations((0, CONTRAST, SATURATION)))
# Rows: principal colours of ImageNet's pixels times the roots of their variances, in uint8 units.
LIGHTING = (
    255
    * np.array([[0.2175], [0.0188], [0.0045]])
    * np.array([[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]])
)


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
      crop_size: height and width of the ten crops that are evaluated; 0: the whole image.
      dtype: of the result.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shift: int = 0
    flip: bool = False
    jitter: float = 0.0
    lighting: float = 0.0
    image_size: int = 0
    crop_size: int = 0
    dtype: str = "float32"

    def evaluation(self, images: jax.Array) -> jax.Array:
        """Maps images uint8 [batch, height, width, channels] to normalised floats."""
        return self._resize(self._normalise(images))

    def views(self, images: jax.Array) -> jax.Array:
        """What is evaluated of images uint8 [batch, ...]: [views, batch, height, width, channels].

        One view, or ten: corners, centre and the mirrors of all five (Krizhevsky et al. 2012).
        """
        images, size = self.evaluation(images), self.crop_size
        if not size:
            return images[None]
        top, left = images.shape[1] - size, images.shape[2] - size
        places = ((0, 0), (0, left), (top, 0), (top, left), (top // 2, left // 2))
        crops = jnp.stack([images[:, y : y + size, x : x + size] for y, x in places])
        return jnp.concatenate([crops, crops[:, :, :, ::-1]])

    def training(self, images: jax.Array, keys: jax.Array) -> jax.Array:
        """The same with random mirroring and shifts, drawn from one key per example.

        The order is the authors': colours, normalise, mirror, pad with zeros (the mean colour),
        crop.
        """
        # One draw for everything: each threefry call costs seconds of compilation on a CPU.
        recolours = bool(self.jitter or self.lighting)
        bits = jax.vmap(lambda key: jax.random.bits(key, (10 if recolours else 3,)))(keys)
        if recolours:
            # In 64-bit mode a draw has 64 bits; 32 are what is scaled below.
            images = self._recolour(images, bits[:, 3:].astype(jnp.uint32))
        images = self._normalise(images)
        if self.flip:
            mirrored = (bits[:, 0] & 1).astype(bool)
            images = jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        if self.shift:
            offsets = bits[:, 1:] % jnp.uint32(2 * self.shift + 1)
            images = jax.vmap(self._crop)(images, offsets.astype(jnp.int32))
        return self._resize(images)

    def _recolour(self, images, bits):
        """Colour jitter, then PCA lighting (Krizhevsky et al. 2012, section 4.1), unclipped.

        Each is affine in an image's colours, and contrast needs the mean colour alone, so all of
        them are one matrix and one offset per image: pixels are read once more, not four times.
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

    def _crop(self, image, offset):
        padding = ((self.shift, self.shift), (self.shift, self.shift), (0, 0))
        start = (offset[0], offset[1], jnp.int32(0))
        return jax.lax.dynamic_slice(jnp.pad(image, padding), start, image.shape)

    def _resize(self, images):
        if self.image_size:
            shape = (images.shape[0], self.image_size, self.image_size, images.shape[-1])
            images = jax.image.resize(images, shape, "bilinear")
        return images.astype(self.dtype)


def example_keys(key: jax.Array, positions: jax.Array) -> jax.Array:
    """One key per example, from the step's key and places int32 [batch] in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
