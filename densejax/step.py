"""The training and evaluation step of ONE replica; parallel.map_step maps them over devices."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from densejax import metrics
from densejax.data.augment import Preparation, example_keys

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Task:
    """What stays the same from step to step.

    Attributes:
      model: a network of densejax.models.
      optimizer: from densejax.optimizer.create.
      preparation: from stored images to the network's input.
      image_shape: stored (height, width, channels).
      seed: every random draw is a function of it and the step.
      label_smoothing: of the training loss.
      log_every: steps after which the training metrics start anew.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    preparation: Preparation
    image_shape: tuple[int, int, int]
    seed: int = 0
    label_smoothing: float = 0.0
    log_every: int = 50


class TrainState(struct.PyTreeNode):
    """Everything that a step changes and a checkpoint holds.

    Attributes:
      step: int32, steps done.
      params: float32.
      batch_stats: float32, BatchNorm's running mean and (biased) variance.
      opt_state: of the optimizer.
      metrics: sums over the training examples seen since the last multiple of `log_every`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    metrics: metrics.Sums


def init_state(task: Task, dtype: Any = jnp.float32) -> TrainState:
    """The state before the first step, drawn from the task's seed. Call it under jit."""
    images = jnp.zeros((1, *task.image_shape), jnp.uint8)
    variables = task.model.init(jax.random.key(task.seed), task.preparation.evaluation(images))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=task.optimizer.init(variables["params"]),
        metrics=metrics.zeros(task.model.num_classes, dtype),
    )


def train_step(
    task: Task, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, metrics.Sums]:
    """One step of SGD on this replica's share of the batch.

    Args:
      task: what stays the same.
      state: replicated.
      batch: image uint8 [local batch, height, width, channels], label int32 [local batch].

    Returns:
      The new state and its metrics, both replicated.
    """
    # Gradients of replicated parameters would come summed over replicas; of varying ones they
    # are this replica's own, under shard_map and pmap alike.
    params = jax.lax.pcast(state.params, AXIS, to="varying")
    labels = batch["label"]
    positions = jax.lax.axis_index(AXIS) * len(labels) + jnp.arange(len(labels), dtype=jnp.int32)
    keys = example_keys(jax.random.fold_in(jax.random.key(task.seed), state.step), positions)
    images = task.preparation.training(batch["image"], keys)

    def loss_of(params):
        (logits, _), updates = task.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            keys=jax.random.key_data(keys),
            mutable=["batch_stats"],
        )
        losses = metrics.cross_entropy(logits, labels, task.label_smoothing)
        return losses.mean(), (logits, losses, updates["batch_stats"])

    gradient, (logits, losses, batch_stats) = jax.grad(loss_of, has_aux=True)(params)
    gradient = jax.lax.pmean(gradient, AXIS)
    if task.model.batch_norm_axis is None:  # otherwise they are equal already
        batch_stats = jax.lax.pmean(batch_stats, AXIS)
    updates, opt_state = task.optimizer.update(gradient, state.opt_state, state.params)

    seen = metrics.sums(logits, labels, losses, jnp.ones(labels.shape, bool))
    starts_anew = state.step % task.log_every == 0
    sums = jax.tree.map(
        lambda old, new: jnp.where(starts_anew, jnp.zeros_like(old), old) + new,
        state.metrics,
        jax.lax.psum(seen, AXIS),
    )
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        metrics=sums,
    )
    return state, sums


def eval_step(task: Task, state: TrainState, batch: dict[str, jax.Array]) -> metrics.Sums:
    """Metrics of this replica's share of an evaluation batch, summed over all replicas.

    Args:
      task: what stays the same.
      state: replicated; its running statistics are used and not changed.
      batch: as for `train_step`, and mask bool [local batch], false for padding.
    """
    logits, _ = task.model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        task.preparation.evaluation(batch["image"]),
    )
    losses = metrics.cross_entropy(logits, batch["label"])
    return jax.lax.psum(metrics.sums(logits, batch["label"], losses, batch["mask"]), AXIS)
