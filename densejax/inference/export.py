"""Writes a trained network as one file that needs JAX, but not this package, to run."""

import jax
import jax.numpy as jnp

from densejax.inference.classifier import Classifier

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def serialise(network: Classifier, platforms: tuple[str, ...]) -> bytes:
    """Serialises the function from uint8 images to float32 logits for the given platforms.

    This machine need not have their devices.
    """

    def function(images):
        return network.logits(network.variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.uint8)
    return bytes(jax.export.export(jax.jit(function), platforms=platforms)(images).serialize())
