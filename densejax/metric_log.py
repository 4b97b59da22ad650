"""What a run writes and shows while it trains, on process 0 only."""

import contextlib
import json
import statistics
import sys
import tempfile
import time

import jax
import tqdm
from etils import epath

from densejax import files
from densejax.config import UserError
from densejax.formats import count, duration, percent


class MetricLog:
    """metrics.jsonl (deterministic), timings.jsonl (the clock, never cut), TensorBoard, progress.

    Local files are appended to. Object stores have no append: both files are written whole there,
    every `seconds`, at a pause, an evaluation and by close. A resume ends with the metrics.jsonl of
    an uninterrupted run, byte for byte, if a step was logged before the pause that saved it.
    """

    def __init__(self, workdir, total_steps, start_step, batch_size, epoch_steps, seconds=10.0):
        """`workdir`: an existing `epath.Path`; `seconds`: between writes, and plain lines."""
        import tensorboardX

        self.workdir, self.total_steps, self.start_step = workdir, total_steps, start_step
        self.batch_size, self.epoch_steps, self.seconds = batch_size, epoch_steps, seconds
        self.is_writer, self.rates, self.last_step = jax.process_index() == 0, [], start_step
        self.start = self.mark = self.shown = time.perf_counter()
        kept = start_step or -1  # no checkpoint lies behind a start at 0: its step 0 comes again
        self.lines = {"metrics": _read(workdir / "metrics.jsonl", kept)}
        self.lines["timings"] = _read(workdir / "timings.jsonl", float("inf"))
        self.appends = self.is_writer and "://" not in str(workdir)
        self.board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=kept + 1,
            filename_suffix=f".{start_step}",
            write_to_disk=self.is_writer,
        )
        on_screen = self.is_writer and sys.stderr.isatty()
        self.bar = tqdm.tqdm(None, "train", total_steps, initial=start_step, disable=not on_screen)
        self._rewrite()

    @property
    def images_per_second(self):
        """Median over the intervals after the first, which compiles; None where there is none."""
        return statistics.median(self.rates[1:]) if self.rates[1:] else None

    def train(self, step, values):
        """Logs scalars by name (train_loss, learning_rate, ...) after `step` steps."""
        text = self._record(step, values)  # waits for the device, so before the time is taken
        now = time.perf_counter()
        self.rates.append((step - self.last_step) * self.batch_size / (now - self.mark))
        self._append("timings", step, seconds=now - self.start, images_per_second=self.rates[-1])
        text += f", {count(round(self.rates[-1]))} images/s"
        self.last_step, self.mark = step, now
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if now - self.shown >= self.seconds or step >= self.total_steps:
            self.shown = now
            self._flush()
            left = (now - self.start) / (step - self.start_step) * (self.total_steps - step)
            if self.bar.disable:
                text += f", {duration(left)} left"
                self._say(f"step {count(step)}/{count(self.total_steps)}, {text}")

    def evaluation(self, step, split, values):
        """Logs the means of an evaluation after `step` steps as <split>_<name>."""
        text = self._record(step, {f"{split}_{name}": value for name, value in values.items()})
        self._flush()
        self._say(f"step {count(step)}, {split} {text}")

    @contextlib.contextmanager
    def pause(self):
        """Writes what was logged, then leaves an evaluation or a save out of images/s."""
        begin = time.perf_counter()
        self._flush()
        yield
        self.mark += time.perf_counter() - begin

    def close(self):
        """Writes what was logged; ends the progress bar and the TensorBoard file."""
        self._flush()
        self.bar.close()
        self.board.close()

    def _record(self, step, values):
        fetched = jax.device_get(values)  # sorts the names
        values = {name: float(fetched[name]) for name in values}
        self._append("metrics", step, epoch=step / self.epoch_steps, **values)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        # The screen has room for the two that are watched; the files have all.
        watched = {name.rpartition("_")[2]: name for name in values if "top5" not in name}
        shown = {"loss": "{:.4g}".format, "accuracy": percent}
        return ", ".join(
            f"{word} {form(values[watched[word]])}"
            for word, form in shown.items()
            if word in watched
        )

    def _append(self, file, step, **values):
        # Floats are written by repr, so that equal runs give equal bytes.
        self.lines[file].append(json.dumps({"step": step, **values}) + "\n")
        if self.appends:
            with (self.workdir / f"{file}.jsonl").open("a") as stream:
                stream.write(self.lines[file][-1])

    def _say(self, text):
        if self.is_writer:
            tqdm.tqdm.write(text, file=sys.stderr)

    def _flush(self):
        if not self.appends:
            self._rewrite()
        self.board.flush()

    def _rewrite(self):
        for name, lines in self.lines.items() if self.is_writer else ():
            files.write(self.workdir / f"{name}.jsonl", "".join(lines))


@contextlib.contextmanager
def trace(directory):
    """Profiles what runs in its context into a directory, an `epath.Path`, as xprof reads it."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        for file in epath.Path(folder).glob("**/*.*"):  # the profiler knows no object stores
            target = directory / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.copy(target, overwrite=True)


def _read(path, last_step):
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        return [
            line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= last_step
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a line that is not a record ({error}): delete it") from error
