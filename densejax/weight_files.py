"""Reads weights files of other projects; none of them can make Python execute anything."""

import hashlib
import importlib
import io
import os

import numpy as np
import safetensors.numpy
from etils import epath

from densejax.config import UserError

HUB = "hf-hub:"


def read(source: str) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a weights file by name, and the SHA-256 of the file.

    Args:
      source: a .safetensors file; a .pth or .pt file, of tensors only, where PyTorch is installed
        (nothing that a file could make Python execute is); Keras' .h5 file where h5py is; or
        "hf-hub:owner/name" where huggingface_hub is.

    Raises:
      UserError: in one line, when it cannot be read.
    """
    path = _download(source) if source.startswith(HUB) else source
    suffix = os.path.splitext(path)[1]
    if suffix not in READERS:
        raise UserError(f"--weights={source}: must end in one of {', '.join(READERS)}")
    try:
        data = epath.Path(path).read_bytes()
        return READERS[suffix](data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # safetensors, pickle, HDF5 and file systems share no class
        raise UserError(f"--weights={source}: cannot be read ({brief(error)})") from error


def _download(source: str) -> str:
    try:
        hub = _optional("huggingface_hub", "install densejax[hub]")
        return hub.hf_hub_download(source.removeprefix(HUB), "model.safetensors")
    except Exception as error:  # of the network, the hub or the disk: they share no class
        raise UserError(f"--weights={source}: cannot be read ({brief(error)})") from error


def _from_torch(data: bytes) -> dict[str, np.ndarray]:
    torch = _optional("torch", "install torch, or save the tensors as .safetensors")
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in state.items()
    }


def _from_keras(data: bytes) -> dict[str, np.ndarray]:
    h5py, arrays = _optional("h5py", "install h5py"), {}
    with h5py.File(io.BytesIO(data)) as file:
        weights = file.get("model_weights", file)  # a whole model has them one level down
        for layer in weights.attrs["layer_names"].astype(str):
            for name in weights[layer].attrs["weight_names"].astype(str):
                key = f"{layer.replace('/', '_')}/{name.rpartition('/')[2]}"
                arrays[key] = weights[layer][name][()]
    return arrays


READERS = {
    ".safetensors": safetensors.numpy.load,
    ".pth": _from_torch,
    ".pt": _from_torch,
    ".h5": _from_keras,
}


def _optional(module: str, remedy: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed; {remedy}") from error


def brief(error: Exception) -> str:
    """An error's class and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
