"""What a configuration stands for: data, network, optimizer and state, built on the devices."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from densejax import config as config_schema
from densejax import data, hosts, metrics, models, optimizer, parallel, pretrained
from densejax.config import UserError
from densejax.data.official import SetInfo
from densejax.data.stream import Starved
from densejax.step import Task, TrainState, eval_step, init_state


@dataclasses.dataclass
class Experiment:
    """What a configuration stands for, built on the devices that are there.

    Attributes:
      config: checked.
      mesh: all devices.
      data: batches; None of `without_data`.
      task: model, optimizer and preparation.
      steps: length of the whole training.
      info: the facts of the data set.
    """

    config: ConfigDict
    mesh: Mesh
    data: data.Data | None
    task: Task
    steps: int
    info: SetInfo | None = None

    def map(self, step: Callable, donate: bool = False) -> Callable:
        """A step of one replica, mapped over the devices and compiled at its first call."""
        step = functools.partial(step, self.task)
        return parallel.map_step(step, self.mesh, self.config.parallel.mode, donate)

    def init(self) -> TrainState:
        """Draws the state before the first step."""
        return self._init(np.uint32(self.config.seed))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, as a restore wants them."""
        sharding = parallel.replicated(self.mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._init.eval_shape(np.uint32(self.config.seed)),
        )

    @functools.cached_property
    def _init(self):
        # XLA:CPU optimises this program for minutes and gains nothing: it runs once.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        sharding = parallel.replicated(self.mesh)
        dtype = jnp.promote_types(self.config.train.dtype, jnp.float32)
        init = functools.partial(init_state, self.task, dtype=dtype)
        return jax.jit(init, out_shardings=sharding, compiler_options=options)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """What `train.weights` holds, {} where it is ""; UserError where it does not fit."""
        if not (directory := self.config.train.weights):
            return {}
        state = self.abstract_state
        expected = {"params": state.params, "batch_stats": state.batch_stats}
        return pretrained.load_for(directory, self.config.model, expected)

    def start(self) -> TrainState:
        """The state before the first step, with `weights` in the place of what was drawn."""
        state = self.init()
        drawn = {name: getattr(state, name) for name in self.weights}
        return state.replace(
            **jax.tree.map(
                lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
                self.weights,
                drawn,
            )
        )

    @functools.cached_property
    def evaluate(self) -> Callable[..., dict[str, float] | None]:
        """Means over every image of a split, each once: `evaluate(state, split, stops=None)`.

        None where `stops()`, which is called after every batch, is true before the last.
        """
        step = self.map(eval_step)
        add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

        def evaluate(state, split, stops=None):
            sums = []
            try:
                with contextlib.closing(self.data.evaluation[split].evaluation()) as batches:
                    for batch in batches:
                        sums.append(step(state, batch))
                        jax.block_until_ready(sums[-2:-1])  # one is queued: batches take memory
                        if stops and stops():
                            return None
            except Starved:
                if stops and stops():
                    return None
                raise
            total = functools.reduce(add, sums)
            if (seen := int(total["count"])) != (size := self.data.evaluation[split].size):
                raise RuntimeError(f"{split}: {seen} images were evaluated, there are {size}")
            means = metrics.means(total)
            if not math.isfinite(means["loss"]):
                raise UserError(f"{split}_loss = {means['loss']}: the network has diverged")
            return means

        return evaluate


def describe(
    config: ConfigDict, info: SetInfo | None = None
) -> tuple[SetInfo, nn.Module, optimizer.Schedule, int]:
    """The data set's facts, the network, the schedule and the number of steps, without a device.

    Args:
      config: the whole configuration.
      info: the facts, where they are known; else they are asked of the set, which has to be there.

    Raises:
      UserError: the first thing that is wrong with the configuration.
    """
    config_schema.check(config)
    info = info or data.info(config)
    axes = {"global": parallel.AXIS, "replica": None, "groups": parallel.MEMBER}
    axis = axes[config.parallel.batch_norm]
    if config.train.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("train.dtype = 'float64': JAX needs the environment's JAX_ENABLE_X64=1")
    model = models.create(config.model, info.num_classes, jnp.dtype(config.train.dtype), axis)
    steps_per_epoch = data.train_size(config, info) // config.train.batch_size
    steps = config.train.epochs * steps_per_epoch
    if steps >= 2**31:
        raise UserError(f"train.epochs = {config.train.epochs}: {steps} steps; at most 2**31 - 1")
    data.preparation(config, info)
    rate = optimizer.schedule(config.optimizer, steps, steps_per_epoch, config.train.batch_size)
    return info, model, rate, steps


def without_data(
    config: ConfigDict,
    group_size: int = 0,
    devices: Sequence[jax.Device] | None = None,
    info: SetInfo | None = None,
) -> Experiment:
    """As `build`, but no image is read: enough to restore what was trained, on any devices.

    Args:
      config: the whole configuration.
      group_size: devices in a group of BatchNorm's, in training; 0: no groups.
      devices: all that are there unless said otherwise; to compile, they need not be there.
      info: as for `describe`.

    Raises:
      UserError: the first thing that is wrong with the configuration.
    """
    info, model, learning_rate, steps = describe(config, info)
    mesh = parallel.mesh(group_size, devices)
    task = Task(
        model=model,
        optimizer=optimizer.create(config.optimizer, learning_rate),
        learning_rate=learning_rate,
        preparation=data.preparation(config, info),
        image_shape=info.image_shape,
        label_smoothing=config.train.label_smoothing,
        log_every=config.log.every_steps,
        axis=parallel.axis(mesh),
        accumulate_steps=config.train.accumulate_steps,
    )
    return Experiment(config, mesh, None, task, steps, info)


def abstract_batch(mesh: Mesh, image_shape: Sequence[int], size: int) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a training batch of so many images over all devices."""
    split = parallel.split(mesh)
    return {
        "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


def to_train(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """As `without_data`, for the devices that will train: batches and groups divide over them."""
    empty = without_data(config, config.parallel.batch_norm_group_size, devices)
    train, evaluate = config.train, config.evaluate
    parallel.check_batch_size(
        "train.batch_size", train.batch_size, empty.mesh, train.accumulate_steps
    )
    parallel.check_batch_size("evaluate.batch_size", evaluate.batch_size, empty.mesh)
    return empty


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Builds everything that a configuration stands for; starts the devices.

    Args:
      config: the whole configuration.
      devices: all that are there unless said otherwise.

    Raises:
      UserError: the first thing that is wrong with the configuration or the data.
    """
    experiment = to_train(config, devices)
    _ = experiment.abstract_state  # a network that does not fit the images says so here
    if jax.process_index() == 0:  # a set that is missing is prepared once where disks are shared
        data.prepare(config)
    hosts.exchange("data is prepared")
    mesh = experiment.mesh
    experiment.data = data.create(config, parallel.replicated(mesh), parallel.split(mesh))
    return experiment
