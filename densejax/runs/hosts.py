"""Many hosts: which processes take part, what they agree on, how they stop, and how they end.

Every process runs the same command. What needs no array they say through JAX's coordination
service, in process 0, which also ends all of them when one has not been heard of for `HEARTBEAT`
seconds; starting them again resumes the run.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from densejax.config import UserError
from densejax.runs import interrupt

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEARTBEAT = 12  # seconds without a sign of life after which a process counts as dead
PATIENCE = 30.0  # seconds after which a process says for whom it waits
JOIN = 300  # seconds that the processes of a job have to come together
FAREWELL = 5  # seconds that process 0 stays for the others, who cannot live without it
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
AGAIN = (
    f"another process died, or one was suspended for {HEARTBEAT} seconds: look at the output of "
    "all, then start all of them again; the run goes on from its newest checkpoint"
)
LAST_WORDS = (
    "densejax: this process was ended before its work was done. If nothing above says why, " + AGAIN
)
# When JAX gives up no Python code runs any more, and it prints a stack: another process, which gets
# all that is printed from outside Python, passes on the rest and has the last word.
REPORTER = r"""
import re, sys
gives_up = False
for line in sys.stdin.buffer:
    if re.match(rb"[WEF]\d+ .*(coordination_service|preemption_sync|JAX distributed)", line):
        gives_up = True
    ends = line.startswith(b"densejax: ")
    if line != b"densejax: the end\n" and (ends or not gives_up):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    if ends:
        sys.exit()
print(sys.argv[1], file=sys.stderr)
"""
_turn = 0  # of `gather`


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
      UserError: arguments that do not go together or that another process has; no job where one
        was to be detected.
    """
    arguments = _arguments(coordinator, num_processes, process_id)
    if arguments is None:
        yield
        return
    seat = _seat(coordinator, process_id) if coordinator else contextlib.nullcontext()
    with seat, _reported():
        try:
            whom = f"every process of --num_processes={num_processes} to reach {coordinator}"
            with _patience(whom, JOIN):
                jax.distributed.initialize(
                    heartbeat_timeout_seconds=HEARTBEAT,
                    initialization_timeout=2 * JOIN,
                    **arguments,
                )
        except ValueError as error:
            raise UserError(
                f"no job of many processes could be joined ({error}); name it with --coordinator, "
                f"--num_processes and --process_id, or run alone with --num_processes=1"
            ) from error
        try:
            require_same({"--num_processes": num_processes})
            yield
            gather("the end")
            jax.distributed.shutdown()
        except BaseException as error:
            _leave(error)


@contextlib.contextmanager
def _seat(address: str, process_id: int) -> Iterator[None]:
    # JAX crashes, or waits without a word, where the port or the number is taken.
    with socket.socket(socket.AF_UNIX) as seat:
        try:
            if process_id == 0:
                socket.create_server(("", int(address.rpartition(":")[2]))).close()
            if sys.platform == "linux":  # a name that ends with the process
                seat.bind(f"\0densejax {address} {process_id}")
        except OSError as error:
            raise UserError(
                f"--coordinator={address} --process_id={process_id}: {os.strerror(error.errno)}; "
                f"give every process another number, and all the same free port"
            ) from error
        yield


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # absl's prints the stack of every thread
    command, before = [sys.executable, "-IS", "-c", REPORTER, LAST_WORDS], sys.stderr
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as reporter:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        faulthandler.register(signal.SIGUSR1)  # and the process goes on
        os.dup2(reporter.stdin.fileno(), 2)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            os.write(2, b"densejax: the end\n")
            os.dup2(sys.stderr.fileno(), 2)
            sys.stderr.close()
            sys.stderr = before


def _leave(error: BaseException) -> None:
    # An orderly end would wait for the others, and they wait for this process.
    refused, text = isinstance(error, UserError), " ".join(str(error).split())
    if re.match("[A-Z_]+: ", text) and not refused:  # a status of the runtime's, of many classes
        text = f"{text}; if that is no lack of memory, {AGAIN}"
    elif not refused:
        traceback.print_exc()
        text = f"process {global_state.process_id} has failed: look at its output"
    # What has a cause may come of another process's death: then the reporter has the last word.
    os.write(2 if error.__cause__ is None else sys.stderr.fileno(), f"densejax: {text}\n".encode())
    with contextlib.suppress(Exception):
        _say({"refused": text})
        global_state.client.wait_at_barrier("densejax: the end", FAREWELL * 1000)
        time.sleep(0 if global_state.process_id else 1)
    sys.stdout.flush()
    os._exit(2 if refused else 1)


def gather(value: Any) -> list[Any]:
    """What every process says, by process; all call it in the same order, and wait for each other.

    Args:
      value: JSON.

    Raises:
      UserError: another process has ended, with its reason.
    """
    global _turn
    if not jax.distributed.is_initialized():
        return [value]
    _say({"said": value})
    _turn, turn, messages = _turn + 1, _turn, []
    for process in range(global_state.num_processes):
        with _patience(f"process {process}"):
            key = f"densejax/{turn}/{process}"
            text = global_state.client.blocking_key_value_get(key, 10**9)  # ms: 11 days
        if "refused" in (message := json.loads(text)):
            raise UserError(message["refused"])
        messages.append(message["said"])
    return messages


def _say(message: dict) -> None:
    key = f"densejax/{_turn}/{global_state.process_id}"
    global_state.client.key_value_set(key, json.dumps(message))


def require_same(facts: Mapping[str, Any]) -> None:
    """Raises UserError, on every process, where one has other facts than process 0; all call it."""
    first, *others = gather({key: json.dumps(value) for key, value in facts.items()})
    differences = [
        f"{key} is {first.get(key, 'absent')} in process 0 and {other.get(key, 'absent')} in "
        f"process {process}"
        for process, other in enumerate(others, 1)
        for key in sorted(first | other)
        if first.get(key) != other.get(key)
    ]
    if differences:
        raise UserError(
            f"{'; '.join(differences)}; start all processes with the same command, code and data"
        )


@contextlib.contextmanager
def _patience(whom: str, limit: float | None = None) -> Iterator[None]:
    # Says for whom the body waits when that takes long; ends the process where it takes too long.
    done = threading.Event()

    def watch():
        if not done.wait(PATIENCE):
            print(f"densejax: waiting for {whom}", file=sys.stderr, flush=True)
        if limit and not done.wait(limit - PATIENCE):
            os.write(2, f"densejax: waited {limit} s for {whom}: in vain\n".encode())
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


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
    """Within its context, SIGTERM, SIGINT and SIGHUP stop every process after the same step.

    A second SIGTERM or SIGINT ends the process at once; of many processes, a second SIGINT alone
    does. Only the main thread is sent signals: in another one nothing stops.

    Attributes:
      signal: what has stopped this process: SIGTERM where another one was sent it; None before.
    """

    def __init__(self):
        """Nothing has arrived."""
        self.signal: signal.Signals | None = None
        self.received: signal.Signals | None = None
        self._steps, self._before = 0, {}

    def __enter__(self) -> "Stop":
        """Takes the signals."""
        for number in STOPS if threading.current_thread() is threading.main_thread() else ():
            # Of many processes, JAX's own handler of SIGTERM tells the others.
            of_jax = number is signal.SIGTERM and jax.distributed.is_initialized()
            # What nohup has made the process ignore stays ignored.
            ignored = number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
            if not (of_jax or ignored):
                self._before[number] = signal.signal(number, self._receive)
        interrupt.spared = signal.SIGINT in self._before
        return self

    def __exit__(self, *_) -> None:
        """Gives them back."""
        interrupt.spared = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after_step(self) -> bool:
        """Whether all stop after the step under way; call it once in each. It waits for nobody."""
        self._steps += 1
        alone = not jax.distributed.is_initialized()
        if (self.received and alone) or multihost_utils.reached_preemption_sync_point(self._steps):
            self.signal = self.received or signal.SIGTERM
        return self.signal is not None

    def _receive(self, number, frame):
        if self.received and number != signal.SIGHUP:  # a closed terminal may send two
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
