"""Weights of other projects, read from their files into a directory that runs start from.

python -m densejax.pretrained --model=densenet121 --weights=densenet121.safetensors --output=DIR

DIR/weights.safetensors holds float32 arrays by our paths, such as
`params/block1/layer3/conv2/kernel`; DIR/model.json says of which network they are.
"""

import argparse
import dataclasses
import hashlib
import importlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from densejax import lock, models, transfer
from densejax.config import UserError
from densejax.transfer import from_keras, from_torch, to_torch
from densejax.weight_names import LAYOUTS

__all__ = ["convert_file", "from_keras", "from_torch", "load", "load_for", "save", "to_torch"]

HUB = "hf-hub:"
# What changes the computation, and neither the names nor the shapes of the variables.
UNSEEN = ("batch_norm_epsilon", "identity", "join", "shortcut", "stride_on", "survival")


def read(source: str) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a weights file by name, and the SHA-256 of the file.

    Args:
      source: a .safetensors file; a .pth or .pt file, of tensors only, where PyTorch is installed
        (nothing that a file could make Python execute is); Keras' .h5 file where h5py is; or
        "hf-hub:owner/name" where huggingface_hub is.

    Raises:
      UserError: in one line, when it cannot be read.
    """
    path = source
    if source.startswith(HUB):
        hub = _optional("huggingface_hub", source, "install densejax[hub]")
        try:
            path = hub.hf_hub_download(source.removeprefix(HUB), "model.safetensors")
        except Exception as error:  # of the network, the hub or the disk: they share no class
            raise _unreadable(source, error) from error
    readers = {".safetensors": safetensors.numpy.load, ".pth": None, ".pt": None, ".h5": None}
    suffix = os.path.splitext(path)[1]
    if suffix not in readers:
        raise UserError(f"--weights={source}: must end in one of {', '.join(readers)}")
    if suffix == ".h5":
        h5py = _optional("h5py", source, "install h5py")
        readers[suffix] = lambda data: _keras_arrays(h5py, data)
    elif suffix != ".safetensors":
        remedy = "install torch, or save the tensors as .safetensors"
        torch = _optional("torch", source, remedy)
        readers[suffix] = lambda data: _torch_arrays(torch, data)
    try:
        data = epath.Path(path).read_bytes()
        return readers[suffix](data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # safetensors, pickle, HDF5 and file systems share no class
        raise _unreadable(source, error) from error


def _torch_arrays(torch, data: bytes) -> dict[str, np.ndarray]:
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in state.items()
    }


def _keras_arrays(h5py, data: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    with h5py.File(io.BytesIO(data)) as file:
        weights = file.get("model_weights", file)  # a whole model has them one level down
        for layer in weights.attrs["layer_names"].astype(str):
            for name in weights[layer].attrs["weight_names"].astype(str):
                key = f"{layer.replace('/', '_')}/{name.rpartition('/')[2]}"
                arrays[key] = weights[layer][name][()]
    return arrays


def _optional(module: str, source: str, remedy: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--weights={source}: needs {module}; {remedy}") from error


def _unreadable(source: str, error: Exception) -> UserError:
    return UserError(f"--weights={source}: cannot be read ({_brief(error)})")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


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
    flat = transfer.flatten(variables)
    data = safetensors.numpy.save({p: np.ascontiguousarray(array) for p, array in flat.items()})
    digest = {"weights_sha256": hashlib.sha256(data).hexdigest()}
    try:
        path.mkdir(parents=True)
        (path / "weights.safetensors").write_bytes(data)
        # Last: a directory without it, or whose weights are not those it names, is refused.
        lock.write(path / "model.json", json.dumps({**description, **digest}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output={directory}: {error}") from error


def load(directory: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save` wrote.

    Returns:
      The description, whose "model" is fit for `densejax.models.create`, and the variables, float32
      NumPy arrays, checked against that network.

    Raises:
      UserError: no such directory, a damaged one, or weights that are not of its network.
    """
    path = epath.Path(directory)
    try:
        description = json.loads((path / "model.json").read_text())
        data = (path / "weights.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != description["weights_sha256"]:
            raise ValueError("weights.safetensors is not the file that model.json was written for")
        stored = {
            k: tuple(v) if isinstance(v, list) else v for k, v in description["model"].items()
        }
        family = dataclasses.fields(models.FAMILIES[stored["family"]])
        # A field that is newer than the directory is at its default.
        newer = {f.name: f.default for f in family if f.name not in models.RUN_FIELDS}
        description["model"] = newer | stored
        network = models.create(description["model"], description["num_classes"])
        expected = transfer.abstract(network, description["image_channels"])
        flat = safetensors.numpy.load(data)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{directory}: not a directory of densejax.pretrained, or damaged ({_brief(error)})"
        ) from error
    transfer.check_fit(flat, expected, f"{directory}/weights.safetensors")
    return description, transfer.unflatten(flat)


def load_for(
    directory: str, model: Mapping[str, Any], expected: Mapping[str, Any]
) -> dict[str, Any]:
    """The variables of a directory, checked to be those of a run's network.

    Args:
      directory: written by `save`.
      model: the section `config.model` of the run.
      expected: its params and batch_stats, arrays or shapes.
    """
    description, variables = load(directory)
    what = f"train.weights = {directory!r}:"
    transfer.check_fit(transfer.flatten(variables), transfer.flatten(expected), what)
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
) -> dict[str, Any]:
    """Makes a directory from a weights file; returns its description.

    Args:
      model: a name of densejax.models.MODELS; what else the weights' project implies is set.
      weights: see `read`.
      output: the new directory.
      num_classes: None: as the weights have.
      in_channels: of the images; None: as the weights have.
      adapt: see `densejax.transfer.convert`.
      seed: see there.
    """
    for flag, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1)):
        if value is not None and value < least:
            raise UserError(f"--{flag}={value}: must be at least {least}")
    if epath.Path(output).exists():
        raise UserError(f"--output={output}: exists; name a new directory")
    family = models.fields(model).family
    arrays, digest = read(weights)
    layout = transfer.find_layout(LAYOUTS[family], arrays)
    if num_classes is None:
        bias = transfer.spelled(layout, arrays).get(layout.name(transfer.CLASSIFIER[1]))
        num_classes = 0 if bias is None else bias.size
    fields = models.fields(model, **layout.fields)
    variables = transfer.convert(
        models.create(fields, num_classes),
        *(arrays, layout),
        image_channels=in_channels,
        adapt=adapt,
        seed=seed,
    )
    stem = next(k for p, k in transfer.flatten(variables).items() if p in transfer.STEMS)
    description = {
        "name": model,
        "model": fields.to_dict(),
        "num_classes": num_classes,
        "image_channels": stem.shape[2],
        "source": weights,
        "source_sha256": digest,
        "names": layout.project,
    }
    save(output, description, variables)
    return description


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser("densejax.pretrained", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a name of densejax.models.MODELS")
    parser.add_argument(
        "--weights", required=True, help=f".safetensors, .pth, .h5, {HUB}owner/name"
    )
    parser.add_argument("--output", required=True, help="a new directory")
    parser.add_argument("--num_classes", type=int, help="default: as the weights have")
    parser.add_argument(
        "--in_channels", type=int, help="of the images; default: as the weights have"
    )
    parser.add_argument("--adapt", action="store_true", help="new classifier, other image channels")
    parser.add_argument("--seed", type=int, default=0, help="of a new classifier")
    options = vars(parser.parse_args(arguments))
    try:
        made = convert_file(**options)
    except UserError as error:
        print(f"densejax: {error}", file=sys.stderr)
        return 2
    print(f"{options['output']}: {made['name']}, {made['num_classes']} classes, "
          f"{made['image_channels']} image channels")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
