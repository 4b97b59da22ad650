"""Losses by name: each gives the loss of every example, and the step takes their mean."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from densejax.config import UserError

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> [batch]


def targets(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The wanted probability of each class [batch, classes].

    Args:
      logits: float [batch, classes].
      labels: int32 [batch], or probabilities [batch, classes] themselves.
      smoothing: epsilon of label smoothing (Szegedy et al. 2016, section 7): this much of the
        target's mass is spread evenly over all classes.
    """
    classes = logits.shape[-1]
    if labels.ndim == 1:
        labels = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    return labels.astype(logits.dtype) * (1 - smoothing) + smoothing / classes


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of the softmax in nats, float32 [batch]; arguments as for `targets`."""
    return optax.softmax_cross_entropy(logits, targets(logits, labels, smoothing))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Each class against the rest, summed over classes, in nats, float32 [batch].

    Wightman et al., arXiv:2110.00476, section 2.1; arguments as for `targets`.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets(logits, labels, smoothing)).sum(-1)


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def create(name: str, smoothing: float = 0.0) -> Loss:
    """The loss of a name in `LOSSES`; UserError for another name."""
    if name not in LOSSES:
        raise UserError(f"train.loss = {name!r}: allowed are {', '.join(LOSSES)}")
    return functools.partial(LOSSES[name], smoothing=smoothing)


def balanced(loss: Loss, labels: Callable[[], np.ndarray]) -> Loss:
    """A loss where every class has the same weight, however many examples it has.

    The loss of an example is multiplied by the weight n / (classes x examples of its class). An
    example that belongs partly to several classes gets the mean of their weights. The mean of the
    weights over the training examples is 1.

    Args:
      loss: of each example.
      labels: returns the labels of all n training examples; called when the loss is traced.
    """

    def weighted(logits, wanted):
        counts = np.bincount(labels(), minlength=logits.shape[-1])
        with np.errstate(divide="ignore"):  # a class that no example has
            weights = np.where(counts, counts.sum() / (counts > 0).sum() / counts, 0)
        weights = jnp.asarray(weights, logits.dtype)
        return loss(logits, wanted) * (targets(logits, wanted) * weights).sum(-1)

    return weighted
