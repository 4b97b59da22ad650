"""How much of a run's time was useful: goodput.json, which covers all starts, killed or not.

The seconds by kind add up to the time since the first start. No run depends on this file: if its
content is damaged, the clock starts at zero. Something else in its place, such as a folder, is
refused.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
from absl import logging
from etils import epath

from densejax.config import UserError
from densejax.runs import files

# What the program does or waits for, from its import to its end. In "step" it waits for devices.
WORK = ("start_up", "compile", "step", "input_wait", "evaluation", "save")
# "lost": work that a later start had to repeat, since no checkpoint held it. "down": the time from
# the last write of one start to the beginning of the next.
KINDS = (*WORK, "lost", "down")


class Goodput:
    """The clock of one start; it continues from what the starts before it wrote.

    Attributes:
      seconds: by kind, of all starts.
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
        """Reads `path`; UserError if it exists but cannot be read.

        Args:
          path: of the file.
          start_step: the step that this start resumes from.
          began: when this start began, in seconds of the monotonic clock.
          every: seconds between two writes; after a kill, the time since the last is "down".
          starts: how many starts the run has had, this one included.
          guard: called before every write; its errors, except OSError, end the run.
        """
        self._path, self._every, self._guard, self._starts = path, every, guard, starts
        self._kind, self._since, self._last_write = "start_up", began, time.monotonic()
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._at_checkpoints: dict[int, dict[str, float]] = {}  # `seconds` by step
        try:
            if (text := files.read_text(path)) is None:
                return
            before = files.parse_json(text)
            spent, checkpoints = before["seconds"], before["at_checkpoints"]
            reached = {int(step): seconds for step, seconds in checkpoints.items()}
            reached = {step: reached[step] for step in reached if step <= start_step}
            useful = reached[max(reached)] if reached else self.seconds
            now = time.time() - (time.monotonic() - began)
            lost = spent["lost"] + sum(spent[kind] - useful[kind] for kind in WORK)
            down = spent["down"] + max(now - before["time"], 0.0)
            self.seconds = {kind: useful[kind] for kind in WORK} | {"lost": lost, "down": down}
            self._at_checkpoints = reached
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError) and not isinstance(error.__cause__, UnicodeError):
                raise
            logging.warning("%s cannot be read (%s): the clock starts at zero.", path, error)

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time within its context as `kind`."""
        before = self._kind
        self.switch_to(kind)
        try:
            yield
        finally:
            self.switch_to(before)

    def switch_to(self, kind: str) -> None:
        """Counts the time from now on as `kind`."""
        now = time.monotonic()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def checkpoint_saved(self, step: int, steps: Iterable[int]) -> None:
        """Remembers that a later start from `step` loses none of the time so far.

        `steps`: those of the checkpoints that exist; other steps are forgotten.
        """
        self.switch_to(self._kind)
        self._at_checkpoints = {
            old: seconds for old, seconds in self._at_checkpoints.items() if old in set(steps)
        } | {step: dict(self.seconds)}

    def write(self, now: bool = True) -> None:
        """Writes the file on process 0: now, or only if `every` seconds have passed."""
        if jax.process_index() or not (now or time.monotonic() - self._last_write > self._every):
            return
        self.switch_to(self._kind)
        self._last_write = time.monotonic()
        content = {
            "starts": self._starts,
            "seconds": self.seconds,
            "share_of_steps": self.seconds["step"] / sum(self.seconds.values()),
            "time": time.time(),
            "at_checkpoints": self._at_checkpoints,
        }
        try:
            self._guard()
            files.write_json(self._path, content)
        except OSError as error:
            logging.warning("%s cannot be written: %s", self._path, error)
