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

from densejax import data, models, pretrained, train
from densejax.config import UserError, default
from densejax.data.augment import Preparation
from densejax.data.official import STREAMED
from densejax.experiment import without_data

# What weights of 1,000 classes are for where their model.json says nothing else; in uint8 units.
IMAGENET = {key: getattr(STREAMED["imagenet2012"], key) for key in ("image_shape", "mean", "std")}


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network.

    Attributes:
      model: of densejax.models.
      variables: its "params" and "batch_stats", NumPy arrays.
      preparation: from stored images to its input.
      image_shape: stored (height, width, channels).
      class_names: one for each logit.
    """

    model: nn.Module
    variables: Any
    preparation: Preparation
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Maps images uint8 [batch, *image_shape] to float32 [batch, classes]; jit it."""
        logits, _ = self.model.apply(variables, self.preparation.evaluation(images))
        return logits.astype(jnp.float32)


def load(directory: epath.PathLike) -> Classifier:
    """Opens a run's directory, or one with the weights of `densejax.pretrained`.

    Of a run it takes the checkpoint that the run's result is measured on.

    Raises:
      UserError: it is neither, or something in it is missing, damaged or does not fit.
    """
    path = epath.Path(directory)
    if (path / "model.json").exists():
        return _of_weights(path)
    try:
        config = _config(json.loads((path / "config.json").read_text()))
    except Exception as error:  # whatever damage leads to
        raise UserError(
            f"--workdir={path}: neither a run's directory nor one of weights "
            f"({type(error).__name__}: {error})"
        ) from error
    return _of_run(path, config)


def _config(stored: dict[str, Any]) -> ConfigDict:
    """A run's configuration; a key that is newer than the run is at its default."""
    config, family = default().to_dict(), models.FAMILIES[stored["model"]["family"]]
    fields = (field for field in dataclasses.fields(family) if field.name not in models.RUN_FIELDS)
    config["model"] = {field.name: field.default for field in fields}
    for key, value in stored.items():
        section = config.get(key)
        config[key] = section | value if isinstance(section, dict) else value
    return ConfigDict(_without_lists(config))


def _of_run(path: epath.Path, config: ConfigDict) -> Classifier:
    experiment = without_data(config)
    task, info = experiment.task, data.info(config)
    with contextlib.closing(train.open_checkpoints(config, path)) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"--workdir={path}: there is no checkpoint in it yet; train first")
        state = train.select(experiment, checkpoints)
    variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    return Classifier(task.model, variables, task.preparation, info.image_shape, info.class_names)


def _of_weights(path: epath.Path) -> Classifier:
    description, variables = pretrained.load(path)
    classes = description["num_classes"]
    model = models.create(description["model"], classes)
    if classes == 0:
        raise UserError(f"{path}: a network without a classifier names no class")
    if (description.get("names"), description["model"]["family"]) == ("keras", "resnet"):
        raise UserError(f"{path}: Keras' ResNets want images in the order blue, green, red")
    is_imagenet = (classes, description.get("image_channels")) == (1000, 3)
    facts = (IMAGENET if is_imagenet else {}) | description
    if missing := [key for key in IMAGENET if key not in facts]:
        raise UserError(f"{path}/model.json: add {', '.join(missing)}; images cannot do without")
    names = facts.get("class_names") or [str(index) for index in range(classes)]
    _check_facts(path, facts | {"class_names": names}, classes)
    preparation = Preparation(tuple(facts["mean"]), tuple(facts["std"]))
    return Classifier(model, variables, preparation, tuple(facts["image_shape"]), tuple(names))


def _check_facts(path: epath.Path, facts: dict[str, Any], classes: int) -> None:
    """Raises UserError where what was added to a model.json by hand does not fit its network."""
    channels = facts["image_channels"]
    for key, is_one, length, allowed in (
        (
            "image_shape",
            lambda size: type(size) is int and size > 0,
            3,
            "[height, width, channels]",
        ),
        ("mean", _is_level, channels, f"{channels} numbers from 0 to 255"),
        ("std", lambda level: _is_level(level) and level > 0, channels, f"{channels} above 0"),
        ("class_names", lambda name: isinstance(name, str), classes, f"{classes} names"),
    ):
        value = facts[key]
        fits = isinstance(value, list | tuple) and len(value) == length and all(map(is_one, value))
        if not fits or (key == "image_shape" and value[-1] != channels):
            raise UserError(f"{path}/model.json: {key} = {value!r}: give {allowed}")


def _is_level(number: Any) -> bool:
    return type(number) in (int, float) and 0 <= number <= 255


def _without_lists(value: Any) -> Any:
    """JSON has lists where a configuration has tuples."""
    if isinstance(value, dict):
        return {key: _without_lists(item) for key, item in value.items()}
    return tuple(map(_without_lists, value)) if isinstance(value, list) else value
