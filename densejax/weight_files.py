"""Reads weights files of other projects; none can make Python execute anything, unless asked to."""

import functools
import hashlib
import importlib
import io
import os
import pickle
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from etils import epath

from densejax.config import UserError

HUB = "hf-hub:"


def read(source: str, allow_pickle: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a weights file by name, and the SHA-256 of the file.

    Args:
      source: a .safetensors file; a .pth or .pt file, of tensors only, where PyTorch is installed
        (nothing that a file could make Python execute is); Keras' .h5 file where h5py is; or
        "hf-hub:owner/name" where huggingface_hub is.
      allow_pickle: take any objects from a .pth or .pt file: it can execute whatever it likes.

    Raises:
      UserError: in one line, when it cannot be read.
    """
    path = _download(source) if source.startswith(HUB) else source
    suffix = os.path.splitext(path)[1]
    if suffix not in READERS:
        raise UserError(f"--weights={source}: must end in one of {', '.join(READERS)}")
    read_arrays = READERS[suffix]
    if allow_pickle:
        if read_arrays is not _from_torch:
            raise UserError(f"--allow_pickle: only .pth and .pt read it, {source} has no pickle")
        read_arrays = functools.partial(_from_torch, allow_pickle=True)
    try:
        data = epath.Path(path).read_bytes()
        return read_arrays(data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # safetensors, pickle, HDF5 and file systems share no class
        raise UserError(f"--weights={source}: cannot be read ({brief(error)})") from error


def _download(source: str) -> str:
    try:
        hub = _optional("huggingface_hub", "install densejax[hub]")
        return hub.hf_hub_download(source.removeprefix(HUB), "model.safetensors")
    except Exception as error:  # of the network, the hub or the disk: they share no class
        raise UserError(f"--weights={source}: cannot be read ({brief(error)})") from error


def _from_torch(data: bytes, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    torch = _optional("torch", "install torch, or save the tensors as .safetensors")
    # Before, a file could execute code in spite of weights_only: CVE-2025-32434.
    if not allow_pickle and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ImportError(f"torch {torch.__version__} can be made to execute code; install 2.6")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"it has more than tensors, which torch would execute; if you trust its origin, "
            f"--allow_pickle takes it ({brief(error)})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state.state_dict()
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
