"""A trained network and what turns images into its input, opened from a directory."""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from densejax import models
from densejax.config import UserError
from densejax.data import Data, facts
from densejax.data.augment import Preparation
from densejax.runs import workdir
from densejax.training.experiment import (
    Experiment,
    build,
    matmul_precision,
    open_checkpoints,
    select,
)
from densejax.training.step import TrainState, evaluated_logits
from densejax.weights import store


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network.

    Attributes:
      model: of densejax.models.
      variables: its "params" and, if it has BatchNorm, "batch_stats", NumPy arrays.
      preparation: from stored images to the network's input.
      image_shape: stored (height, width, channels).
      class_names: one for each logit.
      resize_size: pixels of an image file's shorter side before its middle is taken; 0: the largest
        middle of the shape's aspect ratio is resized.
      white_level: the stored value that stands for 255 in an image file.
      matmul_precision: of products, as JAX names it.
      usual_brightness: least and most of each measure of `facts.brightness` in training images;
        {} where they are not known.
    """

    model: nn.Module
    variables: Any
    preparation: Preparation
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    resize_size: int = 0
    white_level: int = 255
    matmul_precision: str = "float32"
    usual_brightness: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Maps images uint8 [batch, *image_shape] to float32 [batch, classes]; jit it."""
        with jax.default_matmul_precision(self.matmul_precision):
            logits = evaluated_logits(self.model, self.preparation, variables, images)
        return logits.astype(jnp.float32)

    def serialised(self, platforms: tuple[str, ...]) -> bytes:
        """The function from uint8 images to float32 logits for the given platforms, serialised.

        The weights are in it; it needs JAX, but not this package, to run. This machine need not
        have devices of these platforms.
        """
        (batch,) = jax.export.symbolic_shape("batch")
        images = jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.uint8)
        function = jax.jit(lambda images: self.logits(self.variables, images))
        return bytes(jax.export.export(function, platforms=platforms)(images).serialize())


def load(directory: epath.PathLike) -> Classifier:
    """Opens a run's directory, or a directory of weights that `densejax.pretrained` wrote.

    From a run it takes the checkpoint that the run's result is measured on and what `data.json`
    records; the data themselves are needed only for a run that has no `data.json` yet.

    Raises:
      UserError: the directory is neither, or something in it is missing, damaged or does not fit.
    """
    path = epath.Path(directory)
    return _of_weights(path) if (path / "model.json").exists() else _of_run(path)


def network(directory: epath.PathLike) -> tuple[nn.Module, Any]:
    """Only the model and the variables of what `load` opens; facts of images may be missing."""
    path = epath.Path(directory)
    if not (path / "model.json").exists():
        opened = _of_run(path)
        return opened.model, opened.variables
    description, variables = store.load(path)
    return models.create(description["model"], description["num_classes"]), variables


def experiment_of(directory: epath.PathLike) -> Experiment:
    """What the run in a directory stands for, on one device; UserError where there is no run."""
    path = epath.Path(directory)
    if (path / "model.json").exists():
        raise UserError(f"--workdir={path}: weights have no images of their own; give a run")
    try:
        stored = json.loads((path / "config.json").read_text())
        config = ConfigDict(facts.without_lists(workdir.completed(stored)))
    except Exception as error:  # damage can raise any class
        raise UserError(
            f"--workdir={path}: neither a run's directory nor one of weights "
            f"({type(error).__name__}: {error})"
        ) from error
    # Only running statistics are used, so one device is enough for every run.
    config.parallel.update(batch_norm="global", batch_norm_group_size=0)
    return build(config, jax.local_devices()[:1], facts.read(path))


def data_of(experiment: Experiment, path: epath.Path) -> Data:
    """A run's images; UserError where they are not those of its last start."""
    data, starts = experiment.data, workdir.history(path)
    recorded = starts[-1]["versions"] if starts else {}
    if changes := workdir.version_changes(recorded, {"data": data.version}):
        raise UserError(f"--workdir={path}: the run is of other data ({'; '.join(changes)})")
    return data


def result_state(experiment: Experiment, path: epath.Path) -> TrainState:
    """The state that a run's result is measured on; UserError where there is no checkpoint yet."""
    with contextlib.closing(open_checkpoints(experiment.config, path)) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"--workdir={path}: there is no checkpoint in it yet; train first")
        return select(experiment, checkpoints)


def _of_run(path: epath.Path) -> Classifier:
    experiment = experiment_of(path)
    config = experiment.config
    info, task = experiment.info, experiment.computed_task
    state = result_state(experiment, path)
    resize, image_shape = 0, info.image_shape
    if config.data.storage != "memory":
        resize = config.evaluate.resize_size
        if task.preparation.crop_size:  # the ten crops are taken of the whole square
            image_shape = (resize, resize, image_shape[-1])
    return Classifier(
        model=task.model,
        variables=jax.device_get(state.variables),
        preparation=task.preparation,
        image_shape=image_shape,
        class_names=info.class_names,
        resize_size=resize,
        white_level=info.white_level,
        matmul_precision=matmul_precision(config),
        usual_brightness=info.usual_brightness,
    )


def _of_weights(path: epath.Path) -> Classifier:
    description, variables = store.load(path)
    classes = description["num_classes"]
    if classes == 0:
        raise UserError(f"{path}: a network without a classifier names no class")
    found = facts.of_weights(path)
    height, width, _ = shape = found["image_shape"]
    return Classifier(
        model=models.create(description["model"], classes),
        variables=variables,
        preparation=Preparation(found["mean"], found["std"]),
        image_shape=shape,
        class_names=found["class_names"],
        # As torchvision evaluates. Sets of small images, such as CIFAR, are evaluated uncropped.
        resize_size=round(height * 256 / 224) if height == width > 64 else 0,
    )
