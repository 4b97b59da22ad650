"""Sets of encoded images of many sizes: plain folders, and what TFDS has prepared.

A split is a sequence; an entry is read from the disk only when it is needed.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from densejax.data import builders
from densejax.data.added import ADDED
from densejax.data.official import SETS, STREAMED, DataError, SetInfo, one_line
from densejax.runs import files

# The same as torchvision's ImageFolder reads, and GIF.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {  # each with the names that its folder may have, in small or capital letters
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
HELD_OUT = "held out"  # the `SetInfo.test_split` of a folder without test images of its own
Example = tuple[bytes, int, str]  # an encoded image, its label, and where it is stored
# File systems spell a letter and its accent as one character or as two.
_composed = functools.partial(unicodedata.normalize, "NFC")


class ImageError(DataError):
    """One image of a set cannot be read; the others may be."""


class Folder(Sequence[Example]):
    """The images anywhere below `path/class`, in the order of torchvision's ImageFolder.

    Files and folders whose names begin with a dot are ignored. A class's label is its rank.
    `left_out` counts, by suffix, the other files whose names are not names of images.
    """

    def __init__(self, path: epath.Path, class_names: tuple[str, ...] = ()):
        """Lists the images of `class_names`, or of every class that has a folder.

        Raises:
          DataError: a class has no image or is not among `class_names`, or nothing is there.
        """
        self.path = path
        found, self.left_out = _image_files(path)
        self.class_names = class_names or tuple(dict.fromkeys(map(_composed, found)))
        ranks, labels = {name: rank for rank, name in enumerate(self.class_names)}, []
        for name, images in found.items():
            if (label := ranks.get(_composed(name))) is None or not images:
                nothing = f"has no image ({', '.join(SUFFIXES)}); add some, or remove the folder"
                problem = "is no class of the training set" if label is None else nothing
                raise DataError(f"data.manual_dir: {path / name} {problem}")
            labels += [label] * len(images)
        if not labels:
            problem = "has no class/image.jpg; images lie in a folder for each class"
            raise DataError(f"data.manual_dir: {path} {problem}")
        # A million strings are slow to send to workers, one array of bytes is not.
        self.names = np.array([os.fsencode(name) for images in found.values() for name in images])
        self.labels = np.array(labels, np.int32)

    def __len__(self):
        """The number of images."""
        return len(self.names)

    def identity(self) -> tuple[np.ndarray, ...]:
        """Arrays that change with the set."""
        return self.names, self.labels

    def only(self, indices: np.ndarray) -> "Folder":
        """The same folder with only these of its images."""
        part = copy.copy(self)
        part.names, part.labels = self.names[indices], self.labels[indices]
        return part

    def divided(self, share: float) -> tuple["Folder", "Folder"]:
        """Two folders: the images that train, and a share of all images, but at least one image.

        The share has the classes in proportion. Only the names decide which images are in it: a
        new image moves few of the others.
        """
        digests = [hashlib.sha256(name).digest() for name in self.names.tolist()]
        order = np.array(sorted(range(len(self)), key=digests.__getitem__))
        count = max(1, int(share * len(self) + 0.5))
        held_out, rest = np.split(in_proportion(order, self.labels), [count])
        return self.only(np.sort(rest)), self.only(np.sort(held_out))

    def file(self, index: int) -> epath.Path:
        """Where an image is stored."""
        return self.path / os.fsdecode(self.names[index])

    def __getitem__(self, index):
        """Reads an image; ImageError where that is impossible."""
        path = self.file(index)
        try:
            with files.opened(path) as file:
                return file.read(), int(self.labels[index]), str(path)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror or error}") from error


def in_proportion(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reorders `order` so that, for any n, its first n entries have each class in proportion.

    In a class with c examples, the example with rank r is placed at (r + 1/2) / c. This is the
    method of Sainte-Lague, which also distributes the seats of parliaments.

    Args:
      order: int [examples], a permutation of the examples.
      labels: int [examples], the class of each example.
    """
    counts = np.bincount(labels)
    by_class = order[np.argsort(labels[order], kind="stable")]
    ranks = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(order))
    places[by_class] = (ranks + 0.5) / counts[labels[by_class]]
    return order[np.argsort(places[order], kind="stable")]


def _refuse(error: OSError) -> None:
    problem = f"the folder {error.filename} cannot be read ({error.strerror})"
    raise DataError(f"data.manual_dir: {problem}") from error


def _image_files(path: epath.Path) -> tuple[dict[str, list[str]], collections.Counter[str]]:
    """(sorted image files below `path` by class, counts of other files by suffix)."""
    found, others = {}, collections.Counter()
    if "://" in os.fspath(path):
        walk = path.walk(on_error=_refuse)
    else:
        walk = os.walk(path, onerror=_refuse, followlinks=True)
    for folder, folders, names in walk:
        folders[:] = [name for name in folders if not name.startswith(".")]  # walk enters these
        inside = str(folder).removeprefix(str(path)).strip("/")
        if not inside:
            found = {name: [] for name in sorted(folders)}
        for name in (name for name in names if not name.startswith(".")):
            place = os.path.join(folder, name)
            if inside and name.lower().endswith(SUFFIXES):
                found[inside.partition("/")[0]].append((inside, name))
            elif os.path.islink(place) and not os.path.exists(place):  # it may stand for a folder
                raise DataError(f"data.manual_dir: the link {place} leads nowhere; remove it")
            else:
                others[os.path.splitext(name)[1] if inside else "outside any class"] += 1
    images = {name: ["/".join(pair) for pair in sorted(pairs)] for name, pairs in found.items()}
    return images, others


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
        """A worker opens the files anew: TFDS's pickle would import any module that they name."""
        return Records, (self.folder, self.split)


def _open_folder(path: epath.Path, share: float, labelled_test: bool) -> tuple[str, dict[str, Any]]:
    """(what the folder calls the split "test", the splits)."""
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        _refuse(error)
    named = {
        split: [child for child in children if child.name.lower() in names]
        for split, names in SPLITS.items()
    }
    if not labelled_test:
        named.pop("test")
    for found in named.values():
        if len(found) > 1:
            names = " and ".join(child.name for child in found)
            raise DataError(
                f"data.manual_dir: {path} has {names}, which mean the same; put the images into "
                f"one of them"
            )
    folders = {split: found[0] for split, found in named.items() if found}
    if folders and "train" not in folders:
        other = next(iter(folders.values()))
        raise DataError(
            f"data.manual_dir: {other} is called as a split is, and there is no {path / 'train'}; "
            f"rename it if it is a class"
        )
    train = Folder(folders.pop("train", path))
    splits = {"train": train} | {s: Folder(f, train.class_names) for s, f in folders.items()}
    if "test" in splits:
        return folders["test"].name, splits
    if "validation" in splits:
        return folders["validation"].name, {"train": train, "test": splits["validation"]}
    found = dict(zip(("train", "test"), train.divided(share), strict=True))
    if not len(found["train"]):
        raise DataError(
            f"data.test_share = {share}: no image is left that trains; lower it, or add images"
        )
    return HELD_OUT, found


@functools.cache
def open_splits(
    name: str, directory: str, manual_dir: str, test_share: float
) -> tuple[SetInfo, dict[str, Any]]:
    """The facts and the splits, "train", "test" and perhaps "validation", of a set.

    With `manual_dir`, the set is a folder with train/class/image.jpg, and the same for the other
    names in `SPLITS`. If it has only one of validation and test, that one is "test". If it has
    neither, a share of the training images is "test". A folder without train has class/image.jpg.

    Without `manual_dir`, it is the set `name` that TFDS has prepared in `directory`. If its "test"
    is missing or has no labels, as in ImageNet, its "validation" is "test".

    Raises:
      DataError: something is missing, or a set of `STREAMED` has another number of images.
    """
    if manual_dir:
        path = epath.Path(manual_dir).expanduser()
        test, splits = _open_folder(path, test_share, labelled_test=name not in STREAMED)
        class_names = splits["train"].class_names
    else:
        are_arrays = f"data.name = {name}: its images are arrays; set data.storage = 'memory'"
        if name in SETS or name in ADDED:  # before anything is downloaded
            raise DataError(are_arrays)
        builder = builders.prepare(name, directory)
        features = builder.info.features
        try:
            class_names, image = tuple(features["label"].names), features["image"]
        except Exception as error:  # TFDS has many kinds of them
            needs = f"needs image and label, a ClassLabel; has {one_line(features)}"
            raise DataError(f"data.name = {name}: {needs}") from error
        if not isinstance(image, builders.load_tfds().features.Image):
            raise DataError(are_arrays)
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
