"""A directory of weights that runs start from, made from other projects' files or by a run.

`weights.safetensors` holds float32 arrays by our paths, such as
`params/block1/layer3/conv2/kernel`; `model.json` says of which network they are.
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
from etils import epath

from densejax import models
from densejax.config import UserError
from densejax.data.facts import IMAGENET
from densejax.runs import files
from densejax.runs.checkpoint import CheckpointError, Checkpoints
from densejax.weights import conversion
from densejax.weights.files import brief, from_safetensors, read
from densejax.weights.names import LAYOUTS

COLLECTIONS = ("params", "batch_stats")
# What changes the computation, and neither the names nor the shapes of the variables.
UNSEEN = ("batch_norm_epsilon", "identity", "join", "shortcut", "stride_on", "survival")


def save(directory: str, description: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Writes a new directory; whoever reads it finds it whole or refuses it.

    Args:
      directory: must not exist.
      description: JSON: "model" (family and fields), "num_classes", "image_channels", and more.
      variables: float32 params and batch_stats.
    """
    path = epath.Path(directory)
    if path.exists():
        raise UserError(f"--output={directory}: exists; name a new directory")
    flat = conversion.flatten(variables)
    data = safetensors.numpy.save({p: np.ascontiguousarray(array) for p, array in flat.items()})
    digest = {"weights_sha256": hashlib.sha256(data).hexdigest()}
    try:
        path.mkdir(parents=True)
        (path / "weights.safetensors").write_bytes(data)
        # Last: a directory without it, or whose weights are not those it names, is refused.
        files.write_json(path / "model.json", {**description, **digest})
    except OSError as error:
        raise UserError(f"--output={directory}: {error}") from error


def load(directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save` wrote, or the checkpoint that a run's result is measured on.

    Returns:
      The description, whose "model" is fit for `densejax.models.create`, and the variables, float32
      NumPy arrays, checked against that network. Nothing larger than what is read is built.

    Raises:
      UserError: no such directory, a damaged one, or weights that are not of its network.
    """
    path = epath.Path(directory)
    with _refusing(path):
        description, checkpoint = _describe(path)
        if checkpoint:
            with contextlib.closing(checkpoint[0]):
                state = jax.device_get(checkpoint[0].restore_step(checkpoint[1]))
            flat = conversion.flatten({name: state[name] for name in COLLECTIONS})
            flat = {name: np.asarray(array, np.float32) for name, array in flat.items()}
            kernel = flat.get(conversion.CLASSIFIER[0])
            description["num_classes"] = 0 if kernel is None else kernel.shape[1]
            description["image_channels"] = conversion.stem(flat).shape[2]
        else:
            with files.opened(path / "weights.safetensors") as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() != description["weights_sha256"]:
                raise ValueError("weights.safetensors is not the one that model.json is of")
            flat = from_safetensors(data)
        stored = {
            k: tuple(v) if isinstance(v, list) else v for k, v in description["model"].items()
        }
        family = dataclasses.fields(models.FAMILIES[stored["family"]])
        # A field that is newer than the directory is at its default.
        newer = {f.name: f.default for f in family if f.name not in models.RUN_FIELDS}
        description["model"] = newer | stored
        classes, channels = description["num_classes"], description["image_channels"]
        if (type(classes), type(channels)) != (int, int) or classes < 0 or channels < 1:
            raise ValueError(f"num_classes = {classes!r} and image_channels = {channels!r}")
        depth, blocks = stored.get("depth") or 0, sum(stored.get("blocks") or ())
        modules = sum(stored.get("modules") or ()) * stored.get("module_depth", 1)
        # Every layer has a kernel and the four arrays of a norm; the last layer of all has two.
        if max(depth, blocks, modules) * 4 > len(flat):
            raise ValueError(f"{len(flat)} arrays are too few for its network")
        expected = conversion.abstract(models.create(description["model"], classes), channels)
    conversion.check_fit(flat, expected, f"{directory}/weights.safetensors")
    return description, conversion.unflatten(flat)


def digest(directory: str) -> str:
    """The recorded SHA-256 of what `train.weights` names; no array is read.

    Args:
      directory: one that `save` wrote, or a run's: then of the checkpoint that its result is
        measured on. Every process calls it.

    Raises:
      UserError: it is neither, or it records none.
    """
    path = epath.Path(directory)
    with _refusing(path):
        description, checkpoint = _describe(path)
        if not checkpoint:
            return str(description["weights_sha256"])
        with contextlib.closing(checkpoint[0]):
            return checkpoint[0].digest(checkpoint[1], COLLECTIONS)


@contextlib.contextmanager
def _refusing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever damage leads to
        raise UserError(
            f"{path}: not a directory of densejax.pretrained nor a run's, or damaged "
            f"({brief(error)})"
        ) from error


def _describe(path: epath.Path) -> tuple[dict[str, Any], tuple[Checkpoints, int] | None]:
    """What model.json says, or config.json and the checkpoint of a run's result."""
    if (path / "model.json").exists() or not (path / "config.json").exists():
        with files.opened(path / "model.json") as file:
            return json.load(file), None
    with files.opened(path / "config.json") as file:
        config = json.load(file)
    checkpoints = Checkpoints(path / "checkpoints", keep_best="validation_error")
    best = config["checkpoint"]["select"] == "best"
    step = checkpoints.best_step() if best else checkpoints.latest_step()
    if step is None:
        checkpoints.close()
        raise CheckpointError(f"{path}: the run has no checkpoint to start from yet")
    return {"model": config["model"]}, (checkpoints, step)


def load_for(
    directory: str, model: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables of a directory, checked to be those of a run's network.

    Args:
      directory: written by `save`, or a run's.
      model: the section `config.model` of the run.
      expected: its params and batch_stats, arrays or shapes.
    """
    description, variables = load(directory)
    what = f"train.weights = {directory!r}:"
    conversion.check_fit(conversion.flatten(variables), conversion.flatten(expected), what)
    for field in UNSEEN:
        mine, theirs = model.get(field), description["model"].get(field)
        if mine != theirs:
            raise UserError(
                f"{what} are of a network with model.{field} = {theirs!r}, not {mine!r}"
            )
    return variables


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
      model: a name of densejax.models.MODELS; what else the weights' project implies is set.
      weights: see `read`.
      output: the new directory.
      num_classes: None: as the weights have.
      in_channels: of the images; None: as the weights have.
      adapt: see `densejax.weights.conversion.convert`.
      seed: see there.
      shortcut: of a ResNet whose weights do not show it; "": as the weights' project has it.
    """
    for flag, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1)):
        if value is not None and value < least:
            raise UserError(f"--{flag}={value}: must be at least {least}")
    if epath.Path(output).exists():
        raise UserError(f"--output={output}: exists; name a new directory")
    family = models.fields(model).family
    arrays, digest = read(weights)
    layout, found, assumed = conversion.recognise(LAYOUTS[family], arrays)
    if shortcut:
        layout = dataclasses.replace(layout, fields=layout.fields | {"shortcut": shortcut})
    bias = found.get(layout.name(conversion.CLASSIFIER[1]))
    classes_before = 0 if bias is None else bias.size
    num_classes = classes_before if num_classes is None else num_classes
    fields = models.fields(model, **layout.fields)
    for field in UNSEEN:
        default = getattr(models.FAMILIES[family], field, None)
        if field not in layout.fields and (value := fields.get(field, default)) != default:
            choice = "; --shortcut chooses" if field == "shortcut" else ""
            assumed.append(f"model.{field} = {value!r}, which weights do not show{choice}")
    variables = conversion.convert(
        models.create(fields, num_classes),
        *(found, layout),
        image_channels=in_channels,
        adapt=adapt,
        seed=seed,
    )
    description = {
        "name": model,
        "model": fields.to_dict(),
        "num_classes": num_classes,
        "image_channels": conversion.stem(conversion.flatten(variables)).shape[2],
        "source": weights,
        "source_sha256": digest,
        "names": layout.project,
        "assumed": assumed,
    }
    if (classes_before, description["image_channels"]) == (1000, 3):  # a new classifier hides it
        description |= {key: IMAGENET[key] for key in ("mean", "std")}
    save(output, description, variables)
    return description
