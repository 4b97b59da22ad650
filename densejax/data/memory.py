"""A split that is kept on every device as uint8; a batch follows from its step alone."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Batch = dict[str, jax.Array]


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` examples in an epoch, int32 [size].

    It sorts Philox's raw output (Salmon et al. 2011), which NumPy promises never to change; the
    output of NumPy's generators may change between versions.
    """
    bits = np.random.Philox(key=[seed, epoch]).random_raw(size)
    return np.argsort(bits, kind="stable").astype(np.int32)


def mirrored(seed: int, epoch: int, size: int) -> np.ndarray:
    """Which of `size` examples are mirrored in an epoch, bool [size].

    Each example is mirrored in every second epoch; a draw decides if it is so in the first epoch
    (airbench; Jordan, arXiv:2404.00498).
    """
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, 2, 0]).random_raw(size)
    return (bits + np.uint64(epoch)) % np.uint64(2) == 1


@functools.cache  # a second run in the same process, too, finds them compiled
def _programs(size, batch_size, sharded):
    """(take, take_padded): they make a training batch and a batch of an evaluation."""

    @functools.partial(jax.jit, out_shardings=sharded)
    def take(arrays, order, start):
        indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
        # Each device reads the images of its own rows alone.
        indices = jax.lax.with_sharding_constraint(indices, sharded)
        return {name: array[indices] for name, array in arrays.items()}

    @functools.partial(jax.jit, out_shardings=sharded)
    def take_padded(arrays, start):
        places = start + jnp.arange(batch_size, dtype=jnp.int32)
        places = jax.lax.with_sharding_constraint(places, sharded)
        indices = jnp.minimum(places, size - 1)
        taken = {name: array[indices] for name, array in arrays.items()}
        return taken | {"mask": places < size}

    return take, take_padded


class MemorySet:
    """One split on the devices.

    Args:
      images: uint8 [examples, height, width, channels].
      labels: int32 [examples].
      batch_size: images per batch over all devices.
      seed: of the order of training batches.
      replicated: sharding that puts a copy on every device.
      sharded: sharding that divides the leading axis of a batch over the devices.
      alternates: training batches say which examples are `mirrored`.
      files: where the images are stored; () where that is not known.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        replicated: NamedSharding,
        sharded: NamedSharding,
        alternates: bool = False,
        files: Sequence[str] = (),
    ):
        """Copies the arrays to the devices."""
        self.size, self.batch_size, self.seed = len(images), batch_size, seed
        self.steps_per_epoch = self.size // batch_size  # the remainder is reshuffled next epoch
        self._replicated, self._alternates, self._files = replicated, alternates, files
        self._arrays = {"image": self._place(images), "label": self._place(labels)}
        self._epoch, self._order = -1, None
        self._take, self._take_padded = _programs(self.size, batch_size, sharded)

    @property
    def labels(self) -> np.ndarray:
        """The labels of all examples, int32."""
        return np.asarray(self._arrays["label"])

    def _place(self, array):
        sharding = self._replicated
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def batch(self, step: int) -> Batch:
        """The training batch of a step: image uint8 [batch, h, w, c], label int32 [batch], perhaps
        mirrored bool [batch].

        Every epoch has a permutation of its own, and its last examples are dropped if they do not
        fill a batch. The step alone is the position in the data.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._place(permutation(self.seed, epoch, self.size))
            if self._alternates:
                self._arrays["mirrored"] = self._place(mirrored(self.seed, epoch, self.size))
        return self._take(self._arrays, self._order, np.int32(index * self.batch_size))

    def evaluation(self) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded where `mask`, bool, is false."""
        for start in range(0, self.size, self.batch_size):
            yield self._take_padded(self._arrays, np.int32(start))

    def examples(self, places: list[int]) -> list[tuple[np.ndarray, int, str]]:
        """(image uint8 [height, width, channels], label, its file or "") of examples by place."""
        images, labels = (self._arrays[key].addressable_data(0) for key in ("image", "label"))
        files = self._files or [""] * self.size
        return [(np.asarray(images[n]), int(labels[n]), files[n]) for n in places]
