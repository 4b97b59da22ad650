"""Sets of encoded images of many sizes: plain folders, and what TFDS has prepared.

A split is a sequence whose entry is read from the disk when it is asked for.
"""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from densejax.data import builders
from densejax.data.official import STREAMED, DataError, SetInfo, one_line
from densejax.runs import files

# The same as torchvision's ImageFolder reads.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
Example = tuple[bytes, int, str]  # an encoded image, its label, and where it is stored
# File systems spell a letter and its accent as one character or as two.
_composed = functools.partial(unicodedata.normalize, "NFC")


class ImageError(DataError):
    """One image of a set cannot be read; the others may be."""


class Folder(Sequence[Example]):
    """The images anywhere below `path/class`, in the order of torchvision's ImageFolder.

    Files and folders whose name begins with a dot are no part of it. A class's label is its rank.
    """

    def __init__(self, path: epath.Path, class_names: tuple[str, ...] = ()):
        """Lists the images of `class_names`, or of every class that has a folder.

        Raises:
          DataError: a class has no image or is not among `class_names`, or nothing is there.
        """
        self.path, found = path, _image_files(path)
        self.class_names = class_names or tuple(dict.fromkeys(map(_composed, found)))
        ranks, labels = {name: rank for rank, name in enumerate(self.class_names)}, []
        for name, images in found.items():
            if (label := ranks.get(_composed(name))) is None or not images:
                nothing = f"has no image ({', '.join(SUFFIXES)}); add some, or remove the folder"
                problem = "is no class of the training set" if label is None else nothing
                raise DataError(f"data.manual_dir: {path / name} {problem}")
            labels += [label] * len(images)
        if not labels:
            raise DataError(f"data.manual_dir: {path} has no class/image.jpg")
        # A million strings are slow to send to workers, one array of bytes is not.
        self.names = np.array([os.fsencode(name) for images in found.values() for name in images])
        self.labels = np.array(labels, np.int32)

    def __len__(self):
        """The number of images."""
        return len(self.names)

    def identity(self) -> tuple[np.ndarray, ...]:
        """Arrays that change with the set."""
        return self.names, self.labels

    def __getitem__(self, index):
        """Reads an image; ImageError where that is impossible."""
        path = self.path / os.fsdecode(self.names[index])
        try:
            with files.opened(path) as file:
                return file.read(), int(self.labels[index]), str(path)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}") from error


def _image_files(path: epath.Path) -> dict[str, list[str]]:
    """The image files of each class by name, ordered, as paths below `path`."""

    def refuse(error):
        problem = f"data.manual_dir: the folder {error.filename} cannot be read"
        raise DataError(f"{problem} ({error.strerror}); it needs train and val") from error

    found = {}
    if "://" in os.fspath(path):
        walk = path.walk(on_error=refuse)
    else:
        walk = os.walk(path, onerror=refuse, followlinks=True)
    for folder, folders, names in walk:
        folders[:] = [name for name in folders if not name.startswith(".")]  # goes into these
        inside = str(folder).removeprefix(str(path)).strip("/")
        if not inside:
            found = {name: [] for name in sorted(folders)}
        for name in (name for name in names if not name.startswith(".")):
            place = os.path.join(folder, name)
            if inside and name.lower().endswith(SUFFIXES):
                found[inside.partition("/")[0]].append((inside, name))
            elif os.path.islink(place) and not os.path.exists(place):  # it may stand for a folder
                raise DataError(f"data.manual_dir: the link {place} leads nowhere; remove it")
    return {name: ["/".join(pair) for pair in sorted(pairs)] for name, pairs in found.items()}


class Records(Sequence[Example]):
    """A split that TFDS has prepared as ArrayRecord, its images left encoded."""

    def __init__(self, folder: str, split: str):
        """Opens the files of the folder `.../name/1.0.0`; DataError where TFDS cannot read them."""
        self.folder, self.split, self.place = folder, split, f"{folder}: {split}"
        builder = builders.open_folder(folder)
        decoders = {"image": builders.load_tfds().decode.SkipDecoding()}
        try:
            self.source = builder.as_data_source(split, decoders=decoders)
        except Exception as error:
            place = f"data.name = {builder.name}: {self.place}"
            raise DataError(f"{place}: {one_line(error)}") from error
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
        """Reads an image; ImageError where that is impossible, DataError for a wrong label."""
        place = f"{self.place}[{index}]"
        try:
            example = self.source[index]
        except Exception as error:  # damage to its file leads to errors of many kinds
            raise ImageError(f"{place}: {one_line(error)}") from error
        place = f"{place} {os.fsdecode(example.get('file_name', b''))}".rstrip()
        if not 0 <= (label := int(example["label"])) < self.num_classes:
            raise DataError(f"{place}: has label {label}, not 0 to {self.num_classes - 1}")
        return example["image"], label, place

    def __reduce__(self):
        """A worker opens the files anew: what TFDS pickles would import whatever they name."""
        return Records, (self.folder, self.split)


@functools.cache
def open_splits(name: str, directory: str, manual_dir: str) -> tuple[SetInfo, dict[str, Any]]:
    """The facts and the splits, "train" and "test", of a set.

    With `manual_dir` the set is the folder with train/class/image.jpg and val/class/image.jpg.
    Without, it is the set `name` that TFDS has prepared in `directory`; where its "test" is not
    there or has no labels, as ImageNet's, "test" is its "validation".

    Raises:
      DataError: something is not there, or a set of `STREAMED` has not its number of images.
    """
    if manual_dir:
        path = epath.Path(manual_dir).expanduser()
        splits, test = {"train": Folder(path / "train")}, "val"
        class_names = splits["train"].class_names
        splits["test"] = Folder(path / "val", class_names)
    else:
        builder = builders.prepare(name, directory)
        features = builder.info.features
        try:
            class_names, _ = tuple(features["label"].names), features["image"]
        except Exception as error:  # TFDS has many kinds of them
            needs = f"needs image and label, a ClassLabel; has {one_line(features)}"
            raise DataError(f"data.name = {name}: {needs}") from error
        test = builders.test_split(builder) or "test"
        folder = str(builder.data_path)
        splits = {"train": Records(folder, "train"), "test": Records(folder, test)}
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
    """The facts of a set whose images are made [image_size, image_size, 3].

    A set of `STREAMED` need not be there; of others, DataError as `open_splits`.
    """
    facts = STREAMED.get(name) or open_splits(name, directory, manual_dir)[0]
    return dataclasses.replace(facts, image_shape=(image_size, image_size, 3))
