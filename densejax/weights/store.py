"""A directory of weights that runs start from, made from other projects' files or by a run.

`weights.safetensors` has float32 arrays by our paths, such as
`params/block1/layer3/conv2/kernel`; `model.json` describes the network that they are of.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath

from densejax import models
from densejax.config import UserError
from densejax.data import facts
from densejax.runs import files, workdir
from densejax.runs.checkpoint import CheckpointError, Checkpoints
from densejax.weights import conversion
from densejax.weights.files import from_safetensors, is_file, read
from densejax.weights.names import LAYOUTS, Layout

COLLECTIONS = ("params", "batch_stats")  # the second is missing without BatchNorm
# Fields that change the computation, but neither names nor shapes of the variables.
HIDDEN_FIELDS = ("batch_norm_epsilon", "head_norm_epsilon", "connect", "identity", "shortcut")
HIDDEN_FIELDS += ("stride_on", "survival")
# A network's name decides these. Most HarDNets halve by max-pooling, which shows in no variable.
JOINING_FIELDS = ("connect", "identity", "downsampling")


def save(directory: str, description: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Writes a new directory. One that is not complete is refused by `load`.

    Args:
      directory: must not exist.
      description: JSON: "model" (family and fields), "num_classes", "image_channels", and more.
      variables: float32 params, and batch_stats if there are any.
    """
    path = files.new_path("--output", directory)
    flat = conversion.flatten(variables)
    data = safetensors.numpy.save({p: np.ascontiguousarray(array) for p, array in flat.items()})
    digest = {"weights_sha256": hashlib.sha256(data).hexdigest()}
    with files.writing(f"--output={directory}", "name another directory"):
        path.mkdir(parents=True)
        (path / "weights.safetensors").write_bytes(data)
        # This file comes last: a directory without it is not complete.
        files.write_json(path / "model.json", {**description, **digest})


def load(directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save` wrote, or the checkpoint that a run's result is measured on.

    Returns:
      The description, whose "model" `densejax.models.create` takes, and the variables, float32
      NumPy arrays that fit this network.

    Raises:
      UserError: the directory is missing or damaged, or the weights are of another network.
    """
    path = files.path_of("weights", directory)
    with _damage_is_a_user_error(path):
        if _is_run(path):
            description, flat = _read_run(path)
        else:
            description = _read_json(path / "model.json")
            with files.opened(path / "weights.safetensors") as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() != description["weights_sha256"]:
                raise ValueError("weights.safetensors is not the file that model.json describes")
            flat = from_safetensors(data)
        description["model"] = model = models.completed(facts.without_lists(description["model"]))
        classes, channels = description["num_classes"], description["image_channels"]
        if (type(classes), type(channels)) != (int, int) or classes < 0 or channels < 1:
            raise ValueError(f"num_classes = {classes!r} and image_channels = {channels!r}")
        # A damaged description may be of a network that takes hours to build: every layer has at
        # least one array.
        depth, blocks = model.get("depth") or 0, sum(model.get("blocks") or ())
        modules = sum(model.get("modules") or ()) * model.get("module_depth", 1)
        stages = len(model.get("growth_rates") or ()) * model.get("stage_depth", 1)
        if max(depth, blocks, modules, stages) > len(flat):
            raise ValueError(f"{len(flat)} arrays are too few for its network")
        expected = conversion.abstract(models.create(description["model"], classes), channels)
    conversion.check_fit(flat, expected, f"{path}: the weights")
    return description, conversion.unflatten(flat)


def digest(source: str) -> str:
    """The SHA-256 of what `train.weights` names: of a file, or recorded in a directory.

    Args:
      source: a file for `read`, a directory that `save` wrote, or that of a run: then the digest is
        of the checkpoint that the run's result is measured on. Every process must call this
        function.

    Raises:
      UserError: it is none of these, or records no digest.
    """
    if is_file(source):
        return read(source, "train.weights")[1]
    path = files.path_of("train.weights", source)
    with _damage_is_a_user_error(path):
        if not _is_run(path):
            return str(_read_json(path / "model.json")["weights_sha256"])
        with _open_run(path) as (_, checkpoints, step):
            return checkpoints.digest(step, (*COLLECTIONS, "average"))


def load_for(
    source: str,
    model: Mapping[str, Any],
    expected: Mapping[str, Any],
    new_classifier: bool = False,
    of_imagenet: bool = False,
) -> dict[str, Any]:
    """Loads the variables of a directory or a file for a run's network, and checks that they fit.

    Args:
      source: written by `save`, a run's, or a file for `read`.
      model: the section `config.model` of the run.
      expected: the network's params and batch_stats, arrays or shapes.
      new_classifier: leave out the classifier, and fit the image channels.
      of_imagenet: whether a file has to be for images that are normalised as ImageNet's.
    """
    what = f"train.weights = {source!r}:"
    if is_file(source):
        description, variables = {"model": model}, _load_file(source, model, of_imagenet)
    else:
        description, variables = load(source)
    found, wanted = conversion.flatten(variables), conversion.flatten(expected)
    if new_classifier:
        conversion.fit(found, wanted)
    remedy = "" if new_classifier else "train.new_classifier = True"
    conversion.check_fit(found, wanted, what, remedy=remedy)
    for field in dict.fromkeys((*HIDDEN_FIELDS, *JOINING_FIELDS)):
        mine, theirs = model.get(field), description["model"].get(field)
        if mine != theirs:
            raise UserError(
                f"{what} are of a network with model.{field} = {theirs!r}, not {mine!r}"
            )
    return conversion.unflatten(found)


def _load_file(source: str, model: Mapping[str, Any], of_imagenet: bool) -> dict[str, Any]:
    """The variables of a file, for a network of these fields with the file's own classifier."""
    arrays, _ = read(source, "train.weights")
    layout, found, assumed, classes = _recognised(model["family"], arrays)
    for line in assumed:
        logging.warning("train.weights = %r: %s.", source, line)
    variables = conversion.convert(models.create(model, classes), found, layout)
    channels = conversion.first_kernel(conversion.flatten(variables)).shape[2]
    if of_imagenet:
        facts.require_rgb(f"train.weights = {source!r}", layout.project, model["family"])
        if (classes, channels) != (1000, 3):
            raise UserError(
                f"data.normalization = 'weights': nothing says how images are normalised for "
                f"{source} ({classes} classes, {channels} channels); set 'statistics' or 'scale'"
            )
    return variables


def _recognised(
    family: str, arrays: conversion.Weights
) -> tuple[Layout, dict[str, np.ndarray], list[str], int]:
    """What `conversion.recognise` finds for a family, and the number of classes."""
    layout, found, assumed = conversion.recognise(LAYOUTS.get(family, ()), arrays)
    bias = found.get(layout.name(conversion.CLASSIFIER[1]))
    return layout, found, assumed, 0 if bias is None else bias.size


def convert_file(
    model: str,
    weights: str,
    output: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    adapt: bool = False,
    seed: int = 0,
    shortcut: str = "",
) -> dict[str, Any]:
    """Makes a directory from a weights file; returns its description.

    Args:
      model: a name of densejax.models.MODELS; other fields are set as the weights' project has
        them.
      weights: see `read`.
      output: the new directory.
      num_classes: None: as many as the weights have.
      in_channels: of the images; None: as many as the weights have.
      adapt: see `densejax.weights.conversion.convert`.
      seed: see there.
      shortcut: of a ResNet whose weights do not show it; "": as the weights' project has it.
    """
    files.new_path("--output", output)  # the weights may take minutes to read
    family = models.fields(model).family
    arrays, source_sha256 = read(weights)
    layout, found, assumed, classes_before = _recognised(family, arrays)
    if shortcut:
        layout = dataclasses.replace(layout, fields=layout.fields | {"shortcut": shortcut})
    num_classes = classes_before if num_classes is None else num_classes
    fields = models.fields(model, **layout.fields)
    for field in HIDDEN_FIELDS:
        default = getattr(models.FAMILIES[family], field, None)
        if field not in layout.fields and (value := fields.get(field, default)) != default:
            choice = "; --shortcut chooses" if field == "shortcut" else ""
            assumed.append(f"model.{field} = {value!r}, which weights do not show{choice}")
    network = models.create(fields, num_classes)
    adaptation = {"image_channels": in_channels, "adapt": adapt, "seed": seed}
    variables = conversion.convert(network, found, layout, **adaptation)
    channels = conversion.first_kernel(conversion.flatten(variables)).shape[2]
    is_rgb = (layout.project, family) != facts.BGR
    if is_of_imagenet := is_rgb and (classes_before, channels) == (1000, 3):
        assumed.append("images are normalised as ImageNet's, which weights do not show")
    description = {
        "name": model,
        "model": fields.to_dict(),
        "num_classes": num_classes,
        "image_channels": channels,
        "source": weights,
        "source_sha256": source_sha256,
        "names": layout.project,
        "assumed": assumed,
    }
    if is_of_imagenet:
        description |= {key: facts.IMAGENET[key] for key in ("mean", "std")}
    save(output, description, variables)
    return description


@contextlib.contextmanager
def _damage_is_a_user_error(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # damage can raise any class
        raise UserError(
            f"{path}: not a directory of densejax.pretrained nor a run's, or damaged "
            f"({files.first_line(error)})"
        ) from error


def _is_run(path: epath.Path) -> bool:
    return (path / "config.json").exists() and not (path / "model.json").exists()


def _read_json(path: epath.Path) -> Any:
    with files.opened(path) as file:
        return json.load(file)


@contextlib.contextmanager
def _open_run(path: epath.Path) -> Iterator[tuple[dict[str, Any], Checkpoints, int]]:
    """A run's section `config.model`, its checkpoints and the step that its result is of."""
    config = workdir.completed(_read_json(path / "config.json"))
    checkpoints = Checkpoints(path / "checkpoints", keep_best="validation_error")
    with contextlib.closing(checkpoints):
        is_best = config["checkpoint"]["select"] == "best"
        step = checkpoints.best_step() if is_best else checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"{path}: the run has no checkpoint to start from yet")
        yield config["model"], checkpoints, step


def _read_run(path: epath.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description of a run's network, and its variables by path."""
    with _open_run(path) as (model, checkpoints, step):
        state = jax.device_get(checkpoints.restore_step(step))
    state = state.get("average") or state  # what the run's result is measured on
    flat = conversion.flatten({name: state.get(name) or {} for name in COLLECTIONS})
    flat = {name: np.asarray(array, np.float32) for name, array in flat.items()}
    if learned := facts.read(path):
        classes, channels = learned.num_classes, learned.image_shape[-1]
    else:  # the run is older than data.json
        kernel = flat.get(conversion.CLASSIFIER[0])
        classes = 0 if kernel is None else kernel.shape[1]
        channels = conversion.first_kernel(flat).shape[2]
    return {"model": model, "num_classes": classes, "image_channels": channels}, flat
