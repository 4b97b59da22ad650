"""Checkpoints come back bitwise or not at all."""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import tempfile
import threading
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from densejax.config import UserError
from densejax.runs import checkpoint, files, hosts
from densejax.runs.checkpoint import MANIFEST, CheckpointError, Checkpoints

# tensorstore calls back into an event loop that orbax has closed after the first bad leaf
noisy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    """The fields of a training state, in small."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def make_state(seed=0, width=24, dtype=jnp.float32):
    """A replicated state with one sharded leaf, several dtypes, a denormal and a -0."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    key = jax.random.key(seed)
    params = {
        "conv1": {"kernel": jax.random.normal(key, (3, 3, 3, width), dtype)},
        "block1": {"layer1": {"scale": jax.random.normal(key, (width,), jnp.bfloat16)}},
    }
    payload = jnp.asarray(np.array([0x00000123, 0x80000000], np.uint32).view(np.float32))
    state = State(
        step=jnp.asarray(seed, jnp.int32),
        params=params,
        batch_stats={"mean": payload, "seen": jnp.arange(8, dtype=jnp.uint8)},
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
    )
    state = jax.device_put(state, NamedSharding(mesh, P()))
    sharded = jax.device_put(state.batch_stats["seen"], NamedSharding(mesh, P("data")))
    return state.replace(batch_stats=state.batch_stats | {"seen": sharded})


def abstract(state):
    """The state's shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def assert_bitwise(actual, expected):
    """Same structure, dtypes, shardings and bytes."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, steps, **options):
    """A directory with one checkpoint of `make_state(step)` per step."""
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), {"validation/loss": 1.0 / step})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Checkpoints 10 and 20, for tests that only read or that copy them."""
    return saved(tmp_path_factory.mktemp("two_steps") / "checkpoints", [10, 20])


def restored_latest(directory, **options):
    """What a fresh start restores."""
    checkpoints = Checkpoints(directory, **options)
    try:
        return checkpoints.restore_latest(abstract(make_state()))
    finally:
        checkpoints.close()


def test_bitwise_and_on_the_given_shardings(two_steps):
    checkpoints = Checkpoints(two_steps)
    assert checkpoints.steps() == [10, 20] and checkpoints.latest_step() == 20
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(20))
    assert_bitwise(checkpoints.restore_step(10, abstract(make_state())), make_state(10))
    shapes = abstract(make_state())
    seen, mean = shapes.batch_stats["seen"], shapes.batch_stats["mean"]
    replicated = jax.ShapeDtypeStruct(seen.shape, seen.dtype, sharding=mean.sharding)
    moved = shapes.replace(batch_stats=shapes.batch_stats | {"seen": replicated})
    assert checkpoints.restore_latest(moved).batch_stats["seen"].sharding == mean.sharding
    checkpoints.close()


def test_no_checkpoint_is_none_and_opening_writes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest(abstract(make_state())) is None
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None
    with pytest.raises(CheckpointError, match="No checkpoint in .* has a"):
        checkpoints.restore_best(abstract(make_state()))
    with pytest.raises(CheckpointError, match="No checkpoint 5 in"):
        checkpoints.restore_step(5, abstract(make_state()))
    checkpoints.close()
    assert not (tmp_path / "none").exists()


def test_every_process_takes_the_steps_that_process_0_sees(two_steps, monkeypatch):
    """A network disk may show two hosts different steps: here as process 1, and 0's are told."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(files, "VISIBILITY_TIMEOUT", 0.0)
    monkeypatch.setattr(checkpoint.ocp, "AsyncCheckpointer", lambda *_, **__: None)
    monkeypatch.setattr(hosts, "gather", lambda mine: [told, mine])
    monkeypatch.setattr(hosts, "all_true", bool)

    def opened(*seen):
        told[:] = [[step, {"metrics": {"e": 0.5}, "problem": problem}] for step, problem in seen]
        checkpoints = Checkpoints(two_steps)
        assert all(checkpoints.metrics(step) == {"e": 0.5} for step, _ in seen)  # not its own
        return checkpoints.steps()

    assert opened((10, "")) == [10] and opened() == []
    assert opened((10, ""), (20, ""), (30, "damaged")) == [10, 20, 30]  # as 0 sees it
    with pytest.raises(CheckpointError, match=r"process 1 does not see the steps \[30\]"):
        opened((10, ""), (30, ""))


def test_buffers_may_be_donated_once_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(1, width=4096)
    destroy = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    checkpoints.save(1, state, {})
    jax.block_until_ready(destroy(state))
    checkpoints.wait()
    expected = make_state(1, width=4096)
    assert_bitwise(checkpoints.restore_latest(abstract(expected)), expected)
    checkpoints.close()


def test_best_survives_restarts_and_is_not_a_nan(tmp_path):
    losses = {1: float("nan"), 2: 0.1, 3: 0.9, 4: 0.4, 5: 0.1, 6: 0.5, 7: 0.6}
    for step, loss in losses.items():  # every step is a restart
        checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best="loss")
        checkpoints.save(step, make_state(step), {"loss": loss} if step != 6 else {})
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_latest=2, keep_best="loss")
    assert checkpoints.steps() == [2, 6, 7] and checkpoints.best_step() == 2
    assert_bitwise(checkpoints.restore_best(abstract(make_state())), make_state(2))
    checkpoints.close()


def test_saving_a_step_again_changes_nothing_and_an_older_one_is_refused(tmp_path):
    saved(tmp_path, [3])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(9), {})
    with pytest.raises(CheckpointError, match="step=2: delete the newer .3. in"):
        checkpoints.save(2, make_state(2), {})
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(3))
    checkpoints.close()


@noisy
def test_flipped_bits_are_never_silently_wrong(two_steps, tmp_path):
    random_numbers = random.Random(0)
    paths = sorted(path for path in (two_steps / "20").rglob("*") if path.is_file())
    pristine = {10: make_state(10), 20: make_state(20)}
    outcome = []
    for attempt in range(40):
        directory = tmp_path / str(attempt)
        shutil.copytree(two_steps, directory)
        source = paths[attempt % len(paths)]  # every kind of file
        if attempt % 2:  # half of them in proportion to the sizes: mostly array data
            source = random_numbers.choices(paths, [p.stat().st_size for p in paths])[0]
        target = directory / source.relative_to(two_steps)
        content = bytearray(target.read_bytes())
        if not content:
            continue
        content[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
        target.write_bytes(content)
        state = restored_latest(directory, keep_best="validation/loss")
        assert_bitwise(state, pristine[int(state.step)])
        outcome.append(int(state.step))
        shutil.rmtree(directory)
    assert 10 in outcome  # else no flip hit anything that matters


def truncate(step):
    for path in (path for path in step.rglob("*") if path.parent.name == "d"):
        path.write_bytes(path.read_bytes()[:100])


def take_another_manifest(step):
    manifest = (step / MANIFEST).read_text()
    shutil.rmtree(step)
    shutil.copytree(step.parent / "10", step)
    (step / MANIFEST).write_text(manifest)


def change_manifest(step):
    """It is still good JSON, and the state is whole."""
    text = (step / MANIFEST).read_text()
    (step / MANIFEST).write_text(text.replace('"validation/loss": 0.05', '"validation/loss": 0.04'))


HARMS = {
    "truncated": truncate,
    "empty file": lambda step: (step / "_METADATA").write_bytes(b""),
    "no data": lambda step: shutil.rmtree(step / "d"),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "of another step": take_another_manifest,
    "another manifest": change_manifest,
    "no manifest": lambda step: (step / MANIFEST).unlink(),
}


@noisy
@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_half_written_step_is_named_passed_over_and_replaced(two_steps, tmp_path, harm, caplog):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    step = directory / "20"
    harm(step)
    checkpoints = Checkpoints(directory)
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(10))
    assert f"{step} is damaged" in caplog.text
    assert checkpoints.latest_step() == 10 and step.exists()  # a reader deletes nothing
    checkpoints.save(20, make_state(20), {})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20] and checkpoints.latest_step() == 20
    checkpoints.close()
    assert_bitwise(restored_latest(directory), make_state(20))


@noisy
def test_what_replaces_a_damaged_step_is_known_and_may_be_the_best(tmp_path, monkeypatch):
    """Steps 2 and 3 are damaged: 2 is saved again, and its first attempt finds a full disk."""
    checkpoints = Checkpoints(tmp_path, keep_latest=3, keep_best="loss")
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.3)]:
        checkpoints.save(step, make_state(step), {"loss": loss})
    checkpoints.close()
    for step in "23":
        (tmp_path / step / MANIFEST).write_text("")
    checkpoints = Checkpoints(tmp_path, keep_best="loss")
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(1))
    assert checkpoints.damaged_steps == [2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", lambda *_: (1 / 0))
        checkpoints.save(2, make_state(2), {"loss": 0.1})
        with pytest.raises(CheckpointError, match="Step 2 could not be saved in .*division by"):
            checkpoints.wait()
        assert checkpoints.steps() == [1] and checkpoints.metrics(2) == {}
        checkpoints.set_metrics(2, {"loss": 0.1})  # of a step that is not there
        assert checkpoints.metrics(2) == {}
    for step in 2, 3, 4, 5:
        checkpoints.save(step, make_state(step), {"loss": 0.1 * step / 2})
    checkpoints.wait()
    on_disk = sorted(int(path.name) for path in tmp_path.iterdir())
    assert checkpoints.steps() == on_disk == [2, 4, 5] and checkpoints.best_step() == 2
    assert_bitwise(checkpoints.restore_best(abstract(make_state())), make_state(2))
    checkpoints.close()


def test_records_come_back_with_their_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {}, records={"bytes": 7, "names": ["a", "ü"]})
    assert checkpoints.records(1) == {"bytes": 7, "names": ["a", "ü"]}
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.records(1) == {"bytes": 7, "names": ["a", "ü"]}
    assert checkpoints.records(2) == checkpoints.records(3) == {}


def test_a_checkpoint_of_an_older_version_without_step_and_records_opens(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    manifest = json.loads((directory / "20" / MANIFEST).read_text())
    old = {name: manifest[name] for name in ("leaves", "metrics", "files")}
    (directory / "20" / MANIFEST).write_text(json.dumps(files.seal(old)))
    checkpoints = Checkpoints(directory)
    assert checkpoints.metrics(20) == {"validation/loss": 0.05} and checkpoints.records(20) == {}
    assert_bitwise(checkpoints.restore_step(20, abstract(make_state())), make_state(20))
    checkpoints.close()


def test_a_renamed_step_is_damaged(two_steps, tmp_path, caplog):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    (directory / "20").rename(directory / "30")
    assert_bitwise(restored_latest(directory), make_state(10))
    assert "30 is damaged (MANIFEST: ValueError: it is of step 20)" in caplog.text


class Lost(UserError):
    """What a guard raises."""


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_who_may_no_longer_write_changes_nothing_and_ends(tmp_path, allowed):
    """The guard refuses at the start of a save, before its commit, before the next deletion."""
    saved(tmp_path, [1])
    calls = []

    def guard():
        calls.append(1)
        if len(calls) > allowed:
            raise Lost("another process took over")

    checkpoints = Checkpoints(tmp_path, keep_latest=1, guard=guard)
    with pytest.raises(Lost, match="another process took over"):
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    checkpoints.close()  # neither saves, deletes nor hides the reason
    assert (tmp_path / "2").exists() == (allowed == 2) and (tmp_path / "1").exists()
    with pytest.raises(Lost):
        checkpoints.set_metrics(checkpoints.latest_step(), {"loss": 0.5})
    assert Checkpoints(tmp_path).metrics(1) == {"validation/loss": 1.0}


def test_a_save_that_another_process_cleared_away_is_not_called_a_failed_save(tmp_path):
    def guard():
        if lost:
            raise Lost("another process took over")

    lost = False
    checkpoints = Checkpoints(tmp_path, guard=guard)
    checkpoints.save(1, make_state(1), {})
    while not (tmp_path / "1" / MANIFEST).exists():
        time.sleep(0.01)
    shutil.rmtree(tmp_path / "1")
    lost = True
    with pytest.raises(Lost, match="another process took over"):
        checkpoints.wait()
    checkpoints.close()


@noisy
def test_all_damaged_is_an_error_that_keeps_the_files(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    for step in "10", "20":
        shutil.rmtree(directory / step / "d")
    with pytest.raises(CheckpointError, match="no checkpoint is intact: "):
        restored_latest(directory)
    assert (directory / "10").exists() and (directory / "20").exists()


def test_leftovers_of_a_killed_save_are_ignored_then_removed(two_steps, tmp_path):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    leftover = directory / "25.orbax-checkpoint-tmp"
    shutil.copytree(directory / "20", leftover)
    assert_bitwise(restored_latest(directory), make_state(20))
    assert leftover.exists()
    saved(directory, [30])
    assert not leftover.exists()


def test_another_model_is_a_readable_difference_not_damage(two_steps):
    checkpoints = Checkpoints(two_steps)
    model = make_state()
    for other, expected in [
        (
            make_state(width=8),
            r"params/conv1/kernel: float32\[3, 3, 3, 24\] in the checkpoint, "
            r"float32\[3, 3, 3, 8\] in the model",
        ),
        (make_state(dtype=jnp.float16), r"float32\[.*in the checkpoint, float16\["),
        (model.replace(batch_stats={}), r"batch_stats/mean: .* in the checkpoint, absent in the"),
        (
            model.replace(params=model.params | {"head": model.step}),
            r"params/head: absent in the checkpoint, int32\[\] in the model",
        ),
    ]:
        with pytest.raises(CheckpointError, match=expected):
            checkpoints.restore_latest(abstract(other))
    assert checkpoints.steps() == [10, 20]
    checkpoints.close()


@noisy
def test_a_full_disk_is_reported_keeps_the_older_steps_and_the_next_save_tries_again(
    tmp_path, caplog
):
    saved(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a quota: the file ends there
    try:
        checkpoints.save(3, make_state(3, width=10_000), {})
        with pytest.raises(CheckpointError, match="Step 3 could not be saved in .*"):
            checkpoints.wait()
        checkpoints.save(4, make_state(4, width=10_000), {})  # raises nothing: the run goes on
    finally:
        checkpoints._settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Step 4 could not be saved" in caplog.text
    assert "The steps [1, 2] are there" in caplog.text
    assert checkpoints.steps() == [1, 2]
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(2))
    checkpoints.save(5, make_state(5), {})
    checkpoints.close()  # the last save went well
    assert_bitwise(restored_latest(tmp_path), make_state(5))
    assert not list(tmp_path.glob("*tmp*"))


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="Step 1 could not be saved in .*NotADirectory"):
        checkpoints.close()


def test_a_folder_that_cannot_be_made_leaves_no_thread(tmp_path, monkeypatch):
    """Nothing may wait for it: the process ends at once."""
    monkeypatch.setattr(Checkpoints, "_make_room", lambda _: None)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    before = {*threading.enumerate()}
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="Step 1 could not be saved in .*Not a directory"):
        checkpoints.close()
    left = {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
    assert left <= before  # asyncio's idle threads end when they are asked


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "a? b#50%41 ü日 {a} x~"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, name, relative):
    saved(tmp_path / "aXb", [7])  # not among the steps of "a*b"
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    if relative:
        monkeypatch.chdir(name)
    directory = "run" if relative else tmp_path / name / "run"
    saved(directory, [1, 2])
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [1, 2]
    assert_bitwise(checkpoints.restore_latest(abstract(make_state())), make_state(2))
    checkpoints.close()
    leftover = tmp_path / name / "run" / "3.orbax-checkpoint-tmp"
    leftover.mkdir()
    saved(directory, [3])
    assert not leftover.exists()


def test_what_cannot_be_read_is_refused_at_once_and_kept(two_steps, tmp_path, monkeypatch):
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    (tmp_path / "file").write_text("mine")
    for name in "gone", "file":
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            Checkpoints(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"back.slash.*choose a --workdir without"):
        Checkpoints(tmp_path / "back\\slash")


@pytest.mark.parametrize("part", ["", "20", f"20/{MANIFEST}", "20/_METADATA"])
def test_the_checkpoints_of_another_user_are_refused_and_kept(two_steps, part):
    """They are not damaged: passing them over would start from an older step and delete them."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder).chmod(0o755)
        directory = shutil.copytree(two_steps, pathlib.Path(folder) / "checkpoints")
        (directory / part).chmod(0)
        checkpoints = None
        user = os.geteuid()
        if user == 0:  # who may read all
            os.seteuid(65534)
        try:
            with pytest.raises(
                CheckpointError, match=r"cannot be read .*Permission denied.*; make"
            ):
                checkpoints = Checkpoints(directory)
                checkpoints.restore_latest(abstract(make_state()))
        finally:
            os.seteuid(user)
            (directory / part).chmod(0o755)
        assert checkpoints is None or checkpoints.steps() == [10, 20]


def test_too_little_memory_is_no_damage(two_steps, tmp_path, monkeypatch):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    checkpoints = Checkpoints(directory)

    def fail(*_, **__):
        raise MemoryError("12 GiB")

    monkeypatch.setattr(checkpoints._writer, "restore", fail)
    with pytest.raises(CheckpointError, match="/20 cannot be read .*12 GiB"):
        checkpoints.restore_latest(abstract(make_state()))
    assert checkpoints.steps() == [10, 20] and checkpoints.damaged_steps == []


def test_a_problem_of_the_caller_is_a_failed_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {}, problem="metrics.jsonl cannot be written")
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="Step 1 .* metrics.jsonl cannot be written"):
        checkpoints.wait()
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_slow_disk_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("densejax.runs.checkpoint.SLOW", 0.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.close()
    assert re.search(r"Waited \d+\.\d s for the save of step 1\.", caplog.text)


@noisy
def test_the_best_may_be_evaluated_late_and_damaged(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep_latest=3, keep_best="loss")
    checkpoints.save(1, make_state(1), {"loss": 0.5})
    checkpoints.save(2, make_state(2), {"loss": float("nan")})
    checkpoints.set_metrics(2, {"loss": 0.25})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep_best="loss")
    assert checkpoints.best_step() == 2
    assert_bitwise(checkpoints.restore_best(abstract(make_state())), make_state(2))
    (tmp_path / "2" / "_METADATA").unlink()
    assert_bitwise(checkpoints.restore_best(abstract(make_state())), make_state(1))
    assert "2 is damaged" in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(tmp_path, value):
    checkpoints, bad = Checkpoints(tmp_path), make_state(2)
    bad.params["block1"]["layer1"]["scale"] *= value
    with pytest.raises(CheckpointError, match="step=2: params/block1/layer1/scale is not finite"):
        checkpoints.save(2, bad, {})
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == []
