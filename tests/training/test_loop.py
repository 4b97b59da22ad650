"""Whole runs: what they leave behind, how they stop and go on, and which model is measured."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from densejax import data, pretrained
from densejax.config import UserError, checked
from densejax.data import builders, memory, stream
from densejax.models import layers
from densejax.runs import checkpoint, files, goodput, hosts, workdir
from densejax.training import loop, result
from densejax.training.experiment import build
from densejax.training.loop import due
from tests import small
from tests.programs import shared_programs  # noqa: F401

ROOT = pathlib.Path(loop.__file__).parents[2]


def run(path, config=None, mode="train", **options):
    """A tiny run, or that of another configuration, in this process; returns the exit code."""
    return loop.run(config or small.tiny(), str(path), mode, **options)


def evaluate(path, capsys, config=None):
    """What an evaluation prints."""
    capsys.readouterr()
    assert run(path, config, "eval") == 0
    return json.loads(capsys.readouterr().out)


def summary(path):
    """The result that a run wrote."""
    return json.loads((path / "summary.json").read_text())


def records(path, name="metrics"):
    """The lines of metrics.jsonl or timings.jsonl."""
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def assert_same_run(path, other):
    """Checkpoints, metrics.jsonl and the result are equal, bit for bit."""
    small.assert_same_bits(small.restored(path), small.restored(other))
    assert (path / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    names = [name for name in summary(path) if name.startswith("test_") or name == "steps"]
    assert len(names) == 7
    assert {n: summary(path)[n] for n in names} == {n: summary(other)[n] for n in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    path = tmp_path_factory.mktemp("finished") / "run"
    assert run(path) == 0
    return path


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def spy_on_steps(monkeypatch, before=lambda step: None):
    """The steps that are taken, from 1; `before(step)` is called as each begins."""
    taken, batch = [], memory.MemorySet.batch

    def spy(self, step):
        taken.append(step + 1)
        before(step + 1)
        return batch(self, step)

    monkeypatch.setattr(memory.MemorySet, "batch", spy)
    return taken


# --- What a run leaves behind.


def test_due():
    assert [step for step in range(1, 12) if due(step, 4, 11)] == [4, 8, 11]
    assert [step for step in range(1, 9) if due(step, 4, 8)] == [4, 8]


def test_the_summary_holds_the_result_and_what_it_depends_on(finished):
    result = summary(finished)
    assert set(result) >= {
        *("test_accuracy", "test_error", "test_loss", "test_examples", "parameters", "steps"),
        *("seconds_to_first_step", "images_per_second", "device", "versions", "config"),
    }
    assert 0 < result["test_accuracy"] < 1
    assert result["test_error"] == 1 - result["test_accuracy"]
    assert (result["test_accuracy"] * 360) % 1 == pytest.approx(0, abs=1e-9)
    assert (result["test_examples"], result["steps"], result["device"]) == (360, 10, "4 x cpu")
    assert result["seconds_to_first_step"] > 0 and result["images_per_second"] > 0
    assert {"jax", "flax", "densejax", "python"} <= set(result["versions"])
    expected = checked(small.tiny())  # with the size of evaluation's images
    assert result["config"] == json.loads(expected.to_json())
    assert result["parameters"] == sum(
        array.size for name, array in small.restored(finished).items() if ".params" in name
    )


def test_metrics_are_those_of_the_steps_and_timings_are_elsewhere(finished):
    assert [(line["step"], line["epoch"]) for line in records(finished)] == [
        *((3, 0.6), (5, 1.0), (6, 1.2), (9, 1.8), (10, 2.0), (10, 2.0))
    ]
    training, evaluation = records(finished)[0], records(finished)[1]
    names = {"loss", "accuracy", "top5_accuracy"}
    assert set(training) == {
        *("step", "epoch", "learning_rate", "skipped_steps"),
        *(f"train_{n}" for n in names),
    }
    assert set(evaluation) == {"step", "epoch", *(f"test_{n}" for n in names)}
    assert records(finished)[-1]["test_accuracy"] == summary(finished)["test_accuracy"]
    assert [line["step"] for line in records(finished, "timings")] == [3, 6, 9, 10]
    assert all(line["images_per_second"] > 0 for line in records(finished, "timings"))


def test_learning_rate_of_a_record_is_that_of_its_step(finished):
    rates = [line["learning_rate"] for line in records(finished) if "learning_rate" in line]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.001])  # steps 3, 6, 9 and 10


def test_tensorboard_and_checkpoints_are_there_and_the_lock_is_gone(finished):
    (board,) = (finished / "tensorboard").iterdir()
    assert all(word in board.read_bytes() for word in (b"train/images", b"optimizer.momentum"))
    assert board.name.startswith("events.out.tfevents") and board.stat().st_size > 500
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["10", "5"]
    assert not (finished / "lock").exists()


def test_where_the_time_went(finished):
    found = json.loads((finished / "goodput.json").read_text())
    assert found["starts"] == 1 and set(found["seconds"]) == set(goodput.KINDS)
    assert all(found["seconds"][kind] > 0 for kind in ("step", "input_wait", "evaluation", "save"))
    assert found["seconds"]["lost"] == found["seconds"]["down"] == 0
    assert found["share_of_steps"] == pytest.approx(
        found["seconds"]["step"] / sum(found["seconds"].values())
    )
    assert sorted(found["at_checkpoints"]) == ["10", "5"]


# --- Stopping and going on.


def interrupted(monkeypatch, path, number, step, config=None):
    """A run that gets a signal during a step; returns its exit code and the steps it took."""
    with monkeypatch.context() as patch:
        taken = spy_on_steps(patch, lambda now: now == step and signal.raise_signal(number))
        return run(path, config), taken


def test_a_run_that_is_interrupted_again_and_again_ends_as_if_it_had_not_been(
    finished, tmp_path, monkeypatch, capsys
):
    path, done = tmp_path / "run", 0
    for number, step, code in (
        (signal.SIGTERM, 1, 0),
        (signal.SIGTERM, 5, 0),  # an epoch ends: saved now, evaluated by the next start
        (signal.SIGHUP, 6, 0),  # the terminal is closed
        (signal.SIGINT, 7, 130),
        (signal.SIGINT, 10, 130),  # the last step: the result alone is missing
    ):
        before = signal.getsignal(number)
        taken = list(range(done + 1, step + 1))
        assert interrupted(monkeypatch, path, number, step) == (code, taken)
        assert f"{number.name}: saved step {step};" in capsys.readouterr().out
        assert not (path / "summary.json").exists() and not (path / "lock").exists()
        assert signal.getsignal(number) is before
        done = step
    taken = spy_on_steps(monkeypatch)
    assert run(path) == 0 and taken == []
    assert_same_run(finished, path)


@pytest.mark.parametrize(
    ("moment", "step"),
    [((checkpoint.Checkpoints, "save"), 6), ((memory.MemorySet, "evaluation"), 5)],
)
def test_a_signal_during_a_save_waits_for_a_step_and_one_cuts_an_evaluation(
    finished, tmp_path, monkeypatch, capsys, moment, step
):
    owner, name = moment
    plain, once = getattr(owner, name), []

    def killed(*arguments):
        if not once:
            once.append(signal.raise_signal(signal.SIGTERM))
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        assert run(tmp_path) == 0
    assert f"SIGTERM: saved step {step};" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / str(step)).exists()
    assert run(tmp_path) == 0
    assert_same_run(finished, tmp_path)


def test_a_signal_during_the_only_measurement_is_heard(finished, tmp_path, monkeypatch, capsys):
    config = small.tiny(evaluate__every_epochs=0)

    def killed(self, plain=memory.MemorySet.evaluation):
        signal.raise_signal(signal.SIGINT)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(memory.MemorySet, "evaluation", killed)
        assert run(tmp_path, config) == 130
    assert "SIGINT: saved step 10;" in capsys.readouterr().out
    assert run(tmp_path, config) == 0
    assert not any("test_accuracy" in line for line in records(tmp_path))
    assert summary(tmp_path)["test_loss"] == summary(finished)["test_loss"]


def test_a_stopped_run_saves_where_no_save_is_due(tmp_path, monkeypatch):
    config = small.tiny(checkpoint__every_epochs=2)  # and none after the first evaluation
    assert interrupted(monkeypatch, tmp_path, signal.SIGTERM, 5, config)[0] == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_a_batch_that_is_not_finite_is_skipped_named_and_counted(tmp_path, monkeypatch, caplog):
    batch = memory.MemorySet.batch

    def poisoned(self, step):
        found, factor = batch(self, step), jnp.nan if step + 1 == 5 else 1
        found["image"] = found["image"].astype(jnp.float32) * jnp.float32(factor)
        return found

    monkeypatch.setattr(memory.MemorySet, "batch", poisoned)
    config = small.tiny(log__every_steps=1, train__max_skipped_steps=2)
    assert run(tmp_path, config) == 0
    assert "Step 5 is skipped: it is not finite (1 in a row)." in caplog.text
    assert caplog.text.count("is skipped") == 1 and summary(tmp_path)["skipped_steps"] == 1
    lines = [line for line in records(tmp_path) if "skipped_steps" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 6
    assert "train_loss" not in lines[4] and lines[5]["learning_rate"] == lines[4]["learning_rate"]


def test_a_full_disk_delays_saves_and_the_run_ends_well_only_if_the_last_is_made(
    finished, tmp_path, monkeypatch, caplog
):
    write, full = checkpoint._write_manifest, {5, 10}

    def refuse(path, manifest):
        if int(path.name.partition(".")[0]) in full:
            raise OSError(28, "No space left on device")
        write(path, manifest)

    monkeypatch.setattr(checkpoint, "_write_manifest", refuse)
    with pytest.raises(UserError, match="Step 10 could not be saved .* No space left on device"):
        run(tmp_path)
    assert caplog.text.count("Step 5 could not be saved") == 1  # and the run went on
    assert not (tmp_path / "summary.json").exists()
    full.remove(10)
    assert run(tmp_path) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    small.assert_same_bits(small.restored(tmp_path), small.restored(finished))


def test_what_nohup_ignores_stays_ignored_and_two_hangups_are_one():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with hosts.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with hosts.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_trains_without_handlers_of_its_own(tmp_path, finished):
    """A notebook server, or a pool."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(loop.run, small.tiny(), str(tmp_path), "train").result() == 0
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize(
    ("method", "call", "saved", "times_out"),
    [
        *(("batch", 7, 6, False), ("batch", 1, None, False), ("evaluation", 1, 5, False)),
        ("batch", 7, 6, True),
        pytest.param("evaluation", 1, 5, True, marks=pytest.mark.slow),
    ],
)
def test_an_input_that_fails_costs_no_step(
    finished, tmp_path, monkeypatch, capsys, method, call, saved, times_out
):
    plain, calls = getattr(memory.MemorySet, method), []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == call:
            if times_out:
                signal.raise_signal(signal.SIGTERM)
                raise stream.BatchTimeout("no batch comes any more")
            raise builders.DataError("the worker process 7 has ended")
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(memory.MemorySet, method, failing)
        if times_out and saved:
            assert run(tmp_path) == 0
            assert f"SIGTERM: saved step {saved};" in capsys.readouterr().out
        else:
            with pytest.raises(builders.DataError) as caught:
                run(tmp_path)
            assert not saved or str(caught.value).endswith(f"has ended; step {saved} is saved")
    taken = spy_on_steps(monkeypatch)
    assert run(tmp_path) == 0
    assert taken[0] == (saved or 0) + 1
    assert_same_run(finished, tmp_path)


def test_an_input_that_fails_after_an_evaluation_does_not_repeat_it(tmp_path, monkeypatch):
    config, plain = small.tiny(checkpoint__every_epochs=4), memory.MemorySet.batch

    def failing(self, number):
        if number == 5:  # of the step after the first epoch's evaluation
            raise builders.DataError("the worker process 7 has ended")
        return plain(self, number)

    monkeypatch.setattr(memory.MemorySet, "batch", failing)
    with pytest.raises(builders.DataError, match="has ended; step 5 is saved"):
        run(tmp_path, config)
    experiment = small.build(config)
    with contextlib.closing(loop.open_checkpoints(config, tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert not loop.evaluates_first(experiment, checkpoints, 5)


def test_process_0_decides_whether_a_run_is_finished(tmp_path, monkeypatch):
    """The disk of another host shows what was there a moment ago, such as nothing."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "require_same", lambda facts: None)
    monkeypatch.setattr(hosts, "gather", lambda value: [[True, True], value])
    monkeypatch.setattr(builders, "read", None)
    assert run(tmp_path / "run") == 0


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    def twice(step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    taken = spy_on_steps(monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert taken == [1, 2] and not (tmp_path / "checkpoints").exists()


# A card's run sends itself a signal as a step begins: no machine is too slow to hit it.
SIGNAL = """

import os
from densejax.data import memory

plain = memory.MemorySet.batch


def batch(self, step):
    if step + 1 == {step}:
        os.kill(os.getpid(), {number})
    return plain(self, step)


memory.MemorySet.batch = batch
"""


def process(*words):
    """A Python process of its own, whose output is read as text."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | small.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(card, path):
    """The real command in a process of its own; returns (exit code, what it printed)."""
    with process("-m", "densejax.main", f"--config={card}", f"--workdir={path}") as started:
        output = started.communicate()[0]
    return started.returncode, output


@pytest.mark.slow
def test_a_real_process_is_killed_and_goes_on(tmp_path):
    changes = {
        "train__epochs": 8,
        "log__every_steps": 1,
        "evaluate__every_epochs": 2,
        "checkpoint__every_epochs": 3,
    }
    card = small.card(tmp_path, **changes)
    assert run(tmp_path / "reference", small.tiny(**changes)) == 0
    path, plain = tmp_path / "run", card.read_text()
    for number, step in (signal.SIGTERM, 12), (signal.SIGKILL, 27):
        card.write_text(plain + SIGNAL.format(number=int(number), step=step))
        code, output = command(card, path)
        assert code == (0 if number == signal.SIGTERM else -9), output
        assert code == -9 or f"{number.name}: saved step 1" in output
    card.write_text(plain)
    code, output = command(card, path)
    assert code == 0 and "test accuracy" in output, output
    assert_same_run(path, tmp_path / "reference")


def test_ctrl_c_before_training_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    card = tmp_path / "card.py"
    card.write_text(
        "import os, time\n\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], flush=True)\n"
        "time.sleep(600)\n"
    )
    with process("-m", "densejax.main", f"--config={card}") as started:
        said = started.stdout.readline()
        assert said == f"{started.pid} glibc.malloc.hugetlb=1\n"  # the same process, started again
        started.send_signal(signal.SIGINT)
        assert started.communicate()[0] == "densejax: interrupted\n"
    assert started.returncode == 130


SECOND = """
import ctypes, time
from densejax.runs import hosts, interrupt

interrupt.watch()
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with hosts.Stop() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print("first", flush=True)
    lock(mutex)  # the second time it waits forever
"""


def test_a_second_ctrl_c_ends_at_once_whatever_library_is_at_work(tmp_path):
    """The main thread waits in C, where no handler of Python's is called."""
    with process("-c", SECOND) as started:
        for line in ("ready\n", "first\n"):
            assert started.stdout.readline() == line
            started.send_signal(signal.SIGINT)
        assert started.communicate()[0] == "densejax: interrupted\n"
    assert started.returncode == 130


# --- A run that is there already.


def test_a_finished_run_prints_its_result_again(copy, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    taken = spy_on_steps(monkeypatch)
    monkeypatch.setattr(data, "create", None)  # no image is read
    assert run(copy) == 0
    assert taken == []
    accuracy = summary(copy)["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f} % on 360 images" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_finished_run_of_other_code_is_refused_and_measured_again_only_when_asked(
    copy, monkeypatch, capsys
):
    monkeypatch.setattr("tests.programs.FOUND", {})  # the network is another
    before, code = summary(copy), workdir.code_digest()
    taken = spy_on_steps(monkeypatch)
    monkeypatch.setattr(workdir, "code_digest", lambda: "0123")
    worse = layers.Head.__call__  # what a student changes by mistake: no feature reaches the logits
    monkeypatch.setattr(layers.Head, "__call__", lambda self, x: worse(self, 0 * x))
    with pytest.raises(UserError, match=f'versions.code: "{code}" -> "0123"') as caught:
        run(copy)
    assert "--resume=force" in str(caught.value) and "\n" not in str(caught.value)
    assert summary(copy) == before
    printed = evaluate(copy, capsys)
    assert printed["changes"] == [f'versions.code: "{code}" -> "0123"']
    assert run(copy, force=True) == 0
    after = summary(copy)
    assert taken == [] and after["versions"]["code"] == "0123"
    assert after["changes"] == [f'versions.code: "{code}" -> "0123"']
    assert after["test_accuracy"] == printed["test_accuracy"] < before["test_accuracy"]


@pytest.mark.parametrize("precision", [False, True])
def test_a_finished_run_of_other_data_or_precision_is_refused(copy, monkeypatch, precision):
    read = builders.read

    def other(name, split, *rest):
        images, labels = read(name, split, *rest)
        return images, (labels + (split == "test")) % 10

    if precision:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    else:
        monkeypatch.setattr(builders, "read", other)
    name = "matmul_precision" if precision else "data"
    with pytest.raises(UserError, match=f"with other versions .versions.{name}: "):
        run(copy)


def test_a_damaged_summary_is_named_and_its_loss_costs_a_measurement(copy, monkeypatch):
    before, file = summary(copy), copy / "summary.json"
    text = file.read_text()
    place = text.index('"test_accuracy": 0.') + len('"test_accuracy": 0.')
    one_bit = text[:place] + chr(ord(text[place]) ^ 2) + text[place + 1 :]  # 0.51 reads 0.71
    for content in ('"x"', "1", '{"config": null}', "{}", "", "[1]", one_bit):
        file.write_text(content)
        with pytest.raises(UserError, match="summary.json is damaged .*: delete it"):
            run(copy)
    file.unlink()
    taken = spy_on_steps(monkeypatch)
    assert run(copy) == 0
    assert taken == [] and summary(copy)["test_accuracy"] == before["test_accuracy"]


def test_statistics_of_a_part_of_the_batch_depend_on_how_many_devices_there_are():
    groups = {"parallel__batch_norm": "groups", "parallel__batch_norm_group_size": 2}
    for changes in {"parallel__batch_norm": "replica"}, groups:
        assert result.versions(small.tiny(**changes))["devices"] == "4"
    assert "devices" not in result.versions(small.tiny())


def test_more_epochs_go_on_also_in_a_run_that_is_older_than_data_json(
    copy, finished, monkeypatch, capsys
):
    (copy / "data.json").unlink()
    evaluate(copy, capsys)
    assert not (copy / "data.json").exists()  # an evaluation writes nothing
    taken = spy_on_steps(monkeypatch)
    assert run(copy, small.tiny(train__epochs=3)) == 0
    assert taken == list(range(11, 16)) and summary(copy)["steps"] == 15
    assert summary(copy)["config"]["train"]["epochs"] == 3
    assert records(copy)[-1]["step"] == 15
    assert (copy / "data.json").read_bytes() == (finished / "data.json").read_bytes()


def test_fewer_epochs_than_done_are_refused_and_leave_the_configuration_alone(copy):
    with pytest.raises(UserError, match="train.epochs = 1: .* has 10 steps behind it") as caught:
        run(copy, small.tiny(train__epochs=1))
    assert "\n" not in str(caught.value)
    assert json.loads((copy / "config.json").read_text())["train"]["epochs"] == 2


def test_max_steps_end_a_run_within_an_epoch(tmp_path, monkeypatch, capsys):
    config = small.tiny(train__max_steps=3)
    assert interrupted(monkeypatch, tmp_path, signal.SIGTERM, 2, config) == (0, [1, 2])
    taken = spy_on_steps(monkeypatch)
    assert run(tmp_path, config) == 0 and taken == [3]
    assert "3 of 256 images, 0.6 epochs, resuming after 2" in capsys.readouterr().out
    assert summary(tmp_path)["steps"] == 3 and summary(tmp_path)["test_examples"] == 360
    last = {key for record in records(tmp_path) for key in record if record["step"] == 3}
    assert {"train_loss", "test_accuracy"} <= last and records(tmp_path)[-1]["epoch"] == 0.6
    assert run(tmp_path, config) == 0 and taken == [3]  # it is finished
    with pytest.raises(UserError, match="train.max_steps = 1: .* 3 steps behind it, more than"):
        run(tmp_path, small.tiny(train__max_steps=1, optimizer__warmup_epochs=0.0), force=True)
    # Without the limit it goes on: no result yet, and no other configuration.
    longer = checked(small.tiny())
    assert result.finished(tmp_path, longer, {}) is None
    assert workdir.check(tmp_path, longer) == ["train.max_steps: 3 -> 0"]


def test_a_refused_start_makes_no_directory(tmp_path):
    with pytest.raises(UserError, match="batch_size"):
        run(tmp_path / "run", small.tiny(train__batch_size=5000))
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused_with_the_difference_and_only_forced(copy, monkeypatch):
    other = small.tiny(optimizer__learning_rate=0.05, train__batch_size=128)
    with pytest.raises(UserError, match="optimizer.learning_rate: 0.1 -> 0.05") as caught:
        run(copy, other)
    assert "--resume=force" in str(caught.value)
    taken = spy_on_steps(monkeypatch)
    assert run(copy, other, force=True) == 0
    assert taken == list(range(11, 23))  # the same epochs are 22 steps of half the batch, not 10
    assert summary(copy)["config"]["optimizer"]["learning_rate"] == 0.05
    history = (copy / "history.jsonl").read_text().splitlines()
    assert "optimizer.learning_rate: 0.1 -> 0.05" in json.loads(history[-1])["changes"]


def test_logging_may_differ(tmp_path, monkeypatch, finished):
    resumed, single = tmp_path / "resumed", tmp_path / "single"
    assert interrupted(monkeypatch, resumed, signal.SIGTERM, 3)[0] == 0
    config = small.tiny(log__every_steps=2, log__seconds=1.0, checkpoint__keep_latest=1)
    assert run(resumed, config) == 0
    assert summary(resumed)["test_accuracy"] == summary(finished)["test_accuracy"]
    assert [path.name for path in (resumed / "checkpoints").iterdir()] == ["10"]
    # The checkpoint has the sums of steps 1 to 3; the record of step 4 is of step 4 alone.
    assert run(single, small.tiny(log__every_steps=1)) == 0
    of_step_4 = [
        next(record["train_loss"] for record in records(path) if record["step"] == 4)
        for path in (resumed, single)
    ]
    assert of_step_4[0] == pytest.approx(of_step_4[1])


def test_evaluation_alone_prints_the_result_as_json(finished, capsys, monkeypatch):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))
    taken = spy_on_steps(monkeypatch)
    printed = evaluate(finished, capsys)
    assert printed.pop("changes") == []
    assert printed["versions"].items() < summary(finished)["versions"].items()
    versions = printed.pop("versions")
    assert printed["steps"] == 10 and taken == []
    assert printed == {name: summary(finished)[name] for name in printed}
    assert {"test_accuracy", "test_error", "test_examples"} <= set(printed)
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*")) == before
    assert versions["code"] == workdir.code_digest()


def test_a_trained_network_is_measured_in_other_ways(finished, capsys):
    ten_crops = small.tiny(evaluate__crop_size=6, evaluate__batch_size=128)
    printed = evaluate(finished, capsys, ten_crops)
    assert printed["changes"] == ["evaluate.batch_size: 256 -> 128", "evaluate.crop_size: 0 -> 6"]
    assert printed["test_examples"] == 360
    assert printed["test_loss"] != summary(finished)["test_loss"]
    with pytest.raises(UserError, match="augmentation.shift: 1 -> 2") as caught:
        run(finished, small.tiny(augmentation__shift=2), "eval")
    assert "Give the run's own values" in str(caught.value)
    assert "--resume" not in str(caught.value)  # which --mode=eval would refuse as well


def test_evaluation_needs_a_checkpoint(copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="--mode=eval: there is no checkpoint to evaluate"):
        run(copy, mode="eval")
    with pytest.raises(UserError, match="not a run directory"):
        run(copy / "nowhere", mode="eval")


# --- Which model is measured.


def best(**changes):
    """A run of four epochs that holds out images and keeps the best model."""
    return small.tiny(
        **{
            "data__validation_size": 100,
            "train__epochs": 4,
            "evaluate__split": "validation",
            "checkpoint__select": "best",
            "checkpoint__keep_latest": 1,
            **changes,
        }
    )


@pytest.fixture
def script(monkeypatch):
    """Validation accuracies by step, instead of the measured ones; returns what was measured."""
    calls, build = [], loop.build
    accuracies = {5: 0.3, 10: 0.9, 15: 0.4, 20: 0.5}

    def scripted(config):
        experiment = build(config)
        evaluate = experiment.evaluate

        def spy(state, split, stops):
            calls.append((split, int(state.step)))
            values = evaluate(state, split, stops)
            if split == "validation":
                values = values | {"accuracy": accuracies[int(state.step)]}
            return values

        experiment.__dict__["evaluate"] = spy
        return experiment

    monkeypatch.setattr(loop, "build", scripted)
    return calls


def test_the_best_of_the_held_out_images_is_measured_once(tmp_path, script, monkeypatch, capsys):
    assert interrupted(monkeypatch, tmp_path, signal.SIGTERM, 12, best())[0] == 0
    assert run(tmp_path, best()) == 0
    assert script == [*(("validation", step) for step in (5, 10, 15, 20)), ("test", 10)]
    result = summary(tmp_path)
    assert result["steps"] == 10 and result["test_examples"] == 360
    found = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert found == [10, 20]
    assert evaluate(tmp_path, capsys, best())["test_accuracy"] == result["test_accuracy"]
    assert script[-1] == ("test", 10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
@pytest.mark.parametrize("file", ["_METADATA", checkpoint.MANIFEST])
def test_a_result_says_that_the_best_is_damaged_and_what_was_measured_instead(
    tmp_path, script, monkeypatch, capsys, file
):
    """Without its manifest, nobody knows whether step 10 was the best: it is kept and named."""
    assert interrupted(monkeypatch, tmp_path, signal.SIGTERM, 12, best())[0] == 0
    (tmp_path / "checkpoints/10" / file).write_text("")
    capsys.readouterr()
    assert run(tmp_path, best()) == 0
    told = "at step 20, as the checkpoints of steps [10] are damaged"
    assert told in capsys.readouterr().out.splitlines()[-2]
    result = summary(tmp_path)
    assert (result["steps"], result["damaged_checkpoints"]) == (20, [10])
    assert script[-1] == ("test", 20)
    assert run(tmp_path, best()) == 0  # the result again
    assert told in capsys.readouterr().out
    assert evaluate(tmp_path, capsys, best())["damaged_checkpoints"] == [10]


@pytest.mark.parametrize("stop", [None, 15])
def test_patience_ends_a_run_at_the_same_step_however_it_was_interrupted(
    tmp_path, script, monkeypatch, capsys, stop
):
    config = best(train__patience=1)  # the error of step 15 is not below that of step 10
    if stop:
        assert interrupted(monkeypatch, tmp_path, signal.SIGTERM, stop, config)[0] == 0
    assert run(tmp_path, config) == 0
    assert script == [*(("validation", step) for step in (5, 10, 15)), ("test", 10)]
    assert "step 15: the error on held-out images was not lower" in capsys.readouterr().out
    assert summary(tmp_path)["steps"] == 10
    assert [line["step"] for line in records(tmp_path) if "validation_loss" in line] == [5, 10, 15]
    assert run(tmp_path, config) == 0 and len(script) == 4  # the result again
    (tmp_path / "summary.json").unlink()
    taken = spy_on_steps(monkeypatch)
    assert run(tmp_path, config) == 0 and taken == []
    assert script[4:] == [("test", 10)]


def test_patience_counts_from_the_lowest_error():
    for errors, limit, ends in (
        ([0.5, 0.4, 0.4, 0.3, 0.35, 0.3], 2, [False] * 5 + [True]),
        ([0.5, 0.6], 1, [False, True]),
        ([0.5, 0.6, 0.7], 0, [False] * 3),
    ):
        found, stored = [], {}
        for error in errors:  # each time as if a checkpoint had just been opened
            patience = loop.Patience(limit, stored)
            patience.see(error)
            found, stored = [*found, patience.is_over], patience.metrics
        assert found == ends


def test_a_run_whose_classifier_learns_first_resumes_bit_for_bit(tmp_path, monkeypatch):
    config, whole, parts = small.tiny(train__head_epochs=1), tmp_path / "whole", tmp_path / "parts"
    kinds = []
    with monkeypatch.context() as patch:
        switch_to = goodput.Goodput.switch_to
        patch.setattr(goodput.Goodput, "switch_to", lambda *x: kinds.append(x[1]) or switch_to(*x))
        assert run(whole, config) == 0
    assert kinds.count("compile") == 2  # the second program compiles after the first epoch
    assert interrupted(monkeypatch, parts, signal.SIGTERM, 3, config)[0] == 0
    assert run(parts, config) == 0
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    digests = [pretrained.digest(str(path)) for path in (whole, parts)]
    assert digests[0] == digests[1]
    with contextlib.closing(checkpoint.Checkpoints(whole / "checkpoints")) as checkpoints:
        states = [checkpoints.restore_step(step)["params"] for step in (5, 10)]
    drawn = small.named(build(config).init().params)
    for state, moved in zip(states, ({"head"}, {"block1", "block2", "stem", "head"}), strict=True):
        found = small.named(state)
        changed = {name for name in drawn if drawn[name].tobytes() != found[name].tobytes()}
        assert moved <= {name.split("'")[1] for name in changed}
        assert moved > {"head"} or all("head" in name for name in changed)


def test_the_last_model_is_measured_where_that_is_asked_for(tmp_path, script):
    config = best(checkpoint__select="last")
    assert run(tmp_path, config) == 0
    assert script[-1] == ("test", 20) and summary(tmp_path)["steps"] == 20


def test_tuning_never_reads_a_test_image(tmp_path, monkeypatch):
    read, splits = builders.read, []

    def spy(name, split, *rest):
        splits.append(split)
        return read(name, split, *rest)

    monkeypatch.setattr(builders, "read", spy)
    config = best(train__epochs=1, evaluate__final_split="validation")
    assert run(tmp_path, config) == 0
    assert splits == ["train"]
    result = summary(tmp_path)
    assert result["validation_examples"] == 100 and "test_accuracy" not in result


def test_a_run_s_classes_are_those_of_its_data(copy, finished):
    learned = files.unseal(json.loads((copy / "data.json").read_text()))
    assert learned["class_names"] == list("0123456789") and learned["image_shape"] == [8, 8, 1]
    renamed = json.dumps(files.seal(learned | {"class_names": list("012345678x")}))
    (copy / "data.json").write_text(renamed)
    more = small.tiny(train__epochs=3)
    for config, mode in ((small.tiny(), "eval"), (more, "train")):
        with pytest.raises(UserError, match=r"other classes .*\(missing x; new 9\)"):
            run(copy, config, mode)
    assert run(copy, more, force=True) == 0
    assert (copy / "data.json").read_bytes() == (finished / "data.json").read_bytes()
