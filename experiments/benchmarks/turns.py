"""What is common to all implementations that are timed: each is a process that waits its turn.

The parent starts one process after the other and asks them for a few steps each, round after
round: whatever slows the machine down slows all of them, and only one computes at any time.
Messages are lines of JSON. Imports nothing but the standard library: the peers' processes may run
under an interpreter that has no JAX.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Unavailable(Exception):
    """An implementation that cannot be measured here, and why."""


class Process:
    """A child in a process of its own; `facts` is what it said about itself when it was ready."""

    def __init__(self, command: Sequence[str], spec: Mapping[str, Any]) -> None:
        """Starts it and waits until it is ready.

        Raises:
          Unavailable: it says that it cannot be measured, or it died.
        """
        environment = os.environ | {
            "KERAS_BACKEND": "jax",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share an accelerator
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # its compile time is measured
        environment.pop("OMP_WAIT_POLICY", None)  # "active" spins for ever, "passive" slows torch
        self._process = subprocess.Popen(
            [*command, json.dumps(spec)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise Unavailable(f"its process ended with code {self._process.returncode}")
        try:
            answer = dict(json.loads(line))
        except (ValueError, TypeError):
            self.close()
            raise Unavailable(f"it is no process of a benchmark: it said {line[:60]!r}") from None
        if "unavailable" in answer:
            self.close()
            raise Unavailable(answer["unavailable"])
        return answer

    def ask(self, steps: int) -> dict[str, Any]:
        """Takes that many steps and says how they went."""
        time.sleep(0.1)  # the threads of the one before it spin for some milliseconds
        print(json.dumps({"steps": steps}), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def alternate(
    children: Mapping[str, Process], rounds: int, steps: int
) -> dict[str, list[dict[str, Any]]]:
    """Lets children take turns: each takes `steps` steps, then the next, `rounds` times over.

    Before these steps, each takes one that is not timed.
    """
    answers = {name: [] for name in children}
    for _ in range(rounds):
        for name, child in children.items():
            answers[name].append(child.ask(steps))
    return answers


def peak_memory() -> int | None:
    """Bytes that this process has had in memory at most; None where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


def serve(build: Callable[[Mapping[str, Any]], tuple[dict[str, Any], Callable[[], Any]]]) -> None:
    """The other end of `Process`: builds what the last argument says, then answers every line.

    Args:
      build: from the specification to facts, and a function that starts one step and returns a
        function that waits for it, as a training loop waits rarely. It has taken its first steps
        already.
    """
    # Nobody but us writes to the parent: compilers and progress bars go to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        facts, take_step = build(json.loads(sys.argv[-1]))
    except Unavailable as error:
        print(json.dumps({"unavailable": str(error)}), file=channel)
        return
    except ModuleNotFoundError as error:
        print(json.dumps({"unavailable": f"{error.name} is not installed"}), file=channel)
        return
    for _ in range(2):  # the steps after the first may still fill caches
        take_step()()
    print(json.dumps(facts), file=channel)
    waiting, busy = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = {
            "idle_seconds": time.perf_counter() - waiting,
            "idle_processor_seconds": time.process_time() - busy,
        }
        take_step()()  # not timed: the others have filled the caches, and a loop does not wait
        start = time.perf_counter()
        steps = json.loads(line)["steps"]
        for _ in range(steps):
            wait = take_step()
        wait()
        waiting, busy = time.perf_counter(), time.process_time()
        answer = {"seconds_per_step": (waiting - start) / steps, "peak_rss_bytes": peak_memory()}
        print(json.dumps(answer | idle), file=channel)
