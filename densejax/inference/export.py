"""A trained network as one file that runs where JAX is, without this package."""

import jax
import jax.numpy as jnp

from densejax.inference.classifier import Classifier

ALLOWED = ("cpu", "cuda", "rocm", "tpu")


def serialise(network: Classifier, platforms: tuple[str, ...]) -> bytes:
    """A trained network as a serialised function of uint8 images to float32 logits.

    The devices of `platforms` need not be there.
    """

    def function(images):
        return network.logits(network.variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.uint8)
    return bytes(jax.export.export(jax.jit(function), platforms=platforms)(images).serialize())
