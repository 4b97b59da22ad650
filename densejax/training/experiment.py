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
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from densejax import config as config_schema
from densejax import data, models
from densejax.config import UserError
from densejax.data.augment import example_keys
from densejax.data.official import SetInfo
from densejax.data.stream import BatchTimeout
from densejax.models.convolution import quick_compilation
from densejax.runs import hosts
from densejax.runs.checkpoint import Checkpoints
from densejax.training import finetuning, losses, metrics, optimizer, parallel
from densejax.training.step import Task, TrainState, eval_step, init_state
from densejax.weights import conversion, store


class Diverged(UserError):
    """The loss or the gradient was not finite for too many steps, or the result is not."""

    exit_code = 3


@dataclasses.dataclass
class Experiment:
    """What a configuration stands for. Devices start and images are read only when needed.

    Attributes:
      config: the configuration, checked.
      info: the facts of the data set.
      task: model, optimizer and preparation.
      steps: length of the whole training, by `train.epochs` and `train.max_steps`.
      devices: the devices to use; None: all that are there.
    """

    config: ConfigDict
    info: SetInfo
    task: Task
    steps: int
    devices: Sequence[jax.Device] | None = None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices; UserError where batches or groups do not divide evenly over them."""
        train, evaluate = self.config.train, self.config.evaluate
        mesh = parallel.mesh(self.config.parallel.batch_norm_group_size, self.devices)
        parallel.check_batch_size(
            "train.batch_size", train.batch_size, mesh, train.accumulate_steps
        )
        parallel.check_batch_size("evaluate.batch_size", evaluate.batch_size, mesh)
        return mesh

    @functools.cached_property
    def data(self) -> data.Data:
        """All batches, on the devices; every process must ask. UserError as in `data.create`."""
        _ = self.abstract_state  # a network that does not fit the images is reported first
        if jax.process_index() == 0:  # one process prepares a missing set for a shared disk
            data.prepare(self.config)
        hosts.gather("data is prepared")
        mesh = self.mesh
        return data.create(self.config, parallel.replicated(mesh), parallel.split(mesh))

    @functools.cached_property
    def computed_task(self) -> Task:
        """The task as the devices compute it: in float32 where a CPU is asked for bfloat16.

        XLA:CPU takes 1.5 to 2 times as long for a step in bfloat16 as for one in float32.
        """
        if self.config.train.dtype != "bfloat16" or self.mesh.devices.flat[0].platform != "cpu":
            return self.task
        return _in_float32(self.task)

    def map(self, step: Callable, donate: bool = False) -> Callable:
        """A step of one replica, mapped over the devices and compiled at its first call."""

        def precise(state, batch):
            with jax.default_matmul_precision(matmul_precision(self.config)):
                return step(self.computed_task, state, batch)

        return parallel.map_step(precise, self.mesh, self.config.parallel.mode, donate)

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
        options = quick_compilation(self.mesh.devices.flat[0].platform)
        sharding = parallel.replicated(self.mesh)
        dtype = jnp.float64 if self.config.train.dtype == "float64" else jnp.float32
        init = functools.partial(init_state, self.computed_task, dtype=dtype)
        return jax.jit(init, out_shardings=sharding, compiler_options=options)

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """What `train.weights` holds, {} where it is ""; UserError where it does not fit."""
        if not (source := self.config.train.weights):
            return {}
        state = self.abstract_state
        expected = {"params": state.params, "batch_stats": state.batch_stats}
        return store.load_for(
            source,
            self.config.model,
            expected,
            self.config.train.new_classifier,
            self.config.data.normalization == "weights",
        )

    def start(self) -> TrainState:
        """The state before the first step; `weights` replace what was drawn."""
        state = self.init()
        if not self.weights:
            return state

        taken = conversion.flatten({"params": state.params, "batch_stats": state.batch_stats})
        for path, new in conversion.flatten(self.weights).items():
            old = taken[path]
            taken[path] = jax.device_put(new.astype(old.dtype), old.sharding)
        taken = conversion.unflatten(taken)
        average = jax.tree.map(jnp.copy, taken) if state.average else {}
        return state.replace(**taken, average=state.average | average)

    def augmented(self, key: jax.Array, batch: dict[str, Any], number: int = 32) -> np.ndarray:
        """The first images of the first batch as the network sees them, for people to look at.

        Args:
          key: the key of the state.
          batch: the global batch; this process shows some images of its own share.
          number: the most images; if images are mixed, an image's partner is among them.

        Returns:
          uint8 [number, height, width, channels]; the brightest value is 255.
        """
        preparation = self.computed_task.preparation
        batch = {name: array.addressable_shards[0].data[:number] for name, array in batch.items()}
        batch, key = jax.device_get((batch, key))
        key = jax.random.fold_in(jax.random.wrap_key_data(key), 0)
        keys = example_keys(key, np.arange(len(batch["label"]), dtype=np.int32))
        images = np.asarray(jax.jit(preparation.training)(batch, keys)[0], np.float32)
        levels = (images * np.float32(preparation.std) + np.float32(preparation.mean)).clip(0)
        return (levels * (255 / max(levels.max(), 1))).astype(np.uint8)

    @functools.cached_property
    def evaluate(self) -> Callable[..., dict[str, float] | None]:
        """A function `evaluate(state, split, stops=None)`: means over a split, each image once.

        It calls `stops()` after every batch, and returns None if that is true.
        """
        step = self.map(eval_step)

        def evaluate(state, split, stops=None):
            sums = []
            try:
                with contextlib.closing(self.data.evaluation[split].evaluation()) as batches:
                    for batch in batches:
                        sums.append(step(state, batch))
                        jax.block_until_ready(sums[-2:-1])  # one is queued: batches take memory
                        if stops and stops():
                            return None
            except BatchTimeout:
                if stops and stops():
                    return None
                raise
            total = functools.reduce(_add, sums)
            if (seen := int(total["count"])) != (size := self.data.evaluation[split].size):
                raise RuntimeError(f"{split}: {seen} images were evaluated, there are {size}")
            means = metrics.means(total)
            if not math.isfinite(means["loss"]):
                raise Diverged(f"{split}_loss = {means['loss']}: the network has diverged")
            return means

        return evaluate


def build(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None, info: SetInfo | None = None
) -> Experiment:
    """What a configuration stands for; starts no device and reads no image.

    Args:
      config: the whole configuration.
      devices: the devices to use; None: all that are there. Only to compile, they need not exist.
      info: the facts of the data set; None: not known, and the set has to be there.

    Raises:
      UserError: the first thing that is wrong with the configuration.
    """
    config = config_schema.checked(config)
    info = info or data.info(config)
    if config.train.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("train.dtype = 'float64': JAX needs the environment's JAX_ENABLE_X64=1")
    kind, dtype = config.parallel.batch_norm, jnp.dtype(config.train.dtype)
    norm_axis = {"global": parallel.AXIS, "replica": None, "groups": parallel.MEMBER}[kind]
    model = models.create(config.model, info.num_classes, dtype, norm_axis)
    steps_per_epoch = data.train_size(config, info) // config.train.batch_size
    steps = config.train.epochs * steps_per_epoch
    steps = min(steps, config.train.max_steps or steps)
    if steps >= 2**31:
        raise UserError(f"train.epochs = {config.train.epochs}: {steps} steps; at most 2**31 - 1")
    rate = optimizer.schedule(config.optimizer, steps, steps_per_epoch, config.train.batch_size)
    loss = losses.create(config.train.loss, config.train.label_smoothing)
    if config.train.class_weights == "balanced":
        loss = losses.balanced(loss, lambda: built.data.train.labels)
    task = Task(
        model=model,
        optimizer=optimizer.create(config.optimizer, rate),
        learning_rate=rate,
        preparation=data.preparation(config, info),
        image_shape=info.image_shape,
        loss=loss,
        evaluation_loss=losses.create(config.train.loss),
        log_every=config.log.every_steps,
        axis=(parallel.GROUP, parallel.MEMBER) if kind == "groups" else parallel.AXIS,
        batch_norm_axis=getattr(model, "batch_norm_axis", None),
        accumulate_steps=config.train.accumulate_steps,
        average_decay=config.train.average_decay,
    )
    task = finetuning.restrict(task, config, config.train.head_epochs * steps_per_epoch)
    built = Experiment(config, info, task, steps, devices)
    return built


@jax.jit
def _add(first, second):
    return jax.tree.map(jnp.add, first, second)


def _in_float32(task: Task) -> Task:
    model, preparation = task.model, dataclasses.replace(task.preparation, dtype="float32")
    model = model.clone(dtype=jnp.float32) if hasattr(model, "dtype") else model
    head = task.head and _in_float32(task.head)
    return dataclasses.replace(task, model=model, preparation=preparation, head=head)


def matmul_precision(config: ConfigDict) -> str:
    """JAX's name for the precision of products: in float32, what the configuration says.

    Products of other types have only one precision, "default".
    """
    return config.train.matmul_precision if config.train.dtype == "float32" else "default"


def abstract_batch(mesh: Mesh, image_shape: Sequence[int], size: int) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a training batch of so many images over all devices."""
    split = parallel.split(mesh)
    return {
        "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


def open_checkpoints(
    config: ConfigDict, path: epath.Path, guard: Callable[[], None] = lambda: None
) -> Checkpoints:
    """The checkpoints of a run directory; `guard` as in `Checkpoints`."""
    best = "validation_error" if config.checkpoint.select == "best" else ""
    return Checkpoints(path / "checkpoints", config.checkpoint.keep_latest, best, guard)


def select(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    """The state that the result is measured on: the newest, or the best on held-out images.

    `checkpoints.damaged_steps` then has the steps that were skipped because they are damaged.
    """
    checkpoints.wait()  # the last save may still be under way
    if experiment.config.train.weights and checkpoints.latest_step() is None:
        return experiment.start()
    if experiment.config.checkpoint.select == "best":
        return checkpoints.restore_best(experiment.abstract_state)
    state = checkpoints.restore_latest(experiment.abstract_state)
    if state is None:
        raise UserError("--mode=eval: there is no checkpoint to evaluate; train first")
    return state
