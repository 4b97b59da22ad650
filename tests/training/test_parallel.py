"""Every layout of devices computes the same training, and a batch must divide over them."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from densejax.config import UserError
from densejax.training import parallel
from tests import small
from tests.programs import shared_programs  # noqa: F401

# Rounding of three float32 steps, of an array's largest entry; a wrong layout is 1000 times off.
ROUNDING = 5e-6


@functools.cache
def built(devices, mode, *changes):
    """(experiment, its compiled step): what takes most of the time."""
    experiment = small.build(small.tiny(parallel__mode=mode, **dict(changes)), devices)
    return experiment, small.stepper(experiment)


@functools.cache
def trained(devices, mode, batch_norm="global", steps=3, **changes):
    """The state after a few steps with augmentation, dropout and label smoothing."""
    changes |= {"parallel__batch_norm": batch_norm}
    experiment, step = built(devices, mode, *changes.items())
    state = jax.device_get(built(1, "shard_map", ("parallel__batch_norm", "global"))[0].init())
    for index in range(steps):
        state, _ = step(state, experiment.data.train.batch(index))
    return jax.device_get(state)


def assert_rounded_alike(first, second):
    for part in ("params", "batch_stats", "metrics"):
        assert small.distance(getattr(first, part), getattr(second, part)) < ROUNDING
    assert int(first.step) == int(second.step) == 3


@pytest.mark.parametrize(("devices", "mode"), [(4, "shard_map"), (4, "pmap")])
def test_all_layouts_train_the_same_parameters(devices, mode):
    assert_rounded_alike(trained(devices, mode), trained(1, "shard_map"))


def test_statistics_of_each_replica_differ_from_global_ones_and_agree_between_modes():
    shard_map, pmap = (trained(4, mode, "replica") for mode in ("shard_map", "pmap"))
    assert_rounded_alike(shard_map, pmap)
    assert small.distance(shard_map.params, trained(1, "shard_map").params) > 1e-3


def test_micro_batches_are_the_same_examples_on_any_devices():
    layouts = (1, "shard_map"), (4, "pmap")  # four under shard_map: test_step.py, by hand
    one, four = (trained(*layout, train__accumulate_steps=4) for layout in layouts)
    assert_rounded_alike(one, four)
    assert int(one.metrics["count"]) == 3 * 256


@pytest.mark.slow
def test_groups_lie_between_all_devices_and_each_alone():
    one, two, four = (
        trained(4, "shard_map", "groups", 1, parallel__batch_norm_group_size=size)
        for size in (1, 2, 4)
    )
    # As all devices, reduced along two axes.
    small.assert_same_bits(four, trained(4, "shard_map", steps=1))
    # As each alone, with sums over one device.
    assert small.distance(one, trained(4, "shard_map", "replica", steps=1)) < 1e-6
    assert small.distance(two.batch_stats, one.batch_stats) > 1e-4
    assert small.distance(two.batch_stats, four.batch_stats) > 1e-4


def test_groups_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(UserError, match="group_size = 3: must divide the 4 devices"):
        parallel.mesh(3)


@pytest.mark.slow
def test_layouts_agree_to_the_last_digits_in_double_precision():
    first, states = None, []
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for devices, mode, block in (
            *((1, "shard_map", "concat"), (4, "shard_map", "in_place")),
            (4, "pmap", "in_place"),
        ):
            config = small.tiny(parallel__mode=mode, model__block=block, train__dtype="float64")
            experiment = small.build(config, devices)
            first = first or jax.device_get(experiment.init())
            step, state = small.stepper(experiment), first
            for index in range(3):
                state, _ = step(state, experiment.data.train.batch(index))
            states.append(state)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float64"}
        for state in states:
            assert small.distance(state.params, states[0].params) < 1e-12
            assert small.distance(state.batch_stats, states[0].batch_stats) < 1e-12
            assert small.distance(state.params, first.params) > 1e-3


@pytest.mark.parametrize(("devices", "total"), [(1, 28), (4, 1 + 50 + 900 + 13000)])
def test_the_batch_is_cut_in_order_and_results_are_whole(devices, total):
    mesh = parallel.mesh(devices=jax.devices()[:devices])
    assert mesh.size == devices

    def step(state, batch):
        index = jax.lax.axis_index(parallel.AXIS)
        assert batch.shape == (8 // devices,)  # one replica sees its share
        return jax.lax.psum(state + batch.sum() * 10**index, parallel.AXIS)

    batch = jax.device_put(np.arange(8, dtype=np.int32), parallel.split(mesh))
    for mode in ("shard_map", "pmap"):
        assert int(parallel.map_step(step, mesh, mode)(np.int32(0), batch)) == total


def test_a_donated_state_is_gone():
    mesh = parallel.mesh()
    state = jax.device_put(np.ones(8, np.float32), parallel.replicated(mesh))
    batch = jax.device_put(np.ones(4, np.float32), parallel.split(mesh))

    def step(state, batch):
        return state + jax.lax.psum(batch.sum(), parallel.AXIS)

    assert parallel.map_step(step, mesh, "shard_map", donate=False)(state, batch)[0] == 5
    assert not state.is_deleted()
    assert parallel.map_step(step, mesh, "shard_map", donate=True)(state, batch)[0] == 5
    assert state.is_deleted()


def test_a_batch_that_does_not_divide_names_the_next_that_does():
    parallel.check_batch_size("train.batch_size", 8, parallel.mesh())
    with pytest.raises(UserError, match="train.batch_size = 9: .* the 4 devices, such as 12"):
        parallel.check_batch_size("train.batch_size", 9, parallel.mesh())
    with pytest.raises(UserError, match="multiple of 8, .* train.accumulate_steps = 2, such as 16"):
        parallel.check_batch_size("train.batch_size", 12, parallel.mesh(), parts=2)


def test_the_compilation_cache_is_private_and_yields_to_the_environment(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        parallel.start()  # tests name a folder of their own
        assert not (tmp_path / ".cache").exists()
        assert jax.config.jax_compilation_cache_dir == before
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        parallel.start()
        folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o777)  # the programs in it are run: one that others could write is closed
        parallel.start()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert folder.parent == tmp_path / ".cache/densejax/compiled"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_processors_have_names_of_their_own(monkeypatch):
    names = {parallel.processor()}
    for part in ("0xd0c", "0xd49"):  # of ARM, whose lines have other names than those of x86
        text = f"processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: {part}\n\nprocessor\t: 1\n"
        monkeypatch.setattr(pathlib.Path, "exists", lambda path: True)
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path, text=text: text)
        names.add(parallel.processor())
    assert len(names) == 3


def test_a_home_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with pytest.raises(UserError, match="Not a directory.*set JAX_COMPILATION_CACHE_DIR"):
        parallel.start()
