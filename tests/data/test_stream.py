"""A stream's batch is a function of the step, whoever decodes it; every test image comes once."""

import concurrent.futures
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from densejax import data
from densejax.config import UserError
from densejax.data import crops, encoded, images, stream
from densejax.data.builders import DataError
from densejax.data.memory import mirrored, permutation
from densejax.runs import interrupt
from densejax.training import loop, parallel
from tests import photos, small

BATCH = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of 28 training and 10 test images."""
    path = tmp_path_factory.mktemp("photos")
    photos.make(path)
    return path


def config(root, **changes):
    defaults = {
        "data__name": "photos",
        "data__storage": "stream",
        "data__manual_dir": str(root),
        "data__normalization": "scale",
        "data__image_size": 32,
        "augmentation__shift": 0,
        "evaluate__resize_size": 40,
        "evaluate__batch_size": BATCH,
        "train__batch_size": BATCH,
    }
    return small.tiny(**defaults | changes)


def create(root, **changes):
    mesh = parallel.mesh()
    found = config(root, **changes)
    return data.create(found, parallel.replicated(mesh), parallel.split(mesh))


def arrays(batch):
    return {key: np.asarray(value) for key, value in batch.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def batches(streams, steps):
    try:
        return [arrays(streams.train.batch(step)) for step in steps]
    finally:
        streams.close()


@pytest.fixture(scope="module")
def reference(root):
    """Seven batches, more than two epochs, decoded in this process."""
    return batches(create(root), range(7))


def test_a_batch_is_the_crops_of_the_epochs_permutation(root, reference):
    splits = encoded.open_splits("photos", "", str(root), 0.2)[1]
    for step, batch in enumerate(reference):
        epoch, index = divmod(step, 28 // BATCH)
        order = permutation(0, epoch, 28)[index * BATCH : (index + 1) * BATCH]
        assert batch["image"].shape == (BATCH, 32, 32, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].tolist() == [splits["train"][i][1] for i in order.tolist()]
        for row, example in enumerate(order.tolist()):
            # The counter's second word is the place in the epoch, its third sets crops apart.
            counter = [0, index * BATCH + row, 1, 0]
            bits = np.random.Philox(key=[0, epoch], counter=counter)
            crop = crops.training_crop(splits["train"][example][0], 32, bits, min_area=0.08)
            np.testing.assert_array_equal(batch["image"][row], crop)


def test_a_stream_says_which_images_are_mirrored(root, reference):
    found = batches(create(root, augmentation__alternate_flip=True), range(6))
    for step, batch in enumerate(found):
        epoch, index = divmod(step, 3)
        order = permutation(0, epoch, 28)[index * BATCH : (index + 1) * BATCH]
        np.testing.assert_array_equal(batch.pop("mirrored"), mirrored(0, epoch, 28)[order])
        assert_equal(batch, reference[step])


def test_workers_change_nothing(root, reference):
    found = batches(create(root, data__workers=2), range(4))
    for first, second in zip(found, reference[:4], strict=True):
        assert_equal(first, second)


def test_a_stream_goes_on_at_any_step(root, reference):
    steps = [3, 4, 0, 6, 6, 1]
    for step, found in zip(steps, batches(create(root), steps), strict=True):
        assert_equal(found, reference[step])


def test_seeds_and_epochs_differ(root, reference):
    other = batches(create(root, seed=1), [0])[0]
    assert (other["image"] != reference[0]["image"]).any((1, 2, 3)).all()
    # The same file in two epochs is cropped anew.
    where = {}
    for epoch in (0, 1):
        order = permutation(0, epoch, 28)[: 3 * BATCH]
        crops = np.concatenate([batch["image"] for batch in reference[3 * epoch : 3 * epoch + 3]])
        for example, crop in zip(order.tolist(), crops, strict=True):
            where.setdefault(example, []).append(crop.tobytes())
    twice = [crops for crops in where.values() if len(crops) == 2]
    assert len(twice) > 15 and all(first != second for first, second in twice)


def test_batches_lie_on_the_devices_as_those_from_memory(root):
    streams, split = create(root), parallel.split(parallel.mesh())
    for batch in (streams.train.batch(0), next(streams.evaluation["test"].evaluation())):
        for array in batch.values():
            assert array.sharding.is_equivalent_to(split, array.ndim)
            assert {s.data.shape[0] for s in array.addressable_shards} == {BATCH // 4}
    streams.close()


class Alternating:
    """A sharding of two processes whose devices alternate, each with two rows."""

    def __init__(self, process):
        self.process = process

    def addressable_devices_indices_map(self, shape):
        return {row: (slice(row, row + 2),) for row in range(2 * self.process, shape[0], 4)}


def test_two_processes_read_the_rows_of_their_devices_and_no_others(root, reference):
    alone = create(root).train._source
    shares = [stream.rows_of_process(Alternating(process), BATCH) for process in (0, 1)]
    assert [rows.tolist() for rows in shares] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for step in range(7):
        merged = {key: np.empty_like(value) for key, value in reference[step].items()}
        for rows in shares:
            part = dataclasses.replace(alone, examples=Opened(alone.examples), rows=rows)
            assert (part.chunk_size, part.chunks_per_batch) == (4, 1)
            chunk = part[step]
            for key in merged:
                merged[key][rows] = chunk[key]
            assert part.examples.opened == len(rows)
        assert_equal(merged, reference[step])


class Opened:
    """Counts the images that are read."""

    def __init__(self, examples):
        self.examples, self.opened = examples, 0

    def __getitem__(self, index):
        self.opened += 1
        return self.examples[index]


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    import pathlib
    import numpy as np
    from tests.data import test_stream
    streams = test_stream.create(pathlib.Path(sys.argv[3]))
    for step in range(3):
        for key, array in streams.train.batch(step).items():
            for shard in array.addressable_shards:
                start = shard.index[0].start
                np.save(f"{sys.argv[4]}/{step}-{key}-{start}.npy", np.asarray(shard.data))
    streams.close()
    print(jax.process_count(), len(streams.train._source.rows))
"""


@pytest.mark.slow
def test_two_real_processes_hold_the_batch_of_one(root, reference, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = os.environ | small.ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    environment.pop("JAX_NUM_CPU_DEVICES")
    children = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(process), str(root), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    assert [child.communicate(timeout=600)[0] for child in children] == ["2 4\n"] * 2
    for step in range(3):
        for key, expected in reference[step].items():
            parts = [np.load(tmp_path / f"{step}-{key}-{start}.npy") for start in (0, 2, 4, 6)]
            np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_test_image_comes_once_and_in_order(root, workers):
    test = create(root, data__workers=workers).evaluation["test"]
    examples = encoded.open_splits("photos", "", str(root), 0.2)[1]["test"]
    found = [arrays(batch) for batch in test.evaluation()]
    assert test.size == 10 and [batch["mask"].sum() for batch in found] == [8, 2]
    whole = {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}
    assert whole["mask"].tolist() == [True] * 10 + [False] * 6
    for index in range(10):
        content, label, _ = examples[index]
        crop = images.evaluation_crop(content, 32, resize=40)
        np.testing.assert_array_equal(whole["image"][index], crop)
        assert whole["label"][index] == label


def test_ten_crops_are_taken_from_the_middle_square(root):
    test = create(root, evaluate__crop_size=32).evaluation["test"]
    batch = next(test.evaluation())
    examples = encoded.open_splits("photos", "", str(root), 0.2)[1]["test"]
    crop = images.evaluation_crop(examples[3][0], 40, resize=40)
    np.testing.assert_array_equal(batch["image"][3], crop)
    views = data.preparation(config(root, evaluate__crop_size=32)).views(batch["image"])
    assert views.shape == (10, BATCH, 32, 32, 3)
    np.testing.assert_allclose(views[4, 3], crop[4:36, 4:36] / 255, rtol=1e-5)


def test_held_out_images_do_not_train(root):
    streams = create(root, data__validation_size=5, evaluate__split="validation")
    kept = streams.evaluation["validation"]._source
    train = streams.train._source
    assert kept.examples is train.examples and len(kept.indices) == 5
    assert sorted([*kept.indices, *train.indices]) == list(range(28))
    expected = data.hold_out(28, 5, 0, None)
    np.testing.assert_array_equal(train.indices, expected[0])
    assert (streams.train.size, streams.train.steps_per_epoch) == (23, 2)


def test_test_images_are_opened_only_where_they_are_measured(root):
    streams = create(
        root,
        data__validation_size=5,
        evaluate__split="validation",
        evaluate__final_split="validation",
    )
    assert set(streams.evaluation) == {"validation"}


@pytest.fixture(params=["cut", "gone"])
def damaged(tmp_path, request):
    """The folder again, with one training image cut, or a link to nothing; its place in the set."""
    written = sorted(path for path in photos.make(tmp_path) if path.startswith("train"))
    content = (tmp_path / written[5]).read_bytes()
    (tmp_path / written[5]).unlink()
    if request.param == "cut":
        (tmp_path / written[5]).write_bytes(content[: len(content) // 2])
    else:
        (tmp_path / written[5]).symlink_to("gone")
    return tmp_path, 5, written[5]


@pytest.mark.parametrize(("damaged", "workers"), [("cut", 1), ("gone", 0)], indirect=["damaged"])
def test_an_image_that_cannot_be_read_is_named(damaged, workers):
    root, _, name = damaged
    problem = "(no image that can be read .*Premature|No such file)"
    with pytest.raises(DataError, match=f"{name}: {problem}") as caught:
        batches(create(root, data__workers=workers), range(4))
    remedy = "; replace or remove it, or set data.corrupt_images = 'skip'"
    assert "\n" not in str(caught.value) and remedy in str(caught.value)


def test_the_next_image_is_trained_on_instead_where_that_is_asked_for(damaged, reference, caplog):
    root, index, name = damaged
    streams = create(root, data__corrupt_images="skip")
    with caplog.at_level(logging.WARNING):
        found = batches(streams, range(7))
    assert name in caplog.text and "next one" in caplog.text
    replaced = 0
    for step, (batch, expected) in enumerate(zip(found, reference, strict=True)):
        epoch, start = step // 3, step % 3 * BATCH
        order = permutation(0, epoch, 28)
        for row in range(BATCH):
            if order[start + row] == index:
                replaced += 1
                following = streams.train._source.examples[int(order[(start + row + 1) % 28])]
                bits = np.random.Philox(key=[0, epoch], counter=[0, start + row, 1, 0])
                crop = crops.training_crop(following[0], 32, bits, min_area=0.08)
                np.testing.assert_array_equal(batch["image"][row], crop)
                assert batch["label"][row] == following[1]
            else:
                np.testing.assert_array_equal(batch["image"][row], expected["image"][row])
    assert replaced >= 1


def test_an_image_that_is_evaluated_is_never_skipped(root, tmp_path):
    photos.make(tmp_path)
    (tmp_path / "val/n02/03.JPEG").write_bytes(b"")
    streams = create(tmp_path, data__corrupt_images="skip")
    with pytest.raises(DataError, match="val/n02/03.JPEG: no image .*replace or remove it(?!,)"):
        list(streams.evaluation["test"].evaluation())


def test_a_set_of_damaged_images_is_no_endless_search(tmp_path):
    for path in photos.make(tmp_path, train=4):
        (tmp_path / path).write_bytes(b"damaged")
    with pytest.raises(DataError, match="none of the training images can be read"):
        batches(create(tmp_path, data__corrupt_images="skip"), [0])


def test_what_is_not_installed_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    message = r"needs grain: make imagenet, or pip install 'densejax-lab\[imagenet\]'$"
    with pytest.raises(UserError, match=message):
        create(root)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


KILLED = """
import multiprocessing, sys, time, pathlib
if __name__ == "__main__":
    from tests.data import test_stream
    streams = test_stream.create(pathlib.Path(sys.argv[1]), data__workers=1)
    streams.train.batch(0)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_workers(root, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | small.ENVIRONMENT | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(root)]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in child.stdout.readline().split()]
    assert len(workers) == 1 and alive(workers[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(workers[0], number)  # as a terminal or a scheduler sends to every process
    time.sleep(0.5)
    assert alive(workers[0])
    child.kill()
    child.wait()
    child.stdout.close()
    limit = time.monotonic() + 300
    while alive(workers[0]) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not alive(workers[0])


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_stream_with_a_line(root):
    streams = create(root, data__workers=1)
    try:
        streams.train.batch(0)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(DataError, match=f"data.workers = 1: .* {worker.pid} .exit code -9"):
            for step in range(1, 100):
                streams.train.batch(step)
    finally:
        streams.close()


@pytest.mark.slow
def test_a_signal_does_not_wait_for_a_worker_that_is_stopped(root, monkeypatch):
    monkeypatch.setattr(stream, "GRACE", 0.1)
    streams = create(root, data__workers=1)
    streams.train.batch(0)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    streams.stop_waiting_when(lambda: True)
    with pytest.raises(stream.BatchTimeout, match="data.workers = 1: no batch comes any more"):
        for step in range(1, 100):
            streams.train.batch(step)
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


def test_a_signal_does_not_wait_for_a_read_that_never_returns(root, monkeypatch):
    monkeypatch.setattr(stream, "GRACE", 0.1)
    monkeypatch.setattr(interrupt, "stuck", [])
    arrives, read = threading.Event(), encoded.Folder.__getitem__
    monkeypatch.setattr(encoded.Folder, "__getitem__", lambda *a: arrives.wait() and read(*a))
    streams = create(root)
    streams.stop_waiting_when(lambda: True)
    with pytest.raises(stream.BatchTimeout, match="no batch comes any more"):
        streams.train.batch(0)
    (thread,) = interrupt.stuck  # while it runs, the command ends without it
    assert thread.running()
    arrives.set()
    concurrent.futures.wait([thread], 300)
    assert not thread.running()


@pytest.mark.slow
def test_a_run_from_a_folder_to_its_result(root, tmp_path, capsys):
    changes = {"data__workers": 1, "train__epochs": 1, "augmentation__jitter": 0.4}
    (tmp_path / "card.py").write_text(
        "import pathlib\nfrom tests.data import test_stream\n\n\ndef get_config():\n"
        f"    return test_stream.config(pathlib.Path({str(root)!r}), **{changes!r})\n"
    )
    path = tmp_path / "run"
    command = [sys.executable, "-m", "densejax.main", f"--config={tmp_path / 'card.py'}"]
    environment = os.environ | small.ENVIRONMENT
    result = subprocess.run(
        [*command, f"--workdir={path}"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "leaked" not in result.stderr and "Traceback" not in result.stderr
    assert "on 10 images of the split 'val'\n" in result.stdout
    summary = json.loads((path / "summary.json").read_text())
    assert [summary[key] for key in ("test_examples", "steps", "test_split")] == [10, 3, "val"]
    assert loop.run(config(root, **changes | {"data__workers": 0}), str(path), "eval") == 0
    assert json.loads(capsys.readouterr().out)["test_loss"] == summary["test_loss"]
