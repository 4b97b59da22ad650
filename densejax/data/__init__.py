"""From `config.data` to batches: which images train, which are held out, which test."""

import dataclasses

import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from densejax.config import UserError
from densejax.data import builders
from densejax.data.augment import Preparation
from densejax.data.memory import MemorySet, permutation


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
      train: training batches.
      evaluation: "test" where it is measured and "validation" where images are held out.
    """

    train: MemorySet
    evaluation: dict[str, MemorySet]


def preparation(config: ConfigDict) -> Preparation:
    """How images become the network's input, from `config.data` and `config.augmentation`."""
    info = builders.info(config.data.name, config.data.directory)
    channels = info.image_shape[-1]
    scale = ((0.0,) * channels, (255.0,) * channels)
    mean, std = scale if config.data.normalization == "scale" else (info.mean, info.std)
    if not mean:
        raise UserError(
            f"data.normalization = 'statistics': none are known of {config.data.name}; set 'scale'"
        )
    augmentation = config.augmentation
    return Preparation(
        mean,
        std,
        augmentation.shift,
        augmentation.flip,
        config.data.image_size,
        config.evaluate.crop_size,
        config.train.dtype,
    )


def train_size(config: ConfigDict, info: builders.SetInfo) -> int:
    """The number of images that train, from the set's facts alone.

    Raises:
      UserError: splits that are not there or must not train, or no batch's worth of images.
    """
    names = config.data.train_split.split("+")
    for name in names:
        if name not in info.splits or name == "test" or names.count(name) > 1:
            allowed = ", ".join(split for split in info.splits if split != "test")
            raise UserError(
                f"data.train_split = {config.data.train_split!r}: name {allowed} once each, "
                f"with '+' between them"
            )
    first, held_out = info.splits[names[0]], config.data.validation_size
    if held_out >= first:
        raise UserError(
            f"data.validation_size = {held_out}: must be below the {first} training images"
        )
    size = sum(info.splits[name] for name in names) - held_out
    if config.train.batch_size > size:
        raise UserError(
            f"train.batch_size = {config.train.batch_size}: must be at most the {size} "
            f"training images"
        )
    return size


def hold_out(size: int, validation_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices that train, indices held out) of `size` examples, the same whatever the seed."""
    order = permutation(seed=0, epoch=0, size=size)
    return np.sort(order[validation_size:]), np.sort(order[:validation_size])


def create(config: ConfigDict, whole: NamedSharding, split: NamedSharding) -> Data:
    """Reads a set, prepares it first where that was not done, and puts it on the devices.

    Held-out images come from the first split that `data.train_split` names. Test images are read
    only where the configuration measures on them.

    Args:
      config: the whole configuration.
      whole: sharding that puts a whole copy on every device.
      split: sharding that cuts the leading axis of a batch over the devices.

    Raises:
      UserError: a set, split or size that is not there; the message says how to get it.
    """

    def read(name):
        return builders.read(config.data.name, name, config.data.directory, config.data.manual_dir)

    first, *more = config.data.train_split.split("+")
    images, labels = read(first)
    trains, held_out = hold_out(len(images), config.data.validation_size)
    evaluate = config.evaluate
    measured = {evaluate.final_split, *([evaluate.split] if evaluate.every_epochs else [])}
    arrays = {"test": read("test")} if "test" in measured else {}
    if len(held_out):
        arrays["validation"] = (images[held_out], labels[held_out])
        images, labels = images[trains], labels[trains]
    parts = [(images, labels), *map(read, more)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    size = config.evaluate.batch_size
    return Data(
        MemorySet(images, labels, config.train.batch_size, config.seed, whole, split),
        {name: MemorySet(*pair, size, config.seed, whole, split) for name, pair in arrays.items()},
    )
