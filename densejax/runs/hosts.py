"""Many processes in one run: how they join, compare what they know, stop and fail together.

Every process runs the same command. They exchange small messages through JAX's coordination
service, which lives in process 0. When one process dies, the others end within 15 seconds with one
line that says so; when one refuses to run, all end with its reason.
"""

import contextlib
import faulthandler
import hashlib
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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HEARTBEAT = 12  # seconds without a sign of life after which a process counts as dead
PATIENCE = 30.0  # seconds after which a process says for whom it waits
JOIN_TIMEOUT = 300  # seconds in which all processes of a job have to start
LEAVE_TIMEOUT = 5  # seconds that process 0 waits for the others, which cannot run without it
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
RESTART = (
    f"another process died, or one was suspended for {HEARTBEAT} seconds: look at the output of "
    "all, then start all of them again; the run goes on from its newest checkpoint"
)
LAST_LINE = (
    "densejax: this process was ended before its work was done. If nothing above says why, "
    + RESTART
)
# When another process has died, JAX ends this one from C++: it prints a stack, and no Python code
# runs any more. (The option `missed_heartbeat_callback` does not help: jaxlib fails to call it, and
# ends the process too.) So a small extra process reads everything that C++ prints, leaves out the
# stack and prints LAST_LINE.
STDERR_FILTER = r"""
import re, sys
jax_gives_up = False
for line in sys.stdin.buffer:
    if re.match(rb"[WEF]\d+ .*(coordination_service|preemption_sync|JAX distributed)", line):
        jax_gives_up = True
    is_last = line.startswith(b"densejax: ")
    if line != b"densejax: the end\n" and (is_last or not jax_gives_up):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    if is_last:
        sys.exit()
print(sys.argv[1], file=sys.stderr)
"""
_messages_sent = 0  # by `gather`


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Within its context this process takes part in its job; without a job it does nothing.

    A TPU pod and SLURM are detected; elsewhere all three arguments name the job. A process that
    fails ends at once, with the exit code of its UserError, and 1 for anything else.

    Args:
      coordinator: HOST:PORT of process 0, as every process reaches it.
      num_processes: of the job; 1 without the others means no job, even if one is detected.
      process_id: of this process, from 0.

    Raises:
      UserError: the arguments do not fit together, another process has the same number, or the job
        that was detected cannot be joined.
    """
    arguments = _arguments(coordinator, num_processes, process_id)
    if arguments is None:
        yield
        return
    own = _own_number(coordinator, process_id) if coordinator else contextlib.nullcontext()
    with own, _filtered_stderr():
        try:
            whom = "all processes of the job that was detected"
            if coordinator:
                whom = f"every process of --num_processes={num_processes} to reach {coordinator}"
            with _says_for_whom_it_waits(whom, JOIN_TIMEOUT):
                jax.distributed.initialize(
                    heartbeat_timeout_seconds=HEARTBEAT,
                    initialization_timeout=2 * JOIN_TIMEOUT,
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
            _fail(error)


@contextlib.contextmanager
def _own_number(address: str, process_id: int) -> Iterator[None]:
    # JAX crashes, or waits without a word, where the port or the number is taken.
    with socket.socket(socket.AF_UNIX) as number:
        try:
            if process_id == 0:
                socket.create_server(("", int(address.rpartition(":")[2]))).close()
            if sys.platform == "linux":  # an abstract name, which ends with the process
                # Such a name may have at most 108 bytes.
                name = hashlib.sha256(f"{address} {process_id}".encode()).hexdigest()
                number.bind(f"\0densejax {name}")
        except OSError as error:
            raise UserError(
                f"--coordinator={address} --process_id={process_id}: {error.strerror or error}; "
                f"give every process another number, and all the same free port"
            ) from error
        yield


@contextlib.contextmanager
def _filtered_stderr() -> Iterator[None]:
    # Python itself still prints directly, to a copy of the file descriptor.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # absl's handler prints every thread's stack
    command, before = [sys.executable, "-IS", "-c", STDERR_FILTER, LAST_LINE], sys.stderr
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        faulthandler.register(signal.SIGUSR1)  # prints all stacks, and the process goes on
        os.dup2(process.stdin.fileno(), 2)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            os.write(2, b"densejax: the end\n")
            os.dup2(sys.stderr.fileno(), 2)
            sys.stderr.close()
            sys.stderr = before


def _fail(error: BaseException) -> None:
    # An orderly end would wait for the others, which wait for this process: end at once.
    is_refusal, text = isinstance(error, UserError), " ".join(str(error).split())
    if re.match("[A-Z_]+: ", text) and not is_refusal:  # a status of JAX's runtime
        text = f"{text}; if that is no lack of memory, {RESTART}"
    elif not is_refusal:
        traceback.print_exc()
        text = f"process {global_state.process_id} has failed: look at its output"
    # An error with a cause may come from another process's death: the filter knows, so it prints.
    output = 2 if error.__cause__ is None else sys.stderr.fileno()
    os.write(output, f"densejax: {text}\n".encode())
    with contextlib.suppress(Exception):
        _send({"failed": text})
        global_state.client.wait_at_barrier("densejax: the end", LEAVE_TIMEOUT * 1000)
        time.sleep(0 if global_state.process_id else 1)
    sys.stdout.flush()
    os._exit(error.exit_code if is_refusal else 1)


def gather(value: Any) -> list[Any]:
    """The value of every process, in their order; all must call it, in the same order, and wait.

    Args:
      value: of this process; JSON.

    Raises:
      UserError: another process has failed, with its reason.
    """
    global _messages_sent
    if not jax.distributed.is_initialized():
        return [value]
    _send({"value": value})
    number, _messages_sent = _messages_sent, _messages_sent + 1
    values = []
    for process in range(global_state.num_processes):
        with _says_for_whom_it_waits(f"process {process}"):
            key = f"densejax/{number}/{process}"
            text = global_state.client.blocking_key_value_get(key, 10**9)  # ms: 11 days
        if "failed" in (message := json.loads(text)):
            raise UserError(message["failed"])
        values.append(message["value"])
    return values


def all_true(value: bool) -> bool:
    """Whether a value is true in every process; all must call it, as with `gather`."""
    return all(gather(bool(value)))


def _send(message: dict) -> None:
    key = f"densejax/{_messages_sent}/{global_state.process_id}"
    global_state.client.key_value_set(key, json.dumps(message))


def require_same(facts: Mapping[str, Any]) -> None:
    """UserError on every process if one has other facts than process 0; all must call it."""
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
def _says_for_whom_it_waits(whom: str, limit: float | None = None) -> Iterator[None]:
    # After `PATIENCE` seconds in its context; after `limit` seconds it ends the process.
    done = threading.Event()

    def watch():
        if not done.wait(PATIENCE):
            print(f"densejax: waiting for {whom}", file=sys.stderr, flush=True)
        if limit and not done.wait(limit - PATIENCE):
            os.write(2, f"densejax: waited {limit} s in vain for {whom}\n".encode())
            os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _arguments(coordinator, num_processes, process_id) -> dict | None:
    # For jax.distributed.initialize; None where this process is alone.
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
    # JAX sets TPU_ML_PLATFORM on a TPU VM when it is imported; a process may still use CPUs only.
    if "TPU_ML_PLATFORM" in os.environ and "tpu" in (jax.config.jax_platforms or ""):
        if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ):
            return {"cluster_detection_method": "gketpu"}
        if "TPU_SKIP_MDS_QUERY" not in os.environ:
            return {"cluster_detection_method": "gcetpu"}
    return None


class Stop:
    """Within its context, SIGTERM, SIGINT and SIGHUP stop every process after the same step.

    A second SIGTERM or SIGINT ends the process at once; with many processes, only a second SIGINT
    does. Python gives signals to the main thread only: in another thread nothing stops.

    Attributes:
      received: the signal that this process got; None before.
      signal: the signal that all stop for, from `after_step`; SIGTERM where another process got it.
    """

    def __init__(self):
        """No signal has arrived."""
        self.signal: signal.Signals | None = None
        self.received: signal.Signals | None = None
        self._steps, self._before = 0, {}

    def __enter__(self) -> "Stop":
        """Installs the handlers."""
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # JAX's own handler of SIGTERM tells the other processes.
            of_jax = number is signal.SIGTERM and jax.distributed.is_initialized()
            # A process under nohup still ignores SIGHUP.
            ignored = number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
            if not (of_jax or ignored):
                self._before[number] = signal.signal(number, self._receive)
        interrupt.handler_gets_next = signal.SIGINT in self._before
        return self

    def __exit__(self, *_) -> None:
        """Restores the handlers that were there."""
        interrupt.handler_gets_next = False
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after_step(self) -> bool:
        """Whether all stop after this step; every process calls it once a step. It never waits."""
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
