"""Encoded images decoded once, as evaluation takes them: into arrays, and for mean and std."""

import concurrent.futures
import functools
import os
from collections.abc import Sequence

import numpy as np

from densejax.data import encoded, images
from densejax.data.official import DataError
from densejax.data.stream import CHUNK, ChunkSource

MOST_MEASURED = 1000  # images that mean and std are of


def read(
    examples: Sequence[encoded.Example],
    indices: np.ndarray,
    size: int,
    *,
    resize: int,
    channels: int,
    skip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, size, size, channels] and labels int32 [n] of a split.

    Args:
      examples: the split.
      indices: int [n], the examples of it that are read, in this order.
      size: of `images.evaluation_crop`, pixels.
      resize: of the same.
      channels: 3 for colour, 1 for grey.
      skip: whether the next image stands in for one that cannot be read.

    Raises:
      DataError: an image cannot be read; it is named.
    """
    source = ChunkSource(
        examples,
        indices,
        CHUNK,
        np.arange(CHUNK),
        functools.partial(images.evaluation_crop, resize=resize),
        size,
        skip=skip,
        channels=channels,
    )
    pixels = np.empty((len(indices), size, size, channels), np.uint8)
    labels = np.empty(len(indices), np.int32)

    def fill(number):
        chunk, place = source[number], slice(number * CHUNK, (number + 1) * CHUNK)
        pixels[place] = chunk["image"][chunk["mask"]]
        labels[place] = chunk["label"][chunk["mask"]]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(-(-len(indices) // CHUNK))))
    return pixels, labels


@functools.cache
def statistics(
    name: str,
    place: tuple[str, str, float],
    size: int,
    *,
    resize: int,
    channels: int,
    skip: bool = False,
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(number of images, mean, std) of training images spread evenly over all of them.

    The mean and std are per channel, in uint8 units, the same on every machine: sums of integers.

    Args:
      name: of the set.
      place: `directory`, `manual_dir` and `test_share` of `encoded.open_splits`.
      size: as for `read`, as are `resize`, `channels` and `skip`.
      resize: see there.
      channels: see there.
      skip: see there.

    Raises:
      DataError: an image cannot be read, or all have one value.
    """
    train = encoded.open_splits(name, *place)[1]["train"]
    indices = np.arange(len(train))[:: -(-len(train) // MOST_MEASURED)]
    found, _ = read(train, indices, size, resize=resize, channels=channels, skip=skip)
    levels, means, stds = np.arange(256), [], []
    for channel in range(channels):
        counts = sum(np.bincount(image[..., channel].ravel(), minlength=256) for image in found)
        means.append(float(counts @ levels / counts.sum()))
        stds.append(float(np.sqrt(counts @ (levels - means[-1]) ** 2 / counts.sum())))
    if 0 in stds:
        raise DataError(f"data.name = {name}: channel {stds.index(0)} has one value everywhere")
    return len(indices), tuple(means), tuple(stds)
