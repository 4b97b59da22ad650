"""Many hosts: which processes take part, how they stop together, and what a dead one leaves behind.

Every process runs the same command. JAX's coordination service, in process 0, ends all of them when
one has not been heard of for `HEARTBEAT` seconds; starting them again resumes the run.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from densejax.config import UserError

STOPS = (signal.SIGTERM, signal.SIGINT)
HEARTBEAT = 12  # seconds without a sign of life after which a process counts as dead
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
LAST_WORDS = (
    "densejax: this process was ended before its work was done. If nothing above says why, another "
    "process died: look at its output, then start all of them again; the run goes on from its "
    "newest checkpoint"
)


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Joins the other processes of a job for the time of a run; alone, it does nothing.

    A TPU pod and SLURM are detected; elsewhere all three arguments name the job. A process that
    fails ends at once, with exit code 2 for a UserError and 1 for anything else.

    Args:
      coordinator: HOST:PORT of process 0, as every process reaches it.
      num_processes: 1 alone: take part in no job, whatever is detected.
      process_id: of this process, from 0.

    Raises:
      UserError: arguments that do not go together; no job where one was to be detected.
    """
    arguments = _arguments(coordinator, num_processes, process_id)
    if arguments is None:
        yield
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **arguments)
    except ValueError as error:
        raise UserError(
            f"no job of many processes could be joined ({error}); name it with --coordinator, "
            f"--num_processes and --process_id, or run alone with --num_processes=1"
        ) from error
    # When JAX gives up, no Python code runs any more: a shell has the last word.
    reporter = subprocess.Popen(
        ["sh", "-c", 'read done || echo "$0" >&2', LAST_WORDS],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
        multihost_utils.sync_global_devices("the end")
        jax.distributed.shutdown()
        reporter.communicate(b"done\n")
    except BaseException as error:
        # An orderly end would wait for the others, and they wait for this process.
        if refused := isinstance(error, UserError):
            if error.__cause__ is None:  # or else it may come of another process's death
                reporter.communicate(b"done\n")
            print(f"densejax: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if refused else 1)


def _arguments(coordinator, num_processes, process_id) -> dict | None:
    # What jax.distributed.initialize needs; None: this process is alone.
    named = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in named.items() if value is None]
    if num_processes == 1 and len(missing) == 2:
        return None
    if len(missing) == 3:
        return _detected()
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing; give --coordinator=HOST:PORT, --num_processes and "
            f"--process_id together, or none of them on a TPU pod, under SLURM or alone"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT, such as 10.0.0.1:9876")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: give 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: give 0 to {num_processes - 1}, each once")
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }


def _detected() -> dict | None:
    if all(name in os.environ for name in SLURM) and os.environ["SLURM_NTASKS"] != "1":
        return {"cluster_detection_method": "slurm"}
    # JAX marks a TPU VM when it is imported; what else runs there may be told to stay off the TPU.
    if "TPU_ML_PLATFORM" in os.environ and "tpu" in (jax.config.jax_platforms or ""):
        if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ):
            return {"cluster_detection_method": "gketpu"}
        if "TPU_SKIP_MDS_QUERY" not in os.environ:
            return {"cluster_detection_method": "gcetpu"}
    return None


class Stop:
    """Within its context, SIGTERM and SIGINT stop every process after the same step.

    A second signal ends the process at once; of many processes, a second SIGINT alone does.

    Attributes:
      signal: what has stopped this process: SIGTERM where another one was sent it; None before.
    """

    def __init__(self):
        """Nothing has arrived."""
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._steps = 0

    def __enter__(self) -> "Stop":
        """Takes the signals."""
        # Of many processes, JAX's own handler of SIGTERM tells the others.
        numbers = [signal.SIGINT] if jax.distributed.is_initialized() else [*STOPS]
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after_step(self) -> bool:
        """Whether all stop after the step under way; call it once in each. It waits for nobody."""
        self._steps += 1
        alone = not jax.distributed.is_initialized()
        if (self._received and alone) or multihost_utils.reached_preemption_sync_point(self._steps):
            self.signal = self._received or signal.SIGTERM
        return self.signal is not None

    def _receive(self, number, frame):
        if self._received:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
