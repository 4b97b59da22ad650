"""Metrics as sums over examples: a mean is taken once, at the end, over all of them."""

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]


def zeros(classes: int, dtype=jnp.float32) -> Sums:
    """The sums before any example; top-5 is counted if there are more than five classes."""
    names = ("loss", "correct") + (("correct_top5",) if classes > 5 else ())
    return {name: jnp.zeros((), dtype) for name in names} | {"count": jnp.zeros((), jnp.int32)}


def sums(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array) -> Sums:
    """Sums over the examples whose mask is true.

    Args:
      logits: float [batch, classes].
      labels: int32 [batch], or probabilities [batch, classes]: the most probable class counts.
      losses: float [batch].
      mask: bool [batch], false for padding.

    Returns:
      "loss", "correct", "correct_top5" (more than five classes) and "count", scalars.
    """
    if labels.ndim > 1:
        labels = labels.argmax(-1)
    # Every other logit that is not below the label's counts against it, also a tie and a NaN.
    below = logits < jnp.take_along_axis(logits, labels[:, None], 1)
    rank = logits.shape[-1] - 1 - below.sum(-1)
    result = {
        "loss": jnp.where(mask, losses, 0).sum(),
        "correct": (mask & (rank < 1)).sum(dtype=losses.dtype),
        "correct_top5": (mask & (rank < 5)).sum(dtype=losses.dtype),
        "count": mask.sum(dtype=jnp.int32),
    }
    return {name: result[name] for name in zeros(logits.shape[-1])}


def means(sums: Sums) -> dict[str, float]:
    """Means per example: "loss" in nats, "accuracy" and "top5_accuracy" in [0, 1]."""
    sums = jax.device_get(sums)
    names = {"loss": "loss", "correct": "accuracy", "correct_top5": "top5_accuracy"}
    return {name: float(sums[key] / sums["count"]) for key, name in names.items() if key in sums}
