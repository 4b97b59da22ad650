"""A trained network and all that images need on their way into it, opened from a directory."""

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
from densejax.data import facts
from densejax.data.augment import Preparation
from densejax.runs import workdir
from densejax.training.experiment import build, open_checkpoints, select
from densejax.training.step import evaluated_logits
from densejax.weights import store


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network.

    Attributes:
      model: of densejax.models.
      variables: its "params" and "batch_stats", NumPy arrays.
      preparation: from stored images to its input.
      image_shape: stored (height, width, channels).
      class_names: one for each logit.
      resize_size: pixels of an image file's shorter side before its middle is taken; 0: the largest
        middle of the shape's aspect ratio is resized.
      white: the stored value of what is 255 in an image file.
      usual: as SetInfo has it.
    """

    model: nn.Module
    variables: Any
    preparation: Preparation
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    resize_size: int = 0
    white: int = 255
    usual: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Maps images uint8 [batch, *image_shape] to float32 [batch, classes]; jit it."""
        logits = evaluated_logits(self.model, self.preparation, variables, images)
        return logits.astype(jnp.float32)


def load(directory: epath.PathLike) -> Classifier:
    """Opens a run's directory, or one with the weights of `densejax.pretrained`.

    Of a run it takes the checkpoint that the run's result is measured on, and what the run
    remembers of its data; the data themselves are asked only where a run is older than that.

    Raises:
      UserError: it is neither, or something in it is missing, damaged or does not fit.
    """
    path = epath.Path(directory)
    return _of_weights(path) if (path / "model.json").exists() else _of_run(path)


def network(directory: epath.PathLike) -> tuple[nn.Module, Any]:
    """The model and the variables alone of what `load` opens, whatever images are for it."""
    path = epath.Path(directory)
    if not (path / "model.json").exists():
        opened = _of_run(path)
        return opened.model, opened.variables
    description, variables = store.load(path)
    return models.create(description["model"], description["num_classes"]), variables


def _of_run(path: epath.Path) -> Classifier:
    try:
        stored = json.loads((path / "config.json").read_text())
        config = ConfigDict(facts.without_lists(workdir.completed(stored)))
    except Exception as error:  # whatever damage leads to
        raise UserError(
            f"--workdir={path}: neither a run's directory nor one of weights "
            f"({type(error).__name__}: {error})"
        ) from error
    # No batch statistics are read: one device is enough for any run.
    config.parallel.update(batch_norm="global", batch_norm_group_size=0)
    experiment = build(config, jax.local_devices()[:1], facts.read(path))
    info, preparation = experiment.info, experiment.task.preparation
    with contextlib.closing(open_checkpoints(config, path)) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"--workdir={path}: there is no checkpoint in it yet; train first")
        state = select(experiment, checkpoints)
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    resize, image_shape = 0, info.image_shape
    if config.data.storage == "stream":
        resize = config.evaluate.resize_size
        if preparation.crop_size:  # ten crops are of the whole square
            image_shape = (resize, resize, 3)
    return Classifier(
        *(experiment.task.model, variables, preparation, image_shape, info.class_names),
        *(resize, info.white, info.usual),
    )


def _of_weights(path: epath.Path) -> Classifier:
    description, variables = store.load(path)
    classes = description["num_classes"]
    if classes == 0:
        raise UserError(f"{path}: a network without a classifier names no class")
    found = facts.of_weights(path)
    return Classifier(
        models.create(description["model"], classes),
        variables,
        Preparation(found["mean"], found["std"]),
        found["image_shape"],
        found["class_names"],
        resize_size=round(min(found["image_shape"][:2]) * 256 / 224),  # as torchvision evaluates
    )
