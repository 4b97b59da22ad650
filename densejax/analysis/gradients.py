"""The size of each layer's gradient before the first step: do gradients vanish with depth?"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax import models
from densejax.models import counts
from densejax.models.convolution import quick_compilation
from densejax.training import losses


def kernel_norms(
    model: nn.Module, images: jax.Array, labels: jax.Array, seed: int = 0
) -> dict[str, float]:
    """Euclidean norms of the gradient of each kernel, at initialisation.

    The loss is the mean cross-entropy of a batch, with batch statistics, as in the first step.

    Args:
      model: from densejax.models.create.
      images: float [batch, height, width, channels], normalised.
      labels: int32 [batch].
      seed: of the parameters.

    Returns:
      Norms by layer, such as "block1/layer1/conv1", from the image to the classifier; the
      projection of a shortcut comes after the layers that it skips.
    """
    model = models.reference(model)
    names = [row.name for row in counts.layers(model, images.shape[1:], depth=9)]

    @functools.partial(jax.jit, compiler_options=quick_compilation(jax.default_backend()))
    def norms(key, images, labels):
        variables = model.init(key, images[:1])

        def loss(params):
            inputs = variables | {"params": params}
            (logits, _), _ = model.apply(inputs, images, train=True, mutable=["batch_stats"])
            return losses.cross_entropy(logits, labels).mean()

        gradients = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(variables["params"]))
        return {
            "/".join(part.key for part in path[:-1]): jnp.linalg.norm(leaf.ravel())
            for path, leaf in gradients
            if path[-1].key == "kernel"
        }

    found = jax.device_get(norms(jax.random.key(seed), images, labels))
    return {name: float(found[name]) for name in names if name in found}
