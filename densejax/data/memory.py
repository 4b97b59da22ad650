"""A split that is kept on every device as uint8; a batch follows from its step alone."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Batch = dict[str, jax.Array]


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` examples in an epoch, int32 [size].

    Sorts Philox's raw output (Salmon et al. 2011), whose stream NumPy keeps fixed for good; the
    streams of its generators may change between versions.
    """
    bits = np.random.Philox(key=[seed, epoch]).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int32)


class MemorySet:
    """One split on the devices.

    Args:
      images: uint8 [examples, height, width, channels].
      labels: int32 [examples].
      batch_size: images per batch over all devices.
      seed: of the order of training batches.
      replicated: sharding that puts a copy on every device.
      sharded: sharding that divides the leading axis of a batch over the devices.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        replicated: NamedSharding,
        sharded: NamedSharding,
    ):
        """Copies the arrays to the devices."""
        self.size, self.batch_size, self.seed = len(images), batch_size, seed
        self.steps_per_epoch = self.size // batch_size  # the remainder is reshuffled next epoch
        self._replicated = replicated
        self._images, self._labels = self._place(images), self._place(labels)
        self._epoch, self._order = -1, None

        @functools.partial(jax.jit, out_shardings=sharded)
        def take(images, labels, order, start):
            indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
            # Each device reads the images of its own rows alone.
            indices = jax.lax.with_sharding_constraint(indices, sharded)
            return {"image": images[indices], "label": labels[indices]}

        @functools.partial(jax.jit, out_shardings=sharded)
        def take_padded(images, labels, start):
            places = start + jnp.arange(batch_size, dtype=jnp.int32)
            places = jax.lax.with_sharding_constraint(places, sharded)
            indices = jnp.minimum(places, len(images) - 1)
            mask = places < len(images)
            return {"image": images[indices], "label": labels[indices], "mask": mask}

        self._take, self._take_padded = take, take_padded

    def _place(self, array):
        sharding = self._replicated
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def batch(self, step: int) -> Batch:
        """The training batch of a step: image uint8 [batch, h, w, c], label int32 [batch].

        Every epoch is a permutation of its own, of which the remainder is dropped; the position
        of the input is the step alone.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._place(permutation(self.seed, epoch, self.size))
        start = np.int32(index * self.batch_size)
        return self._take(self._images, self._labels, self._order, start)

    def evaluation(self) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded where `mask`, bool, is false."""
        for start in range(0, self.size, self.batch_size):
            yield self._take_padded(self._images, self._labels, np.int32(start))
