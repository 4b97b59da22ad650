"""Tiny archives in the official formats, byte layout included, with random images."""

import dataclasses
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import scipy.io

from densejax.data import builders


def make(name, folder, splits=None, python=False, arrays=None):
    """Writes the set `name` into `folder`; returns its SetInfo (tiny) and its arrays per split.

    Put the SetInfo into `builders.SETS` to read the archives: it has their counts and digests.
    """
    facts = builders.SETS[name]
    splits = splits or dict.fromkeys(facts.splits, 10)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays or random_arrays(facts, splits)
    write = {"fashion_mnist": write_idx, "svhn": write_svhn}.get(name)
    if write:
        write(folder, arrays)
    else:
        (write_cifar_python if python else write_cifar_binary)(folder, name, arrays)
    return with_digests(dataclasses.replace(facts, splits=splits), folder), arrays


def random_arrays(facts, splits):
    """Images uint8 [n, h, w, c] and labels [n] that cover 0 and the last class in every split."""
    random = np.random.default_rng(7)
    arrays = {}
    for split, count in splits.items():
        images = random.integers(0, 256, (count, *facts.image_shape), np.uint8)
        labels = random.integers(0, facts.num_classes, count)
        labels[0], labels[-1] = 0, facts.num_classes - 1
        arrays[split] = images, labels
    return arrays


def with_digests(facts, folder):
    """The facts with the digests of the files that lie in `folder`, and no address that answers."""

    def tiny(file):
        path, digest = Path(folder) / file.name, file.sha256
        if path.exists():
            content = path.read_bytes()
            digest = hashlib.sha256(
                gzip.decompress(content) if file.compressed else content
            ).hexdigest()
        return dataclasses.replace(file, url=f"http://127.0.0.1:9/{file.name}", sha256=digest)

    return dataclasses.replace(
        facts, files=tuple(tuple(tiny(file) for file in entry) for entry in facts.files)
    )


def store(folder, name, features, splits):
    """Prepares a set as TFDS does elsewhere: examples by split, as ArrayRecord."""
    tfds = builders.load_tfds()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(
                builder=self, features=features_dict, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


def write_idx(folder, arrays):
    """Writes the four gzipped IDX files: big-endian header, then the bytes."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[split]
        header = struct.pack(">IIII", 0x803, len(images), *images.shape[1:3])
        content = gzip.compress(header + images.tobytes(), mtime=0)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(content)
        header = struct.pack(">II", 0x801, len(labels))
        content = gzip.compress(header + labels.astype(np.uint8).tobytes(), mtime=0)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(content)


def write_svhn(folder, arrays):
    """Writes MATLAB 5 files: X [32, 32, 3, n] and y [n, 1], in which 10 stands for digit 0."""
    for split, (images, labels) in arrays.items():
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        content = {"X": images.transpose(1, 2, 3, 0), "y": y}
        scipy.io.savemat(folder / f"{split}_32x32.mat", content, do_compression=True)


def write_cifar_binary(folder, name, arrays):
    """Writes records of label bytes (CIFAR-100: coarse, fine) and 3072 bytes, plane by plane."""
    members = {}
    for member, images, labels in cifar_batches(name, arrays):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        columns = (
            [labels[:, None]] if name == "cifar10" else [labels[:, None] // 5, labels[:, None]]
        )
        members[f"{member}.bin"] = np.hstack([*columns, planes]).astype(np.uint8).tobytes()
    top, archive = {
        "cifar10": ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        "cifar100": ("cifar-100-binary", "cifar-100-binary.tar.gz"),
    }[name]
    write_tar(folder / archive, {f"{top}/{member}": data for member, data in members.items()})


def write_cifar_python(folder, name, arrays):
    """Writes pickles as Python 2 made them: protocol 2, byte strings, numpy.core's names."""
    members = {}
    for member, images, labels in cifar_batches(name, arrays):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        files = [f"image_{index}.png".encode() for index in range(len(labels))]
        batch = {b"data": planes, b"filenames": files, b"batch_label": b"a batch"}
        if name == "cifar10":
            batch[b"labels"] = labels.tolist()
        else:
            batch |= {b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        members[member] = python2_pickle(batch)
    top, archive = {
        "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    }[name]
    write_tar(folder / archive, {f"{top}/{member}": data for member, data in members.items()})


def cifar_batches(name, arrays):
    """Yields (member, images, labels): CIFAR-10's training set is five batches."""
    if name == "cifar100":
        yield from ((split, *arrays[split]) for split in ("train", "test"))
        return
    parts = [np.array_split(values, 5) for values in arrays["train"]]
    for number, (images, labels) in enumerate(zip(*parts, strict=True), start=1):
        yield f"data_batch_{number}", images, labels
    yield "test_batch", *arrays["test"]


def write_tar(path, members):
    """Writes a .tar.gz with these members, given as bytes by their exact names."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


class _Python2Pickler(pickle._Pickler):
    """Writes every string as Python 2's `str`, dtypes with integers, and numpy.core's old name."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("ascii")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            state = (3, value.byteorder, None, None, None, -1, -1, 0)
            return np.dtype, (value.str[1:], 0, 1), state
        return NotImplemented

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())
        self.memoize(value)


def python2_pickle(value):
    """The bytes that Python 2's `cPickle.dumps(value, 2)` would stand for."""
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()
