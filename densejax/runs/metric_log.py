"""The records of a run: what process 0 logs to disk and shows on the screen.

metrics.jsonl holds deterministic values only: a resumed run ends with the same bytes as one that
was never interrupted. timings.jsonl holds what depends on the clock, and no complete line of it is
ever removed. What a full disk refuses stays in memory until there is room.
"""

import contextlib
import hashlib
import json
import math
import pathlib
import socket
import statistics
import struct
import tempfile
import threading
import time

import jax
from absl import logging
from etils import epath

from densejax.config import UserError, flatten
from densejax.runs import files, screen
from densejax.runs.formats import clock, count, percent


class MetricLog:
    """metrics.jsonl, timings.jsonl, TensorBoard files and the progress on the screen.

    Attributes:
      problem: why a part of the log is not on disk; "": all of it is.
    """

    def __init__(
        self,
        workdir,
        total_steps,
        start_step,
        batch_size,
        epoch_steps,
        seconds=10.0,
        evaluates_first=False,
        saved=None,
        guard=lambda: None,
    ):
        """Removes the records after `start_step`, which will be written again.

        Args:
          workdir: the run directory, an `epath.Path`.
          total_steps: of the whole run.
          start_step: that this start resumes from.
          batch_size: images of a step.
          epoch_steps: steps of an epoch.
          seconds: between two lines on the screen, and two writes to an object store.
          evaluates_first: whether the evaluation of `start_step` will be written again as well.
          saved: the `digest` in the checkpoint of `start_step`; None or empty: unknown.
          guard: called before every write; its errors, except OSError, end the run.

        Raises:
          UserError: a file is damaged, is no file, or cannot be written.
        """
        self.workdir, self.total_steps, self.start_step = workdir, total_steps, start_step
        self.batch_size, self.epoch_steps, self.seconds = batch_size, epoch_steps, seconds
        self.is_writer, self.rates, self.last_step = jax.process_index() == 0, [], start_step
        self.start = self.last_time = self.last_shown = self.last_drawn = time.perf_counter()
        self.guard, self.problem = guard, ""
        if self.is_writer:
            files.remove_leftovers(workdir)
            files.remove_leftovers(workdir / "tensorboard")
            if start_step and files.read_text(workdir / "metrics.jsonl") is None:
                logging.warning(
                    "%s/metrics.jsonl is gone: the records up to step %d are lost, a new "
                    "file begins after that step.", workdir, start_step)  # fmt: skip
        last_kept = start_step or -1  # a start at 0 has no checkpoint: the record of step 0 is new
        lines = [
            line
            for line, record in self._read("metrics.jsonl", saved if start_step else None)
            if record["step"] < last_kept
            or (record["step"] == last_kept and ("learning_rate" in record or not evaluates_first))
        ]
        self.metrics = files.GrowingFile(workdir / "metrics.jsonl", "".join(lines))
        lines = [line for line, _ in self._read("timings.jsonl")]
        self.timings = files.GrowingFile(workdir / "timings.jsonl", "".join(lines))
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{start_step}"
        self.tensorboard = files.GrowingFile(workdir / "tensorboard" / name)
        self._event(file_version="brain.Event:2")
        # TensorBoard drops what an earlier start wrote from this step on.
        self._event(step=last_kept + 1, session_log={"status": "START"})
        self.shown = []  # the latest loss, accuracy and images a second, as the screen has them
        self.first_step, self.first_time, self.has_paused = start_step, self.start, False
        self.on_screen, self.compiled = self.is_writer and screen.is_terminal(), threading.Event()
        self.write()
        self._require_written()
        self.ticking = threading.Thread(target=self._say_compiling, daemon=True)
        self.ticking.start()

    @property
    def digest(self):
        """Length and SHA-256 of metrics.jsonl once `write` has succeeded."""
        return _digest(self.metrics.content)

    @property
    def images_per_second(self):
        """Median over the intervals after the first step, which compiles; None without any."""
        return statistics.median(self.rates) if self.rates else None

    def describe(self, config, images):
        """Gives TensorBoard the configuration and images uint8 [number, height, width, channel]."""
        from tensorboardX import summary

        flat = flatten(config).items()
        flat = {key: value if isinstance(value, int | float) else str(value) for key, value in flat}
        begin = summary.hparams(flat, ["train/loss", f"{config.evaluate.split}/accuracy"])[:2]
        shown = images[..., : 3 if images.shape[-1] >= 3 else 1]
        for found in (*begin, summary.image("train/images", shown, dataformats="NHWC")):
            self._event(step=1, summary=found)

    def train(self, step, values):
        """Logs scalars by name (train_loss, learning_rate, ...) after `step` steps."""
        shown = self._record(step, values)  # first, as it waits for the device: this time counts
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch_size / (now - self.last_time)
        if self.compiled.is_set():
            self.rates.append(rate)
        timing = {"seconds": now - self.start, "images_per_second": rate}
        self.timings.add(_line(step, timing))
        self._scalar(step, "speed/images_per_second", rate)
        self.shown = [*shown, f"{count(round(rate))} images/s"]
        self.last_step, self.last_time = step, now
        is_time = now - self.last_shown >= self.seconds or step >= self.total_steps
        if is_time or "://" not in str(self.workdir):
            self.write()
        if is_time:
            self.last_shown = now
            if not self.on_screen or step >= self.total_steps:
                self._say(", ".join(self._progress(step, now)))

    def step(self, step):
        """Shows how far the run is; what comes before the first step is compilation."""
        now = time.perf_counter()
        if not self.compiled.is_set():
            self._end_compiling()
            self.first_step, self.first_time = self.last_step, self.last_time = step, now
        elif self.on_screen and now - self.last_drawn > 0.1:
            self.last_drawn = now
            screen.show(*self._progress(step, now))

    def evaluation(self, step, split, values):
        """Logs the mean values of an evaluation after `step` steps as <split>_<name>."""
        shown = self._record(step, {f"{split}_{name}": value for name, value in values.items()})
        self.write()
        self._say(f"step {count(step)}, {split} {', '.join(shown)}")

    @contextlib.contextmanager
    def pause(self):
        """Writes what was logged; the time within the context does not count in images/s."""
        begin = time.perf_counter()
        if self.on_screen and self.compiled.is_set():
            screen.show("evaluating, saving")
        self.write()
        yield
        seconds = time.perf_counter() - begin
        self.last_time += seconds
        self.first_time += 0 if self.has_paused else seconds  # the first compiles the evaluation
        self.has_paused = True

    def write(self):
        """Brings the files up to date; reports once if the disk refuses, and tries again later."""
        if not self.is_writer:
            return
        before, self.problem = self.problem, ""
        try:
            self.guard()
            (self.workdir / "tensorboard").mkdir(exist_ok=True)
            for file in (self.metrics, self.timings, self.tensorboard):
                file.write()
        except OSError as error:
            self.problem = f"the log cannot be written ({error})"
        if self.problem and not before:
            logging.error("%s: %s; it is kept in memory.", self.workdir, self.problem)
        if before and not self.problem:
            logging.warning("%s: the log is written again, nothing is missing.", self.workdir)

    def clear(self):
        """Removes the progress line from the screen, to make room for a message."""
        self._end_compiling()
        if self.on_screen:
            screen.show()

    def close(self):
        """Writes what was logged and clears the screen; UserError if it cannot be written."""
        self.clear()
        self.write()
        self._require_written()

    def _require_written(self):
        if self.problem:
            raise UserError(
                f"workdir={self.workdir}: {self.problem}; make room, or move away what is in its "
                f"place, and start again"
            )

    def _read(self, name, saved=None):
        # (line, record) of complete lines: a kill may have cut off the last one.
        path = self.workdir / name
        if not self.is_writer or (text := files.read_text(path)) is None:
            return []
        if saved and _digest(text.encode()[: saved["bytes"]]) != saved:
            raise UserError(
                f"{path} is damaged: its first {saved['bytes']:,} bytes are not those that the "
                f"checkpoint of step {self.start_step} was saved with; put a copy back, or delete "
                f"it to go on without the records up to that step"
            )
        lines = text.splitlines(keepends=True)
        try:
            records = [(line, files.parse_json(line)) for line in lines if line[-1] == "\n"]
            return [(line, record) for line, record in records if record["step"] >= 0]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} has a line that is not a record ({error}): put a copy back or delete it"
            ) from error

    def _record(self, step, values):
        fetched = jax.device_get(values)  # sorts the names
        values = {name: float(fetched[name]) for name in values}
        self.metrics.add(_line(step, {"epoch": step / self.epoch_steps, **values}))
        for name, value in values.items():
            split, _, rest = name.partition("_")
            is_split = split in ("train", "validation", "test")
            self._scalar(step, f"{split}/{rest}" if is_split else f"train/{name}", value)
        shown = []  # on the screen; the files have all
        for name, value in values.items():
            if name.endswith("_loss"):
                shown.append(f"loss {value:.4g}")
            elif name.endswith("_accuracy") and "top5" not in name:
                shown.append(f"accuracy {percent(value)}")
        return shown

    def _scalar(self, step, tag, value):
        self._event(step=step, summary={"value": [{"tag": tag, "simple_value": value}]})

    def _event(self, **fields):
        from tensorboardX import record_writer  # imported here: it takes a quarter of a second
        from tensorboardX.proto import event_pb2

        # TFRecord: length, its checksum, payload, its checksum.
        payload = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("Q", len(payload))
        for part in (length, payload):
            self.tensorboard.add(part + struct.pack("I", record_writer.masked_crc32c(part)))

    def _say(self, text):
        if self.is_writer:
            screen.say(text)

    def _say_compiling(self):
        while self.on_screen and not self.compiled.is_set():
            screen.show(f"compiling {clock(time.perf_counter() - self.start)}")
            self.compiled.wait(1.0)

    def _end_compiling(self):
        self.compiled.set()
        self.ticking.join()

    def _progress(self, step, now):
        epoch, epochs = (math.ceil(n / self.epoch_steps) for n in (step, self.total_steps))
        parts = [f"step {count(step)}", f"epoch {epoch}/{epochs}", *self.shown]
        done, left = step - self.first_step, self.total_steps - step
        if done and left:
            left *= (now - self.first_time) / done
            parts.append(f"{clock(left)} left")
        return parts


@contextlib.contextmanager
def trace(directory, guard):
    """Writes a profile of what runs in its context into an `epath.Path`, for xprof.

    `guard` is called before every write. If the disk refuses, this is logged and the run goes on.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        try:
            for file in pathlib.Path(folder).rglob("*.*"):  # the profiler knows no object stores
                target = directory / file.relative_to(folder)
                guard()
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(file).copy(target, overwrite=True)
        except OSError as error:
            logging.error("The profile cannot be written to %s: %s", directory, error)


def _digest(content):
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _line(step, values):
    # JSON writes floats by repr, so that equal runs give equal bytes.
    return json.dumps({"step": step, **values}) + "\n"
