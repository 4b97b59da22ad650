"""Sets of encoded images of many sizes: plain folders, and what TFDS has prepared."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from densejax.data import builders
from densejax.data.builders import DataError
from densejax.data.official import STREAMED, SetInfo

SUFFIXES = (".jpg", ".jpeg", ".png")
Example = tuple[bytes, int, str]  # an encoded image, its label, and where it is


class Folder(Sequence[Example]):
    """The images of `path/class/*.jpg`, ordered by name; a class's label is its rank by name."""

    def __init__(self, path: epath.Path, class_names: tuple[str, ...]):
        """Lists the images; DataError where there are none, or other classes."""
        self.path = path
        names, labels = [], []
        for folder in _folders(path):
            if folder not in class_names:
                raise DataError(f"data.manual_dir: {path / folder} is no class of the training set")
            files = sorted(p.name for p in (path / folder).iterdir())
            files = [f"{folder}/{file}" for file in files if file.lower().endswith(SUFFIXES)]
            names += files
            labels += [class_names.index(folder)] * len(files)
        if not names:
            raise DataError(f"data.manual_dir: {path} has no class/image.jpg; also .jpeg and .png")
        # A million strings are slow to send to workers, one array of bytes is not.
        self.names = np.array([name.encode() for name in names])
        self.labels = np.array(labels, np.int32)

    def __len__(self):
        """The number of images."""
        return len(self.names)

    def identity(self) -> tuple[np.ndarray, ...]:
        """Arrays that change with the set."""
        return self.names, self.labels

    def __getitem__(self, index):
        """Reads an image."""
        path = self.path / self.names[index].decode()
        return path.read_bytes(), int(self.labels[index]), str(path)


class Records(Sequence[Example]):
    """A split that TFDS has prepared as ArrayRecord, its images left encoded."""

    def __init__(self, builder: Any, split: str):
        """Opens the files; DataError where TFDS cannot read them."""
        import tensorflow_datasets as tfds

        self.place = f"{builder.data_path}: {split}"
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            self.source = builder.as_data_source(split, decoders=decoders)
        except Exception as error:
            line = " ".join(str(error).split())
            raise DataError(f"data.name = {builder.name}: {self.place}: {line}") from error
        self.folder, self.split = str(builder.data_path), split
        self.num_classes = builder.info.features["label"].num_classes
        facts = builder.info.splits[split]
        self.version = f"{builder.info.full_name} {facts.num_bytes} {list(facts.shard_lengths)}"

    def __len__(self):
        """The number of images."""
        return len(self.source)

    def identity(self) -> tuple[np.ndarray, ...]:
        """Arrays that change with the set."""
        return (np.frombuffer(self.version.encode(), np.uint8),)

    def __getitem__(self, index):
        """Reads an image."""
        example = self.source[index]
        name, label = example.get("file_name", b"").decode(), int(example["label"])
        place = f"{self.place}[{index}] {name}".rstrip()
        if not 0 <= label < self.num_classes:
            raise DataError(f"{place}: has label {label}, not 0 to {self.num_classes - 1}")
        return example["image"], label, place

    def __reduce__(self):
        """A worker opens the files as this does; TFDS would import whatever they name."""
        return _records, (self.folder, self.split)


def _records(folder: str, split: str) -> Records:
    return Records(builders.open_folder(folder), split)


def _folders(path: epath.Path) -> list[str]:
    if not path.is_dir():
        raise DataError(f"data.manual_dir: there is no folder {path}; it needs train and val")
    return sorted(p.name for p in path.iterdir() if p.is_dir())


@functools.cache
def open_splits(name: str, directory: str, manual_dir: str) -> tuple[SetInfo, dict[str, Any]]:
    """The facts and the splits, "train" and "test", of a set.

    With `manual_dir` it is the folder with train/class/image.jpg and val/class/image.jpg, else the
    set `name` that TFDS has prepared in `directory`, whose "validation" is tested on where "test"
    is not there or has no labels, as ImageNet's.

    Raises:
      DataError: what is not there, or not as many images as the set officially has.
    """
    if manual_dir:
        path = epath.Path(manual_dir).expanduser()
        class_names = tuple(_folders(path / "train"))
        splits = {"train": Folder(path / "train", class_names)}
        test, splits["test"] = "val", Folder(path / "val", class_names)
    else:
        builder = builders.prepare(name, directory)
        class_names = tuple(builder.info.features["label"].names)
        test = builders.test_split(builder) or "test"
        splits = {"train": Records(builder, "train"), "test": Records(builder, test)}
    sizes = {split: len(examples) for split, examples in splits.items()}
    known = STREAMED.get(name)
    if known and (sizes, len(class_names)) != (known.splits, known.num_classes):
        raise DataError(
            f"data.name = {name}: found {sizes} images of {len(class_names)} classes, expected "
            f"{known.splits} of {known.num_classes}; give another set another name"
        )
    facts = known or SetInfo((0, 0, 3), class_names, sizes, mean=(), std=())
    return dataclasses.replace(facts, test_split=test), splits


def info(name: str, directory: str, manual_dir: str, image_size: int) -> SetInfo:
    """The facts of a set whose images are made [image_size, image_size, 3]; DataError as above.

    A set of `STREAMED` need not be there.
    """
    facts = STREAMED.get(name) or open_splits(name, directory, manual_dir)[0]
    return dataclasses.replace(facts, image_shape=(image_size, image_size, 3))
