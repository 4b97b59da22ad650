"""Reads weights files of other projects. No code in a file is executed.

No file can fill the memory either: an array is a view of the file's own bytes.
"""

import hashlib
import importlib
import io
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from densejax.config import UserError
from densejax.runs import files

HUB = "hf-hub:"
SEPARATOR = "::"  # stands after the part of a file that an array is in, such as "state_dict"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": BFLOAT16, "BOOL": "?"} | {
    f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)
}
STORAGES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": BFLOAT16, "Bool": "?"}
STORAGES |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first number in files of torch.save before PyTorch 1.6
MODULE = re.compile(r"_modules::(.+?)::|_(?:parameters|buffers)::")  # where a whole model is saved


def is_file(source: str) -> bool:
    """Whether a source is for `read`, and not a directory."""
    return source.startswith(HUB) or (
        source.endswith(tuple(READERS)) and not files.path_of("weights", source).is_dir()
    )


def read(source: str, key: str = "--weights") -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a weights file by name, and the SHA-256 of the file.

    Args:
      source: a .safetensors file; a file that torch.save wrote, where names begin with the part of
        the file that they are in, such as "state_dict::"; a .h5 or .keras file of Keras (needs
        h5py); or "hf-hub:owner/name" (needs huggingface_hub).
      key: what names the source, for messages.

    Raises:
      UserError: it cannot be read.
    """
    is_on_hub = source.startswith(HUB)
    name = "model.safetensors" if is_on_hub else source
    suffix = next((suffix for suffix in READERS if name.endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{key}={source}: must end in one of {', '.join(READERS)}")
    path = files.path_of(key, source)
    try:
        if is_on_hub:
            hub = _optional("huggingface_hub", "pip install 'densejax-lab[hub]'")
            path = files.path_of(key, hub.hf_hub_download(source.removeprefix(HUB), name))
        with files.opened(path) as file:
            data = file.read()
        return READERS[suffix](data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # the readers' and the hub's errors have no class in common
        raise UserError(f"{key}={source}: cannot be read ({files.first_line(error)})") from error


def from_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, whose header is checked against its bytes."""
    return {
        name: np.frombuffer(array["data"], DTYPES[array["dtype"]]).reshape(array["shape"])
        for name, array in safetensors.deserialize(data)
    }


class _Tensor(NamedTuple):
    storage: tuple  # "storage", class, key, device, elements
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _from_torch(data: bytes) -> dict[str, np.ndarray]:
    dtypes: dict[str, np.dtype] = {}
    if data.startswith(b"PK"):
        entries = _unzip(data)
        root = next((n.removesuffix("data.pkl") for n in entries if n.endswith("data.pkl")), None)
        if root is None or entries.get(f"{root}byteorder", b"little") != b"little":
            raise ValueError("it is not what torch.save writes on a little-endian machine")
        tree = _parse_pickle(io.BytesIO(entries[f"{root}data.pkl"]), dtypes)
        storages = {key: entries[f"{root}data/{key}"] for key in dtypes}
    else:
        stream = io.BytesIO(data)
        if _parse_pickle(stream, dtypes) != LEGACY_MAGIC:
            raise ValueError("it is not what torch.save writes")
        _, _, tree, keys = (_parse_pickle(stream, dtypes) for _ in range(4))
        sizes = ((key, int.from_bytes(stream.read(8), "little")) for key in keys)
        storages = {key: stream.read(size * dtypes[key].itemsize) for key, size in sizes}
    tensors: dict[str, _Tensor] = {}
    _collect_tensors(tree, "", tensors, set())
    arrays = {}
    for name, tensor in tensors.items():
        name = MODULE.sub(lambda match: f"{match[1]}." if match[1] else "", name)
        key = tensor.storage[2]
        arrays[name] = _array(tensor, storages[key], dtypes[key])
    return arrays


def _unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = file.infolist()
        _require_within(sum(entry.file_size for entry in entries), data)
        return {entry.filename: file.read(entry) for entry in entries}


def _require_within(size: int, data: bytes) -> None:
    if size > len(data):
        raise ValueError(f"its {len(data)} bytes stand for {size}: write it without compression")


def _parse_pickle(stream: BinaryIO, dtypes: dict[str, np.dtype]) -> Any:
    """Reads one pickle: numbers, texts, dicts, `_Tensor`, and lists (also in place of tuples).

    An object of any other class becomes a dict of its attributes. `dtypes` gets the dtype of each
    storage that the pickle names.
    """
    stack, marks, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(stream):
        first, before = len(stack) - len(opcode.stack_before), opcode.stack_before
        if pickletools.markobject in before:
            first = marks.pop() - before.index(pickletools.markobject)
        items = stack[first:]
        del stack[first:]
        target = items[0] if items else {}
        match opcode.name:
            case "STOP":
                return target
            case "MARK":
                marks.append(first)
                continue
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = target
            case "GET" | "BINGET" | "LONG_BINGET":
                target = memo[argument]
            case "SETITEM" | "SETITEMS" if isinstance(target, dict):
                pairs = zip(items[1::2], items[2::2], strict=True)
                target.update({key: value for key, value in pairs if isinstance(key, str | int)})
            case "BUILD" if isinstance(target, dict) and isinstance(items[1], dict):
                target.update(items[1])
            case "APPEND" | "APPENDS" if isinstance(target, list):
                target.extend(items[1:])
            case "EMPTY_LIST" | "LIST" | "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                target = items
            case "STACK_GLOBAL":
                target = items[1]
            case "REDUCE" | "NEWOBJ":
                target = _call(*items)
            case "BINPERSID" if target[0] == "storage":
                kind = str(target[1]).rpartition(" ")[2].removesuffix("Storage")
                if kind not in STORAGES:
                    raise ValueError(f"its numbers are {kind}: save them before quantisation")
                dtypes[target[2]] = np.dtype(STORAGES[kind])
            case _ if not before and not opcode.name.startswith("EMPTY"):
                target = argument
        stack += [target] if opcode.stack_after else []
    raise ValueError("its pickle has no end")


def _call(function: Any, arguments: list) -> Any:
    match str(function).rpartition(" ")[2]:
        case "_rebuild_tensor_v2" | "_rebuild_tensor":
            return _Tensor(*arguments[:4])
        case "OrderedDict" if arguments:  # Python 2 gave its content as an argument
            return {key: value for key, value in arguments[0] if isinstance(key, str)}
        case "_rebuild_parameter" | "_rebuild_parameter_with_state":
            return arguments[0]
    return {}


def _collect_tensors(tree: Any, prefix: str, found: dict[str, _Tensor], seen: set[int]) -> None:
    if isinstance(tree, _Tensor):
        found[prefix.removesuffix(SEPARATOR)] = tree
    elif isinstance(tree, dict) and id(tree) not in seen:
        seen.add(id(tree))
        if len(prefix) > 1000:
            raise ValueError("its names are nested too deeply")
        for key, value in tree.items():
            _collect_tensors(value, f"{prefix}{key}{SEPARATOR}", found, seen)


def _array(tensor: _Tensor, storage: bytes, dtype: np.dtype) -> np.ndarray:
    _, offset, shape, strides = tensor
    size = dtype.itemsize
    array = np.ndarray(shape, dtype, storage, offset * size, [step * size for step in strides])
    _require_within(array.nbytes, storage)
    return array


def _from_keras(data: bytes) -> dict[str, np.ndarray]:
    h5py, found = _optional("h5py", "pip install h5py"), {}
    if data.startswith(b"PK"):
        data = _unzip(data)["model.weights.h5"]
    with h5py.File(io.BytesIO(data)) as file:
        # Links to other files are not followed, and each dataset is visited once.
        file.visititems(lambda name, item: found.update({name: item}))
        found = {
            name: item
            for name, item in found.items()
            if isinstance(item, h5py.Dataset) and not name.startswith("optimizer")
        }
        _require_within(sum(item.nbytes for item in found.values()), data)
        for name, item in found.items():
            kind, filters = item.dtype.kind, item.id.get_create_plist().get_nfilters()
            is_elsewhere = item.external or item.is_virtual
            is_plain = kind in "fiub" and not filters and not is_elsewhere
            if not is_plain or item.id.get_storage_size() < item.nbytes:
                raise ValueError(f"{name} is not an array of numbers in this file, uncompressed")
        return {_keras_name(item): item[()] for item in found.values()}


def _keras_name(item: Any) -> str:
    *layer, leaf = (part for part in item.name.split("/") if part not in ("", "model_weights"))
    if layer[-1:] == ["vars"]:  # Keras 3: variables are numbered
        if item.parent.attrs.get("name") is None:
            raise ValueError("its layers have no names: load it in today's Keras and save it again")
        leaves = ("gamma", "beta", "moving_mean", "moving_variance")
        leaves = leaves if len(item.parent) == 4 else ("kernel", "bias")
        return f"{item.parent.attrs['name']}/{leaves[int(leaf)]}"
    half = len(layer) // 2  # the path has a layer's name twice, except in a model within a model
    layer = layer[:half] if layer[:half] == layer[half:] else layer[1:] or layer
    return f"{'_'.join(layer)}/{leaf}"


READERS: dict[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    ".safetensors": from_safetensors,
    **dict.fromkeys((".pth", ".pt", ".th", ".pth.tar", ".ckpt", ".bin"), _from_torch),
    **dict.fromkeys((".h5", ".keras"), _from_keras),
}


def _optional(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is needed; {remedy}") from error
