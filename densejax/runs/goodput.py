"""Where the time of a run goes: of all its starts, killed or not, in one small JSON file."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from absl import logging
from etils import epath

from densejax.runs import files

# What the program that drives the devices does or waits for, from its import to its end: it waits
# for the devices in "step". "lost": steps that a kill or a fall-back made a later start take again;
# "down": between a start's last sign of life and the next start.
KINDS = ("start_up", "compile", "step", "input_wait", "evaluation", "save", "lost", "down")


class Goodput:
    """The clock of one start, which goes on from what the starts before it wrote.

    Attributes:
      seconds: by kind, of all starts; they add up to the time since the first.
    """

    def __init__(
        self,
        path: epath.Path,
        start_step: int,
        began: float,
        every: float = 10.0,
        starts: int = 1,
        guard: Callable[[], None] = lambda: None,
    ):
        """Reads `path`; UserError for what is there and is no file of text.

        Args:
          path: of the file.
          start_step: that this start goes on from.
          began: when it began, in seconds of the monotonic clock.
          every: seconds between two writes, which tell a later start what was lost.
          starts: of the run up to this one, killed before they wrote or not.
          guard: called before every write; what it raises but OSError ends the run.
        """
        self._path, self._every, self._kind, self._guard = path, every, "start_up", guard
        self._since, self._written = began, time.monotonic()
        self.seconds, self._starts, self._marks = dict.fromkeys(KINDS, 0.0), starts, {}
        if (text := files.read_text(path)) is None:
            return
        try:
            before = files.parse_json(text)
            marks = {int(step): mark for step, mark in before["at_checkpoints"].items()}
            self._marks = {step: mark for step, mark in marks.items() if step <= start_step}
            kept = self._marks[max(self._marks)] if self._marks else dict.fromkeys(KINDS, 0.0)
            now = time.time() - (time.monotonic() - began)
            self.seconds |= {kind: kept[kind] for kind in KINDS[:-2]}
            self.seconds["lost"] = sum(before["seconds"][kind] for kind in KINDS[:-1])
            self.seconds["lost"] -= sum(kept[kind] for kind in KINDS[:-2])
            self.seconds["down"] = before["seconds"]["down"] + max(now - before["time"], 0.0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logging.warning("%s cannot be read (%s): the clock starts anew.", path, error)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """What runs in its context is of a kind."""
        before = self.switch_to(kind)
        try:
            yield
        finally:
            self.switch_to(before)

    def switch_to(self, kind: str) -> str:
        """What follows is of a kind, until the next call; returns the kind up to now."""
        now = time.monotonic()
        self.seconds[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        return before

    def checkpoint_saved(self, step: int, kept: Iterable[int]) -> None:
        """What was spent so far is not lost to a start from `step`; `kept`: the checkpoints."""
        self.switch_to(self._kind)
        self._marks = {old: mark for old, mark in self._marks.items() if old in set(kept)}
        self._marks[step] = dict(self.seconds)

    def write(self, now: bool = True) -> None:
        """Writes the file: now, or if the last time is long ago; process 0 alone does."""
        if not (now or time.monotonic() - self._written > self._every) or jax.process_index():
            return
        self.switch_to(self._kind)
        self._written = time.monotonic()
        total = sum(self.seconds.values())
        content = {
            "starts": self._starts,
            "seconds": self.seconds,
            "share_of_steps": self.seconds["step"] / total,
            "time": time.time(),
            "at_checkpoints": self._marks,
        }
        try:
            self._guard()
            files.write(self._path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logging.warning("%s cannot be written: %s", self._path, error)
