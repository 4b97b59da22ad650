"""Sets that outgrow memory: encoded images, decoded by worker processes, batches by step.

The stream's state is one integer, the step. Which example stands where in a step's batch, and how
it is cropped, follows from the seed, the epoch and the place in the epoch; the number of workers,
processes and devices only decides who does the work.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Sharding

from densejax.data.builders import DataError
from densejax.data.encoded import Example, ImageError
from densejax.data.memory import Batch, permutation
from densejax.runs import interrupt

PIECE = 16  # images that a worker hands over at once: few messages, little shared memory
AHEAD = 2  # batches on the devices before they are asked for
GRACE = 5.0  # seconds that a batch which is waited for, or a worker, has once all is to end


class Starved(DataError):
    """A signal has come, and no batch."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """One process's share of every batch of a split, in pieces, as Grain wants a source.

    Attributes:
      examples: of the split.
      indices: int32, which of them are used.
      batch_size: of the global batch.
      places: int32, rising, the places in a global batch that this process fills.
      crop: makes uint8 [image_size, image_size, 3] of an encoded image and the size; where the
        order is shuffled it also gets the bit generator of this example in this epoch.
      image_size: pixels.
      seed: of order and crops; None: the order of `indices`, once, then padding without end.
      skip: whether an image that cannot be read is replaced by the one after it.
    """

    examples: Sequence[Example]
    indices: np.ndarray
    batch_size: int
    places: np.ndarray
    crop: Callable[..., np.ndarray]
    image_size: int
    seed: int | None = None
    skip: bool = False

    @property
    def size(self) -> int:
        """Images in a piece: the share of a batch divides by it."""
        return math.gcd(len(self.places), PIECE)

    @property
    def per_step(self) -> int:
        """Pieces of a batch."""
        return len(self.places) // self.size

    def __len__(self):
        """No end: the reader stops. Grain leaves shared memory behind where it reads to an end."""
        return sys.maxsize // 2

    def __getitem__(self, number):
        """The piece of a number: image uint8, label int32, mask bool, each [size, ...]."""
        step, part = divmod(number, self.per_step)
        steps_per_epoch = len(self.indices) // self.batch_size
        epoch, step = (0, step) if self.seed is None else divmod(step, steps_per_epoch)
        places = self.places[part * self.size : (part + 1) * self.size] + step * self.batch_size
        piece = {
            "image": np.zeros((self.size, self.image_size, self.image_size, 3), np.uint8),
            "label": np.zeros(self.size, np.int32),
            "mask": places < len(self.indices),
        }
        for row, place in enumerate(places[piece["mask"]]):
            piece["image"][row], piece["label"][row] = self._example(epoch, int(place))
        return piece

    def _example(self, epoch, place):
        count, bits = len(self.indices), ()
        for later in range(count if self.skip else 1):
            rank = (place + later) % count
            if self.seed is not None:
                rank = _order(self.seed, epoch, count)[rank]
                # Another counter than the permutation's, whose third word is zero.
                bits = (np.random.Philox(key=[self.seed, epoch], counter=[0, place, 1, 0]),)
            try:
                return self._read(int(self.indices[rank]), *bits)
            except ImageError as error:
                if not self.skip:
                    hint = "" if self.seed is None else ", or set data.corrupt_images = 'skip'"
                    raise DataError(f"{error}; replace or remove it{hint}") from error
                logging.warning("%s; the next one is trained on instead", error)
        raise DataError("data.corrupt_images = 'skip': none of the training images can be read")

    def _read(self, index, *bits):
        encoded, label, name = self.examples[index]
        try:
            return self.crop(encoded, self.image_size, *bits), label
        except Exception as error:  # Pillow's decoders raise whatever damage leads to
            line = " ".join(str(error).split()) or type(error).__name__
            raise ImageError(f"{name}: no image that can be read ({line})") from error


_order = functools.lru_cache(maxsize=2)(permutation)


def share(split: Sharding, batch_size: int, process: int) -> np.ndarray:
    """The places int32 of a global batch that lie on a process's devices, rising."""
    slices = split.devices_indices_map((batch_size,)).items()
    every = np.arange(batch_size, dtype=np.int32)
    return np.unique(np.concatenate([every[i] for d, i in slices if d.process_index == process]))


def batches(
    pieces: Pieces,
    split: Sharding,
    workers: int,
    start: int = 0,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """The global batches from step `start` on, two of them on the devices ahead of their use.

    Close the iterator: workers end then, and also when this process does. Without a batch for
    `GRACE` seconds after `is_stopping()` it raises Starved.
    """
    import grain

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; a notebook parses none
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(pieces)[start * pieces.per_step :]
    # Two threads: one waits for a file while the other decodes.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    options = grain.MultiprocessingOptions(num_workers=workers)
    iterator = iter(dataset.mp_prefetch(options, worker_init_fn=_start_worker))
    every, others = np.arange(pieces.batch_size), set(multiprocessing.active_children())
    decoders = set()

    def place():
        try:
            parts = list(itertools.islice(iterator, pieces.per_step))
            decoders.update(set(multiprocessing.active_children()) - others)
        except RuntimeError as error:  # a process that decodes has ended
            dead = [f"{each.pid} (exit code {each.exitcode})" for each in decoders if each.exitcode]
            raise DataError(
                f"data.workers = {workers}: the worker process {', '.join(dead) or error} has "
                f"ended; where memory or /dev/shm is short, fewer workers may do"
            ) from error
        local = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

        def shard(key, index):
            rows = np.searchsorted(pieces.places, every[index[0]])
            return local[key][rows[0] : rows[-1] + 1]

        return {
            key: jax.make_array_from_callback(
                (len(every), *array.shape[1:]), split, functools.partial(shard, key)
            )
            for key, array in local.items()
        }

    # Workers inherit from the thread that starts them which signals they leave to the run. Grain's
    # own prefetching thread would start them one after the other.
    multiprocessing.resource_tracker.ensure_running()  # from here: it unblocks both signals
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    block = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, signals)
    thread = concurrent.futures.ThreadPoolExecutor(1, initializer=block)
    ahead = collections.deque(thread.submit(place) for _ in range(AHEAD + 1))
    try:
        while True:
            stopping = is_stopping()
            if not concurrent.futures.wait([ahead[0]], GRACE if stopping else 1).done:
                if stopping:
                    raise Starved(f"data.workers = {workers}: no batch comes any more")
                continue
            yield ahead.popleft().result()
            ahead.append(thread.submit(place))
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        under_way = [future for future in ahead if future.running()]
        if concurrent.futures.wait(under_way, GRACE).not_done:
            for process in decoders | set(multiprocessing.active_children()) - others:
                process.kill()
            interrupt.stuck += concurrent.futures.wait(under_way, GRACE).not_done
        iterator.close()


def _start_worker(index, count):
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)  # a killed run leaves no workers

    threading.Thread(target=watch, daemon=True).start()


class StreamSet:
    """One split, streamed; its batches are those of MemorySet.

    Args:
      pieces: of this process.
      split: sharding that cuts the leading axis of a batch over the devices.
      workers: processes that decode; 0: none, this one does.
    """

    def __init__(self, pieces: Pieces, split: Sharding, workers: int):
        """Starts nothing."""
        self.size, self.batch_size = len(pieces.indices), pieces.batch_size
        self.steps_per_epoch = self.size // self.batch_size
        self._pieces, self._split, self._workers = pieces, split, workers
        self._iterator, self._next = None, -1
        self.is_stopping = lambda: False

    def _batches(self, start=0):
        return batches(self._pieces, self._split, self._workers, start, lambda: self.is_stopping())

    def batch(self, step: int) -> Batch:
        """The training batch of a step; steps that follow each other are read ahead."""
        if step != self._next:
            self.close()
            self._iterator = self._batches(step)
        self._next = step + 1
        batch = next(self._iterator)
        return {"image": batch["image"], "label": batch["label"]}

    def evaluation(self) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded where `mask`, bool, is false."""
        steps = -(-self.size // self.batch_size)
        with contextlib.closing(self._batches()) as iterator:
            yield from itertools.islice(iterator, steps)

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator, self._next = None, -1
