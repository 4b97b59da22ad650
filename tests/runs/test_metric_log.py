"""What the log leaves on disk and on the screen, read back from outside."""

import builtins
import errno
import functools
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import testing as epath_testing
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from densejax.config import UserError
from densejax.runs import metric_log, screen
from densejax.runs.metric_log import MetricLog


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    return now


def create(workdir, start_step=0, **others):
    return MetricLog(workdir, 40, start_step, batch_size=8, epoch_steps=20, **others)


def run(workdir, start_step, stop_step):
    """Logs every 5 steps and evaluates every 20, as a loop does; is not closed, as in a crash."""
    log = create(workdir, start_step)
    if start_step == 0:
        log.evaluation(0, "validation", {"loss": jnp.float32(2.3)})
    for step in range(start_step + 5, stop_step + 1, 5):
        loss = jnp.float32(1) / step
        log.train(step, {"train_loss": loss, "train_accuracy": 0.1, "learning_rate": 1e-3 * step})
        if step % 20 == 0:
            with log.pause():
                log.evaluation(step, "validation", {"loss": loss / 3, "accuracy": jnp.float32(0.7)})
    return log


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_holds_only_what_does_not_depend_on_the_clock(workdir):
    run(workdir, 0, 20)
    first, *_, last = records(workdir / "metrics.jsonl")
    assert first == {"step": 0, "epoch": 0.0, "validation_loss": pytest.approx(2.3)}
    assert last["step"] == 20 and last["epoch"] == 1.0
    assert set(last) == {"step", "epoch", "validation_loss", "validation_accuracy"}
    assert set(records(workdir / "timings.jsonl")[0]) == {"step", "seconds", "images_per_second"}


@pytest.mark.parametrize(("saved", "stop"), [(0, 15), (20, 20), (20, 35)])
@pytest.mark.parametrize("torn", ["", '{"step": 40, "epo'])
def test_a_resumed_run_leaves_the_same_bytes(workdir, saved, stop, torn):
    whole, parts = workdir / "whole", workdir / "parts"
    whole.mkdir()
    parts.mkdir()
    run(whole, 0, 40).close()
    run(parts, 0, stop)
    timings = (parts / "timings.jsonl").read_text()
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run(parts, saved, 40).close()
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (parts / "timings.jsonl").read_text().startswith(timings)
    assert len(records(parts / "timings.jsonl")) == stop // 5 + (40 - saved) // 5


def test_a_line_that_is_no_record_is_named(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 5}\nnoise\n{"step": 10}\n')
    with pytest.raises(UserError, match="metrics.jsonl.*not a record"):
        create(workdir, 10)


def test_records_that_are_not_those_of_the_checkpoint_are_named_and_kept(workdir):
    path, log = workdir / "metrics.jsonl", run(workdir, 0, 20)
    whole, saved = path.read_bytes(), log.digest  # as the checkpoint of step 20 keeps it
    assert saved == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    create(workdir, 20, saved=saved).close()
    assert path.read_bytes() == whole
    changed = [whole[:size] for size in range(len(whole))]
    changed += [whole.replace(b"0.1", b"0.2"), b"\n" + whole, b"{}\n" + whole]
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(UserError, match="metrics.jsonl is damaged.*step 20.*delete it"):
            create(workdir, 20, saved=saved)
        assert path.read_bytes() == content
    path.write_bytes(whole + b'{"step": 20, "epoch": 1.0, "test_loss": 1.0}\n{"step": 25}\n{"st')
    create(workdir, 20, saved=saved).close()  # an evaluation that came after the save
    assert path.read_bytes() == whole + b'{"step": 20, "epoch": 1.0, "test_loss": 1.0}\n'
    path.write_bytes(whole[:-9])
    create(workdir, 20, saved={}).close()  # of an older version, which kept no digest


def test_records_that_are_gone_are_missed(workdir, caplog):
    log = run(workdir, 0, 20)
    (workdir / "metrics.jsonl").unlink()
    create(workdir, 0).close()
    assert "gone" not in caplog.text
    (workdir / "metrics.jsonl").unlink()
    create(workdir, 20, saved=log.digest).close()
    assert "metrics.jsonl is gone: the records up to step 20 are lost" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "tensorboard"])
@pytest.mark.parametrize("leave", [os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_what_is_something_else_in_the_place_of_the_log_is_named(workdir, name, leave):
    leave(workdir / name)
    with pytest.raises(UserError, match=f"{name}.*(move away)"):
        create(workdir)


def test_who_lost_the_directory_writes_nothing(workdir):
    def guard():
        if lost:
            raise UserError("another process took it over")

    lost, folder = False, pathlib.Path(workdir)
    log = create(workdir, guard=guard)
    log.train(5, {"train_loss": 1.0})
    log.write()
    lost, before = True, {path: path.read_bytes() for path in folder.rglob("*.*")}
    train = functools.partial(log.train, 10, {"train_loss": 1.0})
    for write in (train, log.write, log.close, lambda: create(workdir, guard=guard)):
        with pytest.raises(UserError, match="took it over"):
            write()
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_what_a_kill_within_a_write_left_is_removed(workdir):
    (workdir / "tensorboard").mkdir()
    left = ["metrics.jsonl.123.tmp", "config.json.0a1b2c3d.tmp", "tensorboard/events.x.77.tmp"]
    for name in [*left, "my.tmp"]:
        (workdir / name).write_text("half")
    create(workdir).close()
    assert not any((workdir / name).exists() for name in left)
    assert (workdir / "my.tmp").exists()


def test_an_object_store_gets_whole_files(tmp_path):
    def local(path):
        return str(path).replace("gs://bucket", str(tmp_path))

    def open_object(original, path, mode):
        assert "a" not in mode, "object stores have no append"
        return builtins.open(local(path), mode)

    def replace(original, path, target):
        pathlib.Path(local(path)).replace(local(target))

    def exists(original, path):
        return pathlib.Path(local(path)).exists()

    def mkdir(original, path, **options):
        pathlib.Path(local(path)).mkdir(**options)

    patches = {"open": open_object, "replace": replace, "exists": exists, "mkdir": mkdir}
    with epath_testing.mock_epath(**patches):
        log = run(epath.Path("gs://bucket"), 0, 35)
        last = records(tmp_path / "metrics.jsonl")[-1]  # a save after it must find it written
        assert last["step"] == 20 and "validation_loss" in last
        log.train(36, {"train_loss": 1.0})
        with log.pause():
            assert records(tmp_path / "metrics.jsonl")[-1]["step"] == 36
        log.close()
        run(epath.Path("gs://bucket"), 20, 40).close()
    (tmp_path / "local").mkdir()
    run(epath.Path(tmp_path / "local"), 0, 40).close()
    expected = (tmp_path / "local" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize(("compiles_before", "rates"), [(False, [40 / 60]), (True, [32 / 60])])
def test_images_per_second_leaves_out_the_first_step_and_pauses(
    workdir, clock, compiles_before, rates
):
    log = create(workdir)
    if compiles_before:
        clock[0] += 1000.0
        log.step(1)
    for step, seconds in ((5, 60.0), (10, 2.0), (15, 4.0), (20, 1.0)):
        clock[0] += seconds
        log.train(step, {"train_loss": 1.0})
        log.step(step)
        with log.pause():
            clock[0] += 1000.0
    found = [record["images_per_second"] for record in records(workdir / "timings.jsonl")]
    assert found == pytest.approx([*rates, 20.0, 10.0, 40.0])
    assert log.images_per_second == pytest.approx(15.0 if compiles_before else 20.0)


def test_without_a_terminal_a_line_every_few_seconds(workdir, clock, capsys):
    log = create(workdir, seconds=10.0)
    for step in range(1, 41):
        clock[0] += 3.0
        log.train(step, {"train_loss": 0.5, "train_accuracy": 0.9512})
    log.evaluation(40, "test", {"accuracy": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 4, epoch 1/2, loss 0.5, accuracy 95.12 %, 3 images/s, 0:01:48 left"
    assert [line.split(",")[0] for line in lines[1:3]] == ["step 8", "step 12"]
    assert lines[-1] == "step 40, test accuracy 25.00 %"
    assert len(lines) == 11


def test_a_screen_that_is_a_full_disk_ends_nothing(workdir, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    run(workdir, 0, 40).close()
    assert records(workdir / "metrics.jsonl")[-1]["step"] == 40


@pytest.fixture
def terminal(monkeypatch):
    """Call it for a terminal of 80 columns: what it is sent."""

    def start():
        sent = io.StringIO()
        monkeypatch.setattr(sent, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", sent)
        monkeypatch.setenv("COLUMNS", "80")
        return sent

    return start


def lines_of(sent):
    """The lines that were shown, one in place of the other: the cursor ends at their start."""
    shown = sent.getvalue().split("\r\x1b[K")[1:]
    assert all(line.endswith(("\r", "\n")) for line in shown)
    return [line[:-1] for line in shown]


def test_a_terminal_has_one_line_that_says_what_goes_on(workdir, clock, terminal):
    sent, log = terminal(), create(workdir)
    clock[0] += 83.0
    log.step(1)  # compiled
    for step in range(2, 13):
        clock[0] += 0.5
        if step == 5:
            log.train(step, {"train_loss": 0.123456, "train_accuracy": 0.9512})
        log.step(step)
    with log.pause():
        clock[0] += 1000.0  # compiles the evaluation
        log.evaluation(12, "test", {"loss": 0.5, "accuracy": 0.25})
    clock[0] += 0.5
    log.step(13)
    log.close()
    assert [line for line in lines_of(sent) if "compiling" not in line] == [
        *(f"step {step} epoch 1/2 0:00:{(40 - step) / 2:02.0f} left" for step in (2, 3, 4)),
        *(
            f"step {step} epoch 1/2 loss 0.1235 accuracy 95.12 % 16 images/s 0:00:"
            f"{(40 - step) / 2:02.0f} left"
            for step in range(5, 13)
        ),
        "evaluating, saving",
        "step 12, test loss 0.5, accuracy 25.00 %",
        "step 13 epoch 1/2 loss 0.1235 accuracy 95.12 % 16 images/s 0:00:14 left",
        "",
    ]


def test_a_clock_runs_while_the_first_step_compiles(workdir, clock, terminal):
    def wait(seconds):
        clock[0] += 61.0

    log = create(workdir)
    log.clear()
    sent, log.on_screen = terminal(), True
    is_set = iter((False, False, False, True)).__next__
    log.compiled = types.SimpleNamespace(is_set=is_set, wait=wait)
    log._say_compiling()
    assert lines_of(sent) == [f"compiling 0:0{n}:0{n}" for n in range(3)]


def test_the_longest_line_leaves_out_what_comes_first(terminal):
    sent = terminal()
    parts = ["step 123,456", "epoch 137/300", "loss 0.4123", "accuracy 95.12 %"]
    screen.show(*parts, "12,345 images/s", "103:15:05 left")
    screen.show("step 1,345", "epoch 18/300", *parts[2:], "1,187 images/s", "9:15:05 left")
    assert lines_of(sent) == [
        "epoch 137/300 loss 0.4123 accuracy 95.12 % 12,345 images/s 103:15:05 left",
        "step 1,345 epoch 18/300 loss 0.4123 accuracy 95.12 % 1,187 images/s 9:15:05 left",
    ]


def test_other_processes_write_nothing(workdir, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(workdir, 0, 40).close()
    assert list(workdir.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_what_a_full_disk_refuses_is_written_once_there_is_room(workdir, monkeypatch, caplog):
    log, plain, full = create(workdir), type(workdir).open, [False]

    class HalfWritten(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def refuse(path, mode="r", *arguments, **keywords):
        if full[0] and mode == "ab" and path.name != "metrics.jsonl":  # which still has room
            return HalfWritten(path, mode)
        return plain(path, mode, *arguments, **keywords)

    monkeypatch.setattr(type(workdir), "open", refuse)
    for step in (5, 10, 15, 20, 25):
        full[0] = step in (10, 15)
        log.train(step, {"train_loss": 1.0})
        assert bool(log.problem) == full[0]
    assert caplog.text.count("the log cannot be written ([Errno 122] Disk quota exceeded)") == 1
    assert caplog.text.count("the log is written again") == 1
    for name in ("metrics", "timings"):
        assert [r["step"] for r in records(workdir / f"{name}.jsonl")] == [5, 10, 15, 20, 25]
    full[0] = True
    log.train(30, {"train_loss": 1.0})
    with pytest.raises(UserError, match="Disk quota exceeded.*make room.* and start again"):
        log.close()


def test_an_evaluation_that_comes_again_is_cut_off(workdir):
    run(workdir, 0, 20).close()
    whole = (workdir / "metrics.jsonl").read_text()
    log = create(workdir, 20, evaluates_first=True)
    log.evaluation(20, "validation", {"loss": 1 / 60, "accuracy": 0.5})
    log.close()
    assert [line["step"] for line in records(workdir / "metrics.jsonl")] == [
        *(0, 5, 10, 15, 20, 20)
    ]
    assert (workdir / "metrics.jsonl").read_text().splitlines()[:-1] == whole.splitlines()[:-1]


def test_tensorboard_drops_what_the_resume_writes_again(workdir):
    run(workdir, 0, 30).close()
    before = set((workdir / "tensorboard").iterdir())
    run(workdir, 20, 40).close()
    (path,) = set((workdir / "tensorboard").iterdir()) - before
    events = events_of(path)
    assert [event.step for event in events if event.HasField("session_log")] == [21]
    scalars = {(value.tag, event.step) for event in events for value in event.summary.value}
    assert ("train/loss", 25) in scalars and ("validation/loss", 40) in scalars
    assert ("speed/images_per_second", 25) in scalars
    assert min(step for _, step in scalars) == 25


def events_of(path):
    """The events of a TensorBoard file."""
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, payload, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_tensorboard_groups_values_and_shows_the_configuration_and_images(workdir):
    config = {"train": {"epochs": 3, "frozen": ("stem",)}, "evaluate": {"split": "test"}}
    images = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    log = create(workdir)
    log.describe(ConfigDict(config), images)
    log.train(5, {"train_top5_accuracy": 0.5, "learning_rate": 0.1, "skipped_steps": 0})
    log.evaluation(20, "test", {"loss": 1.0})
    log.close()
    (path,) = (workdir / "tensorboard").iterdir()
    values = {value.tag: value for event in events_of(path) for value in event.summary.value}
    assert set(values) == {
        *("train/top5_accuracy", "train/learning_rate", "train/skipped_steps", "test/loss"),
        *("speed/images_per_second", "train/images"),
        *("_hparams_/experiment", "_hparams_/session_start_info"),
    }
    shown = np.asarray(Image.open(io.BytesIO(values["train/images"].image.encoded_image_string)))
    np.testing.assert_array_equal(shown[:2, ::3, 0], [range(8)] * 2)  # a row of eight
    assert shown.shape == (4, 24, 3) and shown[2, 0, 0] == 8
    content = values["_hparams_/session_start_info"].metadata.plugin_data.content
    start = plugin_hparams_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["train.epochs"].number_value == 3
    assert start.hparams["train.frozen"].string_value == "('stem',)"


def test_a_trace_arrives_whatever_its_folders_are_called(workdir, monkeypatch):
    for name in ("a[1]b", "run[2]"):
        (workdir / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(workdir / "a[1]b"))
    guarded = []
    with metric_log.trace(workdir / "run[2]" / "profile", lambda: guarded.append(1)):
        jnp.ones(8).block_until_ready()
    assert list(pathlib.Path(workdir / "run[2]" / "profile").rglob("*.xplane.pb")) and guarded


def test_a_disk_that_refuses_a_trace_ends_no_run(workdir, caplog):
    (workdir / "profile").write_text("a file in its place")
    with metric_log.trace(workdir / "profile", lambda: None):
        jnp.ones(8).block_until_ready()
    assert f"The profile cannot be written to {workdir / 'profile'}" in caplog.text
