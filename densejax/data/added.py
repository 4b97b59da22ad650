"""Data sets that are arrays in memory: `add` gives them a name for `config.data.name`."""

from collections.abc import Mapping, Sequence

import numpy as np

from densejax.config import UserError
from densejax.data.official import SETS, STREAMED, Arrays, SetInfo, check_arrays

ADDED: dict[str, tuple[SetInfo, Arrays]] = {}  # of this process alone


def add(
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str] | None = None,
) -> SetInfo:
    """Registers arrays as the data set `name` until this process ends; nothing is written.

        data.add("mine", {"train": (images, labels), "test": (test_images, test_labels)})
        config.data.name = "mine"

    Args:
      name: must not be the name of an official set. A set that was added under the same name
        before is replaced.
      splits: images uint8 [number, height, width, channels] and labels, integers [number] from 0,
        by the name of the split: "train", "test" and any others that `data.train_split` names.
      class_names: one for each label; None: the labels of the training images, as text.

    Returns:
      The facts of the set. The mean and the std are computed from the training images.

    Raises:
      UserError: an official set's name, or arrays of another type, shape or length, or labels that
        are no class.
    """
    try:
        arrays = {split: tuple(map(np.array, pair)) for split, pair in splits.items()}
        if name in {*SETS, *STREAMED, ""}:
            raise ValueError("this name is taken; choose another")
        info = _describe(arrays, class_names)
        for split, count in info.splits.items():
            check_arrays(info, split, count, *arrays[split])
    except (ValueError, TypeError) as error:
        raise UserError(f"densejax.data.add({name!r}): {error}") from error
    ADDED[name] = info, arrays
    return info


def _describe(arrays: Arrays, class_names: Sequence[str] | None) -> SetInfo:
    """The facts of the arrays; ValueError where no images can be found in them."""
    if "train" not in arrays:
        raise ValueError(f"splits must have 'train'; it has {', '.join(arrays)}")
    for split, (images, labels) in arrays.items():
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{split} has labels of type {labels.dtype}, not integers")
        if labels.size and labels.max() > 10**6:
            raise ValueError(f"{split} has the label {labels.max()}; number the classes from 0")
        if images.ndim != 4 or images.size == 0:
            raise ValueError(
                f"{split} images have the shape {list(images.shape)}; give at least one image, as "
                f"uint8 [number, height, width, channels]"
            )
    images, labels = arrays["train"]
    if class_names is None:
        class_names = [str(label) for label in range(int(labels.max(initial=0)) + 1)]
    channels = [images[..., channel] for channel in range(images.shape[-1])]
    std = tuple(float(channel.std(dtype=np.float64)) for channel in channels)
    if 0 in std:
        raise ValueError(f"channel {std.index(0)} of the train images has one value everywhere")
    return SetInfo(
        image_shape=images.shape[1:],
        class_names=tuple(map(str, class_names)),
        splits={split: len(images) for split, (images, _) in arrays.items()},
        mean=tuple(float(channel.mean(dtype=np.float64)) for channel in channels),
        std=std,
    )
