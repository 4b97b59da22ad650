"""Every layout of devices computes the same training, and a batch must divide over them."""

import functools
import itertools
import pathlib

import jax
import numpy as np
import pytest

from densejax.config import UserError
from densejax.training import parallel
from tests import small

# Rounding of three float32 steps, of an array's largest entry; a wrong layout is 1000 times off.
ROUNDING = 5e-6
LAYOUTS = list(itertools.product((1, 4), ("shard_map", "pmap")))


@functools.cache
def first_state():
    """Drawn once: compiling the draws takes longer than the steps."""
    return jax.device_get(small.build(small.tiny(), 1).init())


def trained(devices, mode, batch_norm="global", steps=3):
    """The state after a few steps with augmentation, dropout and label smoothing."""
    config = small.tiny(parallel__mode=mode, parallel__batch_norm=batch_norm)
    experiment = small.build(config, devices)
    step, state = small.stepper(experiment), first_state()
    for index in range(steps):
        state, _ = step(state, experiment.data.train.batch(index))
    return jax.device_get(state)


@pytest.fixture(scope="module")
def reference():
    """The state of one device."""
    return trained(1, "shard_map")


@pytest.mark.parametrize(("devices", "mode"), LAYOUTS[1:])
def test_all_layouts_train_the_same_parameters(reference, devices, mode):
    state = trained(devices, mode)
    assert small.distance(state.params, reference.params) < ROUNDING
    assert small.distance(state.batch_stats, reference.batch_stats) < ROUNDING
    assert small.distance(state.metrics, reference.metrics) < ROUNDING
    assert int(state.step) == int(reference.step) == 3


def test_statistics_of_each_replica_differ_from_global_ones_and_agree_between_modes(reference):
    shard_map, pmap = (trained(4, mode, "replica") for mode in ("shard_map", "pmap"))
    assert small.distance(shard_map.params, pmap.params) < ROUNDING
    assert small.distance(shard_map.batch_stats, pmap.batch_stats) < ROUNDING
    assert small.distance(shard_map.params, reference.params) > 1e-3


def test_groups_lie_between_all_devices_and_each_alone(reference):
    def grouped(size):
        experiment = small.build(
            small.tiny(parallel__batch_norm="groups", parallel__batch_norm_group_size=size)
        )
        state, _ = small.stepper(experiment)(first_state(), experiment.data.train.batch(0))
        return jax.device_get(state)

    whole = trained(4, "shard_map", steps=1)
    small.assert_same_bits(grouped(4), whole)  # as all devices, reduced along two axes
    replica = trained(4, "shard_map", "replica", steps=1)
    assert small.distance(grouped(1), replica) < 1e-6  # as each alone, with sums over one device
    assert small.distance(grouped(2).batch_stats, grouped(1).batch_stats) > 1e-4
    assert small.distance(grouped(2).batch_stats, grouped(4).batch_stats) > 1e-4


def test_groups_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(UserError, match="group_size = 3: must divide the 4 devices"):
        parallel.mesh(3)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_micro_batches_are_the_same_examples_on_any_devices(mode):
    states = []
    for devices in (1, 4):
        config = small.tiny(train__accumulate_steps=4, parallel__mode=mode)
        experiment = small.build(config, devices)
        step, state = small.stepper(experiment), first_state()
        for index in range(3):
            state, _ = step(state, experiment.data.train.batch(index))
        states.append(jax.device_get(state))
    assert small.distance(*(state.params for state in states)) < ROUNDING
    assert small.distance(*(state.batch_stats for state in states)) < ROUNDING
    assert int(states[0].metrics["count"]) == int(states[1].metrics["count"]) == 3 * 256


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


def test_the_batch_is_cut_in_order_and_results_are_whole():
    mesh = parallel.mesh()
    assert mesh.size == 4

    def step(state, batch):
        index = jax.lax.axis_index(parallel.AXIS)
        assert batch.shape == (2,)  # one replica sees its share
        return jax.lax.psum(state + batch.sum() * 10**index, parallel.AXIS)

    batch = jax.device_put(np.arange(8, dtype=np.int32), parallel.split(mesh))
    for mode in ("shard_map", "pmap"):
        assert int(parallel.map_step(step, mesh, mode)(np.int32(0), batch)) == 1 + 50 + 900 + 13000


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


def test_a_home_that_cannot_be_written_is_one_line_or_no_obstacle(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    try:
        parallel.start()
    except UserError as error:
        assert "JAX_COMPILATION_CACHE_DIR" in str(error)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
