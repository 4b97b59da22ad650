"""Processes that train together: how they start, stop at one step, go on elsewhere, and die."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from densejax.config import UserError
from densejax.runs import hosts
from densejax.training import loop
from tests import small

ROOT = pathlib.Path(hosts.__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
# A finished process leaves the others to their next step, so a run is long enough to be stopped.
LONG = {
    "train__epochs": 4000,
    "evaluate__every_epochs": 0,
    "checkpoint__every_epochs": 3,
    "log__every_steps": 1,
    "optimizer__drop_at": (),  # the rate is the same however long the run is
}


class Job:
    """The real command in several processes on this machine."""

    def __init__(self, card, path, processes, devices, *flags, epochs=(), **environment):
        """Starts them; `epochs` may differ."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.path, self.processes = path, []
        command = [sys.executable, "-m", "densejax.main", f"--config={card}", f"--workdir={path}"]
        command += [f"--coordinator=localhost:{port}", f"--num_processes={processes}", *flags]
        environment = small.ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment
        for number in range(processes):
            own = [f"--process_id={number}"]
            own += [f"--config.train.epochs={epochs[number]}"] if epochs else []
            process = subprocess.Popen(
                [*command, *own],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.processes.append(process)

    def wait_for_record(self, step):
        """Returns once metrics.jsonl has the record of a step."""
        while not any(line["step"] >= step for line in records(self.path)):
            alive = all(process.poll() is None for process in self.processes)
            assert alive, (self.wait(), self.outputs())
            time.sleep(0.01)

    def outputs(self):
        """What each has printed, last of all its reporter."""
        return self._outputs

    def wait(self):
        """The exit codes."""
        try:
            self._outputs = [each.communicate(timeout=600)[0] for each in self.processes]
            return [process.returncode for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def records(path):
    """The whole lines of metrics.jsonl."""
    file = path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(path):
    """The training losses by step."""
    return {line["step"]: line["train_loss"] for line in records(path) if "train_loss" in line}


# --- Which job a process belongs to.


def test_a_laptop_is_alone(monkeypatch):
    def refuse(**_):
        raise AssertionError

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with hosts.joined(), hosts.joined(num_processes=1):
        assert jax.process_count() == 1
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # a shell on a login node, no task of a step
    with hosts.joined():
        pass
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with hosts.joined(num_processes=1):
        pass
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with hosts.joined():
        pass


@pytest.mark.parametrize(
    ("environment", "platforms", "method"),
    [
        (SLURM, "cpu", "slurm"),
        ({"TPU_ML_PLATFORM": "JAX"}, "tpu,cpu", "gcetpu"),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", "gketpu"),
        ({"TPU_ML_PLATFORM": "JAX"}, "cpu", None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", None),
    ],
)
def test_a_cluster_is_detected(monkeypatch, environment, platforms, method):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM"):
        monkeypatch.delenv(name, raising=False)  # JAX and libtpu set some where no TPU is
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert hosts._arguments(None, None, None) == (
            method and {"cluster_detection_method": method}
        )
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id: missing"),
        ((None, 2, None), "--coordinator and --process_id: missing"),
        ((None, 1, 0), "--coordinator: missing"),
        (("localhost", 2, 0), "--coordinator=localhost: give HOST:PORT"),
        ((":80", 2, 0), "--coordinator=:80: give HOST:PORT"),
        (("a:port", 2, 0), "--coordinator=a:port: give HOST:PORT"),
        (("a:65536", 2, 0), "--coordinator=a:65536: give HOST:PORT"),
        (("a:80", 0, 0), "--num_processes=0: give 1 or more"),
        (("a:80", 2, 2), "--process_id=2: give 0 to 1"),
        (("a:80", 2, -1), "--process_id=-1: give 0 to 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_one_line(arguments, text):
    with pytest.raises(UserError) as caught, hosts.joined(*arguments):
        pass
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_a_job_that_cannot_be_joined_says_what_to_do(monkeypatch):
    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="coordinator_address .* --num_processes=1"), hosts.joined():
        pass


def test_processes_of_a_job_that_was_detected_wait_for_all_of_it(monkeypatch):
    names = []

    def says(whom, seconds):
        names.append(whom)
        raise ValueError("stop here")

    monkeypatch.setattr(hosts, "_says_for_whom_it_waits", says)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError), hosts.joined():
        pass
    assert names == ["all processes of the job that was detected"]


def test_a_number_or_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address} --process_id=0: Address already in use"):
            hosts._own_number(address, 0).__enter__()
        with hosts._own_number(address, 1):
            with pytest.raises(UserError, match="--process_id=1: .* give every process another"):
                hosts._own_number(address, 1).__enter__()
            with hosts._own_number(address, 2), hosts._own_number(f"{'long' * 40}:80", 1):
                pass
        with hosts._own_number(address, 1):
            pass


# --- What they say to each other.


def test_processes_that_differ_are_named_with_key_and_values(monkeypatch):
    others = [{"a": "1", "b": "[2]"}, {"a": "1", "b": "[3]"}, {"b": "[2]"}]
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, *others])
    with pytest.raises(UserError) as caught:
        hosts.require_same({"a": 1, "b": (2,)})
    assert str(caught.value).startswith(
        "b is [2] in process 0 and [3] in process 2; a is 1 in process 0 and absent in process 3; "
    )
    del others[1:]
    hosts.require_same({"a": 1, "b": (2,)})


def test_a_process_that_waits_says_for_whom(monkeypatch):
    said = threading.Event()

    class Output:
        def write(self, text):
            if text.strip():
                assert text == "densejax: waiting for process 1"
                said.set()

        def flush(self):
            pass

    monkeypatch.setattr(hosts, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Output())
    with hosts._says_for_whom_it_waits("process 1"):
        assert said.wait(600)


REPORTED = """
import os, sys
from densejax.runs import hosts

with hosts._filtered_stderr():
    os.write(2, b"of a library\\n")
    print("of Python", file=sys.stderr)
    if sys.argv[1] == "dies":
        os.write(2, b"E1125 22:05:04.0 7 coordination_service_agent.cc:289] Polled an error\\n")
        os.write(2, b"*** Check failure stack trace: ***\\n")
        os.abort()
print("and again", file=sys.stderr)
"""


@pytest.mark.parametrize("way", ["dies", "lives"])
def test_the_last_words_of_a_process_that_jax_ends_are_one_line(way):
    command = [sys.executable, "-X", "faulthandler", "-c", REPORTED, way]
    environment = os.environ | small.ENVIRONMENT
    result = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    last = {"dies": hosts.LAST_LINE, "lives": "and again"}[way]
    assert sorted(result.stderr.splitlines()) == sorted(["of a library", "of Python", last])
    assert result.returncode == {"dies": -signal.SIGABRT, "lives": 0}[way]


# --- Whole runs in several processes.


def test_two_processes_stop_at_one_step_and_one_goes_on(tmp_path):
    """2 processes of 2 devices, a signal to one, then 1 process of 4."""
    card, path = small.card(tmp_path, **LONG), tmp_path / "run"
    job = Job(card, path, 2, 2)
    job.wait_for_record(3)
    job.processes[1].send_signal(signal.SIGINT)
    assert job.wait() == [0, 130], job.outputs()
    step = max(int(checkpoint.name) for checkpoint in (path / "checkpoints").glob("[0-9]*"))
    assert f"SIGTERM: saved step {step};" in job.outputs()[0]
    assert "saved step" not in job.outputs()[1]  # process 0 alone speaks
    assert sorted(losses(path)) == list(range(1, step + 1)) and step < 4000 * 5
    assert not (path / "lock").exists() and not (path / "summary.json").exists()

    # `test_a_run_goes_on_with_other_numbers_of_processes` shows that both train on the same images.
    epochs = step // 5 + 1
    config = small.tiny(**LONG | {"train__epochs": epochs})
    assert loop.run(config, str(path), "train") == 0
    assert sorted(losses(path)) == list(range(1, 5 * epochs + 1))


def test_another_configuration_is_one_line_on_all(tmp_path):
    job = Job(small.card(tmp_path), tmp_path / "run", 2, 1, epochs=(4, 6))
    assert job.wait() == [2, 2], job.outputs()
    for output in job.outputs():
        assert output.startswith("densejax: train.epochs is 4 in process 0 and 6 in process 1; ")
        assert output.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_was_suspended_ends_in_one_line(tmp_path):
    job = Job(small.card(tmp_path, **LONG), tmp_path / "run", 2, 1)
    job.wait_for_record(30)
    job.processes[1].send_signal(signal.SIGSTOP)
    assert job.processes[0].wait(600) not in (0, None)
    job.processes[1].send_signal(signal.SIGCONT)
    assert job.wait()[1] not in (0, None)
    for text in job.outputs():
        assert hosts.RESTART in text.splitlines()[-1]
        assert "Traceback" not in text and "stack" not in text and text.count("densejax: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_and_a_restart_is_bitwise_the_same(tmp_path, victim):
    changes = LONG | {"train__epochs": 60}
    card, path = small.card(tmp_path, **changes), tmp_path / "run"
    assert Job(card, tmp_path / "whole", 2, 1).wait() == [0, 0]
    job = Job(card, path, 2, 1)
    job.wait_for_record(30)
    job.processes[victim].kill()
    begin = time.monotonic()
    codes = job.wait()
    assert time.monotonic() - begin < 60
    assert codes[victim] == -9 and codes[1 - victim] not in (0, None)
    assert hosts.RESTART in job.outputs()[1 - victim].splitlines()[-1]
    assert Job(card, path, 2, 1).wait() == [0, 0]
    assert (path / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    small.assert_same_bits(small.restored(path), small.restored(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    """2 processes, then 1, then 2, then 1 with another number of devices; one example stream."""
    card, path = small.card(tmp_path, **LONG, train__dtype="float64"), tmp_path / "run"
    for count, (processes, devices) in enumerate(((2, 1), (1, 4), (2, 2), (1, 2), (4, 1)), 1):
        job = Job(
            card, path, processes, devices, f"--config.train.epochs={2 * count}",
            JAX_ENABLE_X64="1",
        )  # fmt: skip
        assert job.wait() == [0] * processes, job.outputs()
    job = Job(
        card, tmp_path / "alone", 1, 1, "--config.train.epochs=10", JAX_ENABLE_X64="1"
    )  # fmt: skip
    assert job.wait() == [0], job.outputs()
    together, alone = losses(path), losses(tmp_path / "alone")
    assert sorted(together) == sorted(alone) == list(range(1, 51))
    assert max(abs(together[step] - alone[step]) for step in alone) < 1e-8


@pytest.mark.slow
def test_a_refusal_in_one_process_ends_all_with_its_reason(tmp_path):
    card = small.card(tmp_path, train__batch_size=30)
    job = Job(card, tmp_path / "run", 2, 2)
    assert job.wait() == [2, 2]
    for output in job.outputs():
        assert output.splitlines()[-1].startswith("densejax: train.batch_size = 30: must be")
    assert not (tmp_path / "run").exists()
