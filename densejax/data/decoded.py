"""Decodes encoded images once, as evaluation takes them: into arrays, and for mean and std."""

import concurrent.futures
import functools
from collections.abc import Sequence

import numpy as np

from densejax.data import encoded, images
from densejax.data.official import DataError
from densejax.data.stream import CHUNK, ChunkSource
from densejax.models.convolution import cores

MOST_MEASURED = 1000  # the most images that mean and std are computed from


def read(
    examples: Sequence[encoded.Example],
    indices: np.ndarray,
    size: int,
    resize: int,
    channels: int,
    skip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, size, size, channels] and labels int32 [n] of the examples at `indices`.

    `images.evaluation_crop` takes `size` and `resize`. With `skip`, the next image replaces one
    that cannot be read; without it, DataError names the image.
    """
    crop, rows = functools.partial(images.evaluation_crop, resize=resize), np.arange(CHUNK)
    source = ChunkSource(examples, indices, CHUNK, rows, crop, size, skip=skip, channels=channels)
    pixels = np.empty((len(indices), size, size, channels), np.uint8)
    labels = np.empty(len(indices), np.int32)

    def fill(number):
        chunk, place = source[number], slice(number * CHUNK, (number + 1) * CHUNK)
        pixels[place] = chunk["image"][chunk["mask"]]
        labels[place] = chunk["label"][chunk["mask"]]

    with concurrent.futures.ThreadPoolExecutor(cores()) as threads:
        list(threads.map(fill, range(-(-len(indices) // CHUNK))))
    return pixels, labels


@functools.cache
def statistics(
    examples: Sequence[encoded.Example], size: int, resize: int, channels: int, skip: bool
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(number, mean, std) of images spread evenly over a split, in uint8 units of each channel.

    They are the same on every machine, since they come from sums of integers. Other arguments are
    those of `read`. DataError for an image that cannot be read, or a channel that has one value
    everywhere.
    """
    indices = np.arange(len(examples))[:: -(-len(examples) // MOST_MEASURED)]
    found, _ = read(examples, indices, size, resize, channels, skip)
    levels, means, stds = np.arange(256), [], []
    for channel in range(found.shape[-1]):
        counts = sum(np.bincount(image[..., channel].ravel(), minlength=256) for image in found)
        means.append(float(counts @ levels / counts.sum()))
        stds.append(float(np.sqrt(counts @ (levels - means[-1]) ** 2 / counts.sum())))
    if 0 in stds:
        raise DataError(
            f"data.normalization = 'statistics': channel {stds.index(0)} of these images has one "
            f"value everywhere; set 'scale' to divide by 255 alone"
        )
    return len(indices), tuple(means), tuple(stds)
