"""Sets that are too large for memory: worker processes decode images while the run trains.

A batch follows from its step alone: which image stands in which row, and how it is cropped, is
drawn from the seed, the epoch and the image's position in the epoch. The number of workers,
processes and devices decides only who does the work.
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

from densejax.data import images
from densejax.data.encoded import Example, ImageError
from densejax.data.memory import Batch, mirrored, permutation
from densejax.data.official import DataError, one_line
from densejax.runs import interrupt

CHUNK = 16  # images that a worker sends at once: few messages, little shared memory
AHEAD = 2  # batches that lie on the devices before the run asks for them
GRACE = 5.0  # seconds that a run which has to stop still waits for a batch or a worker


class BatchTimeout(DataError):
    """The run has to stop, and the batch that it waits for has not come."""


@dataclasses.dataclass(frozen=True)
class ChunkSource:
    """What one process reads of the batches, in chunks of a few images: a source for Grain.

    Attributes:
      examples: the split.
      indices: int32, the examples of it that are used.
      batch_size: of the global batch.
      rows: int32, rising, the rows of a global batch that this process fills.
      crop: makes uint8 [image_size, image_size, 3] from an encoded image and the size. A shuffled
        source also gives it the bit generator of this example in this epoch.
      image_size: pixels.
      seed: of order and crops. None: each example once, in the order of `indices`; all later rows
        are padding.
      skip: whether an image that cannot be read is replaced by the one after it.
      alternates: chunks say which examples are `memory.mirrored`.
      channels: 3 for colour, 1 for grey.
    """

    examples: Sequence[Example]
    indices: np.ndarray
    batch_size: int
    rows: np.ndarray
    crop: Callable[..., np.ndarray]
    image_size: int
    seed: int | None = None
    skip: bool = False
    alternates: bool = False
    channels: int = 3

    @property
    def chunk_size(self) -> int:
        """Images in a chunk: the largest number up to `CHUNK` that divides this process's rows."""
        return math.gcd(len(self.rows), CHUNK)

    @property
    def chunks_per_batch(self) -> int:
        """Chunks that make one batch."""
        return len(self.rows) // self.chunk_size

    def __len__(self):
        """Practically endless: if Grain read to the end, it would leave shared memory behind."""
        return sys.maxsize // 2

    def __getitem__(self, number):
        """The chunk of a number: image uint8, label int32, mask bool, each [chunk_size, ...].

        With `alternates`, also mirrored bool.
        """
        step, part = divmod(number, self.chunks_per_batch)
        epoch = 0
        if self.seed is not None:
            epoch, step = divmod(step, len(self.indices) // self.batch_size)
        rows = self.rows[part * self.chunk_size : (part + 1) * self.chunk_size]
        positions = step * self.batch_size + rows
        shape = (len(rows), self.image_size, self.image_size, self.channels)
        chunk = {
            "image": np.zeros(shape, np.uint8),
            "label": np.zeros(len(rows), np.int32),
            "mask": positions < len(self.indices),
        }
        if self.alternates:
            chunk["mirrored"] = np.zeros(len(rows), bool)
        for place, position in enumerate(positions[chunk["mask"]].tolist()):
            chunk["image"][place], chunk["label"][place], rank = self._example(epoch, position)
            if self.alternates:
                chunk["mirrored"][place] = _mirrored(self.seed, epoch, len(self.indices))[rank]
        return chunk

    def _example(self, epoch, position):
        """The image, the label and its rank in `indices` at a position of an epoch."""
        count, bits = len(self.indices), ()
        for following in range(count if self.skip else 1):
            rank = (position + following) % count
            if self.seed is not None:
                rank = _order(self.seed, epoch, count)[rank]
                # The counter differs from the permutation's, whose third word is zero. Each image
                # gets a new generator: the failed crop of another may have drawn from the old one.
                bits = (np.random.Philox(key=[self.seed, epoch], counter=[0, position, 1, 0]),)
            index = int(self.indices[rank])
            try:
                return *self._read(index, *bits), rank
            except ImageError as error:
                if not self.skip:
                    hint = "" if self.seed is None else ", or set data.corrupt_images = 'skip'"
                    raise DataError(f"{error}; replace or remove it{hint}") from error
                logging.warning("%s; the next one is trained on instead", error)
        raise DataError("data.corrupt_images = 'skip': none of the training images can be read")

    def _read(self, index, *bits):
        encoded, label, name = self.examples[index]
        try:
            pixels = self.crop(encoded, self.image_size, *bits)
            return images.in_channels(pixels, self.channels), label
        except Exception as error:  # decoders raise errors of many kinds for a damaged image
            raise ImageError(f"{name}: no image that can be read ({one_line(error)})") from error


_order = functools.lru_cache(maxsize=2)(permutation)
_mirrored = functools.lru_cache(maxsize=2)(mirrored)


def rows_of_process(sharded: Sharding, batch_size: int) -> np.ndarray:
    """The rows int32 of a global batch that lie on this process's devices, rising."""
    rows = np.arange(batch_size, dtype=np.int32)
    places = sharded.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[place] for place in places]))


def batches(
    source: ChunkSource,
    sharded: Sharding,
    workers: int,
    start: int = 0,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """The global batches from step `start` on; the next two are put on the devices meanwhile.

    Close the iterator: that ends its workers. They also end when this process does.

    Raises:
      BatchTimeout: `is_stopping()` is true, and no batch has come for `GRACE` seconds.
      DataError: an image cannot be read, or a worker has died.
    """
    chunks = _chunks(source, workers, start * source.chunks_per_batch)
    other_children, decoders = set(multiprocessing.active_children()), set()

    def read():
        try:
            parts = list(itertools.islice(chunks, source.chunks_per_batch))
            decoders.update(set(multiprocessing.active_children()) - other_children)
        except RuntimeError as error:  # a worker has ended
            dead = [f"{each.pid} (exit code {each.exitcode})" for each in decoders if each.exitcode]
            raise DataError(
                f"data.workers = {workers}: the worker process {', '.join(dead) or error} has "
                f"ended; where memory or /dev/shm is short, fewer workers may do"
            ) from error
        batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        return {
            key: jax.make_array_from_process_local_data(
                sharded, array, (source.batch_size, *array.shape[1:])
            )
            for key, array in batch.items()
        }

    # A separate thread reads ahead. It blocks signals, and the workers that it starts inherit this.
    # So no signal ends them: the run decides when it stops.
    multiprocessing.resource_tracker.ensure_running()  # first, since its start unblocks signals
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    block = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, signals)
    thread = concurrent.futures.ThreadPoolExecutor(1, initializer=block)
    ahead = collections.deque(thread.submit(read) for _ in range(AHEAD + 1))
    try:
        while True:
            stopping = is_stopping()
            if concurrent.futures.wait([ahead[0]], GRACE if stopping else 1).done:
                yield ahead.popleft().result()
                ahead.append(thread.submit(read))
            elif stopping:
                raise BatchTimeout(f"data.workers = {workers}: no batch comes any more")
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        under_way = [future for future in ahead if future.running()]
        if concurrent.futures.wait(under_way, GRACE).not_done:
            for process in decoders | set(multiprocessing.active_children()) - other_children:
                process.kill()
            interrupt.stuck += concurrent.futures.wait(under_way, GRACE).not_done
        chunks.close()


def _chunks(source, workers, first):
    """Grain's iterator over the chunks from number `first` on."""
    import grain

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; a notebook parses none
        flags.FLAGS.mark_as_parsed()
    # Two threads in each worker: one waits for a file while the other decodes.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    chunks = grain.MapDataset.source(source)[first:].to_iter_dataset(options)
    processes = grain.MultiprocessingOptions(num_workers=workers)
    return iter(chunks.mp_prefetch(processes, worker_init_fn=_start_worker))


def _start_worker(index, count):
    """Makes a worker end as soon as the run that started it has ended, for whatever reason."""
    parent = multiprocessing.parent_process().sentinel

    def watch():
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class StreamSet:
    """One split, streamed; it is used as `MemorySet` is.

    Args:
      source: what this process reads.
      sharded: sharding that divides the leading axis of a batch over the devices.
      workers: processes that decode; 0: none, this process decodes.
    """

    def __init__(self, source: ChunkSource, sharded: Sharding, workers: int):
        """Starts nothing."""
        self.size, self.batch_size = len(source.indices), source.batch_size
        self.steps_per_epoch = self.size // self.batch_size
        self._source, self._sharded, self._workers = source, sharded, workers
        self._iterator, self._next_step = None, -1
        self.is_stopping = lambda: False

    @property
    def labels(self) -> np.ndarray:
        """The labels of all examples of a folder, int32."""
        return self._source.examples.labels[self._source.indices]

    def _batches(self, start=0):
        return batches(
            self._source, self._sharded, self._workers, start, lambda: self.is_stopping()
        )

    def batch(self, step: int) -> Batch:
        """The training batch of a step; batches are read ahead where steps follow each other."""
        if step != self._next_step:
            self.close()
            self._iterator = self._batches(step)
        self._next_step = step + 1
        batch = next(self._iterator)
        del batch["mask"]
        return batch

    def evaluation(self) -> Iterator[Batch]:
        """Every example once, in order; the last batch is padded where `mask`, bool, is false."""
        steps = -(-self.size // self.batch_size)
        with contextlib.closing(self._batches()) as iterator:
            yield from itertools.islice(iterator, steps)

    def examples(self, places: list[int]) -> list[tuple[np.ndarray, int, str]]:
        """(image as it is evaluated, label, the file that it is from) of examples by place."""
        source, indices = self._source, self._source.indices[places]
        try:
            return [(*source._read(int(n)), source.examples[int(n)][2]) for n in indices]
        except ImageError as error:
            raise DataError(f"{error}; replace or remove it") from error

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator, self._next_step = None, -1
