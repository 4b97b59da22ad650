"""The training and evaluation step of ONE replica; parallel.map_step maps them over devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from flax import struct

from densejax.config import UserError
from densejax.data.augment import Preparation, example_keys
from densejax.models.normalization import at_least_float32
from densejax.training import losses, metrics
from densejax.training.losses import Loss
from densejax.training.optimizer import Schedule
from densejax.training.parallel import AXIS, Axis, reverse


@dataclasses.dataclass(frozen=True)
class Task:
    """What stays the same from step to step.

    Attributes:
      model: a network of densejax.models.
      optimizer: from densejax.training.optimizer.create.
      learning_rate: of the next step, from the number of steps done; it is only reported.
      preparation: from stored images to the network's input.
      image_shape: stored (height, width, channels).
      loss: of each training example, from (logits, labels or their probabilities).
      evaluation_loss: the same of each evaluated example.
      log_every: steps after which the training metrics start anew.
      axis: of the devices, as `parallel.axis` names it.
      batch_norm_axis: the part of it that BatchNorm's statistics are averaged over.
      accumulate_steps: number of micro-batches, one after the other; a step's gradient is the mean
        of theirs.
      average_decay: of the variables' moving average, which is evaluated in their place; 0: none.
      hold: stops the gradients of parameters that do not learn.
      head: the same task where the classifier alone learns, for the first steps; None: there are
        no such steps.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    preparation: Preparation
    image_shape: tuple[int, int, int]
    loss: Loss = losses.cross_entropy
    evaluation_loss: Loss = losses.cross_entropy
    log_every: int = 50
    axis: Axis = AXIS
    batch_norm_axis: Axis | None = AXIS
    accumulate_steps: int = 1
    average_decay: float = 0.0
    hold: Callable[[Any], Any] = lambda params: params
    head: "Task | None" = None

    @property
    def network_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) that the network reads: images may be resized before it."""
        size = self.preparation.image_size
        return (size, size, self.image_shape[-1]) if size else self.image_shape


class TrainState(struct.PyTreeNode):
    """Everything that a step changes and a checkpoint holds.

    Attributes:
      step: int32, steps done.
      key: uint32 [2], made from the run's seed; every draw is a function of the key and the step.
        It is data, not a constant of the program: so one compiled step works for all seeds.
      params: float32.
      batch_stats: float32, BatchNorm's running mean and (biased) variance; {} without BatchNorm.
      opt_state: of the optimizer.
      average: {"params", "batch_stats"}, averaged over steps; {} where nothing is averaged.
      metrics: sums over the training examples seen since the last multiple of `log_every`.
      skipped: int32 [2], steps that changed nothing but `step`, because something in them was not
        finite: all so far, and those in a row up to now.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    metrics: metrics.Sums
    skipped: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated: {"params", "batch_stats"}, the averages where there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


def init_state(task: Task, seed: jax.Array, dtype: Any = jnp.float32) -> TrainState:
    """The state before the first step, drawn from a seed, uint32. Call it under jit."""
    key = jax.random.key(seed)
    images = jnp.zeros((1, *task.image_shape), jnp.uint8)
    variables = task.model.init(key, task.preparation.evaluation(images))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), {"batch_stats": {}} | variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=task.optimizer.init(variables["params"]),
        average=jax.tree.map(jnp.copy, variables) if task.average_decay else {},
        metrics=metrics.zeros(task.model.num_classes, dtype),
        skipped=jnp.zeros(2, jnp.int32),
    )


def train_step(
    task: Task, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, metrics.Sums]:
    """One step of the optimizer on this replica's share of the batch.

    The step is skipped, on every replica, if the loss, the gradient or the new running statistics
    are not finite (or so large that their squares are not): parameters, optimizer state and running
    statistics stay as they were.

    Args:
      task: what stays the same.
      state: replicated.
      batch: the local batch, as `Preparation.training` takes it.

    Returns:
      The new state, and its metrics with the step's "learning_rate" and the state's "skipped"; all
      replicated.
    """
    # For replicated parameters, JAX would return gradients summed over replicas. For parameters
    # marked as varying, they are this replica's own, under both shard_map and pmap.
    axis, unsynced_axes = task.axis, _unsynced_axes(task)
    params = jax.lax.pcast(state.params, axis, to="varying")
    size = len(batch["label"])
    positions = jax.lax.axis_index(axis) * size + jnp.arange(size, dtype=jnp.int32)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    keys = jax.random.key_data(example_keys(step_key, positions))

    def gradient_of(batch_stats, part):
        """(BatchNorm's new statistics, (this replica's gradient, its metric sums))."""
        keys = jax.random.wrap_key_data(part["key"])
        partners = functools.partial(reverse, axis=axis)
        images, labels = task.preparation.training(part, keys, partners)

        def loss_of(params):
            (logits, _), updates = task.model.apply(
                {"params": task.hold(params), "batch_stats": batch_stats},
                images,
                train=True,
                keys=part["key"],
                mutable=["batch_stats"],
            )
            logits = at_least_float32(logits)
            of_each = task.loss(logits, labels)
            if of_each.shape != part["label"].shape:
                raise UserError(
                    f"train.loss: it gives an array {list(of_each.shape)} for "
                    f"{len(part['label'])} images; give one number for each image"
                )
            return of_each.mean(), (logits, of_each, updates.get("batch_stats", {}))

        gradient, (logits, of_each, batch_stats) = jax.grad(loss_of, has_aux=True)(params)
        everyone = jnp.ones(of_each.shape, bool)
        return batch_stats, (gradient, metrics.sums(logits, labels, of_each, everyone))

    batch_stats, batch = state.batch_stats, batch | {"key": keys}
    if unsynced_axes:
        batch_stats = jax.lax.pcast(batch_stats, unsynced_axes, to="varying")
    if (parts := task.accumulate_steps) == 1:
        batch_stats, (gradient, seen) = gradient_of(batch_stats, batch)
    else:
        # A part has every parts-th example: so it is the same on any number of devices.
        batch = jax.tree.map(
            lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch
        )

        def accumulate(carry, part):
            batch_stats, results = gradient_of(carry[0], part)
            return (batch_stats, jax.tree.map(jnp.add, carry[1], results)), None

        varying = (params, jax.lax.pcast(state.metrics, axis, to="varying"))
        nothing = jax.tree.map(jnp.zeros_like, varying)
        (batch_stats, (gradient, seen)), _ = jax.lax.scan(accumulate, (batch_stats, nothing), batch)
        gradient = jax.tree.map(lambda leaf: leaf / parts, gradient)
    gradient = jax.lax.pmean(gradient, axis)
    if unsynced_axes:
        batch_stats = jax.lax.pmean(batch_stats, unsynced_axes)
    updates, opt_state = task.optimizer.update(gradient, state.opt_state, state.params)
    seen = jax.lax.psum(seen, axis)
    params = optax.apply_updates(state.params, updates)
    done = state.step - state.skipped[0]  # as the optimizer and its schedule count
    average = state.average
    if task.average_decay:
        variables = {"params": params, "batch_stats": batch_stats}
        average = averaged(average, variables, task.average_decay, done)
    nothing_seen = jax.tree.map(jnp.zeros_like, seen)
    old = (state.params, state.batch_stats, state.opt_state, state.average, nothing_seen)
    new = (params, batch_stats, opt_state, average, seen)
    # One pass over everything. If the square of a gradient is finite, the update that an optimizer
    # makes of it is finite, too.
    flat, _ = jax.flatten_util.ravel_pytree((gradient, batch_stats, seen["loss"]))
    good = jnp.isfinite(jnp.vdot(flat, flat))
    params, batch_stats, opt_state, average, seen = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), new, old
    )

    starts_anew = state.step % task.log_every == 0
    sums = jax.tree.map(
        lambda old, new: jnp.where(starts_anew, jnp.zeros_like(old), old) + new, state.metrics, seen
    )
    rate = jnp.asarray(task.learning_rate(done))
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        average=average,
        metrics=sums,
        skipped=jnp.where(good, state.skipped.at[1].set(0), state.skipped + 1),
    )
    return state, sums | {"learning_rate": rate, "skipped": state.skipped}


def averaged(average: Any, variables: Any, decay: float, done: jax.Array) -> Any:
    """The moving average after a step that made `variables`; `done`: steps before it, int32.

    It moves by 1 - d towards the new variables, with d = min(decay, (1 + t) / (10 + t)) after t
    steps: so it forgets the random start within a few steps.
    """
    done = done.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + done) / (10 + done))
    return jax.tree.map(
        lambda old, new: old + share.astype(old.dtype) * (new - old), average, variables
    )


def head_step(
    task: Task, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, metrics.Sums]:
    """`train_step` where the classifier alone learns."""
    return train_step(task.head, state, batch)


def evaluated_logits(
    model: nn.Module, preparation: Preparation, variables: Any, images: jax.Array
) -> jax.Array:
    """Mean logits [batch, classes] over views of images uint8 [batch, height, width, channels]."""
    views = preparation.views(images)
    logits, _ = model.apply(variables, views.reshape(-1, *views.shape[2:]))
    return at_least_float32(logits).reshape(*views.shape[:2], -1).mean(0)


def eval_step(task: Task, state: TrainState, batch: dict[str, jax.Array]) -> metrics.Sums:
    """Metrics of this replica's share of an evaluation batch, summed over all replicas.

    Args:
      task: what stays the same.
      state: replicated; its `variables` are used and not changed.
      batch: as for `train_step`, and mask bool [local batch], false for padding.
    """
    logits = evaluated_logits(task.model, task.preparation, state.variables, batch["image"])
    of_each = task.evaluation_loss(logits, batch["label"])
    return jax.lax.psum(metrics.sums(logits, batch["label"], of_each, batch["mask"]), task.axis)


def _unsynced_axes(task: Task) -> tuple[str, ...]:
    # The axes of the devices along which BatchNorm's statistics differ, as it does not average
    # over them.
    def names(axis):
        return (axis,) if isinstance(axis, str) else (axis or ())

    return tuple(name for name in names(task.axis) if name not in names(task.batch_norm_axis))
