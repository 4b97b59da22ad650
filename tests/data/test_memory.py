"""Order and coverage: every epoch a permutation, every evaluation each example once."""

import jax
import numpy as np
import pytest

from densejax.data.memory import MemorySet, permutation
from densejax.data.memory import mirrored as mirrored_of
from densejax.training import parallel

SIZE = 22


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


@pytest.fixture(params=[1, 4], ids=["1 device", "4 devices"])
def mesh(request):
    return mesh_of(request.param)


def create(mesh, size=SIZE, batch_size=8, seed=0, alternates=False):
    """Example n has the label n and n in every pixel."""
    labels = np.arange(size, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (size, 2, 3, 1))
    split, whole = parallel.split(mesh), parallel.replicated(mesh)
    return MemorySet(images, labels, batch_size, seed, whole, split, alternates)


def labels(batch):
    """The labels of a batch, after a check that images are whole and stand beside their label."""
    image, label = np.asarray(batch["image"]), np.asarray(batch["label"])
    assert (image.dtype, label.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(image, np.broadcast_to(label[:, None, None, None], image.shape))
    assert image.shape[1:] == (2, 3, 1)
    return label.tolist()


def test_permutation_is_philox():
    # Philox4x64-10 with key (seed, epoch) and counters from 1, its output sorted.
    found = permutation(seed=0, epoch=0, size=10)
    assert found.dtype == np.int32
    assert found.tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(seed=1, epoch=2, size=10).tolist() == [4, 2, 0, 6, 1, 5, 9, 8, 7, 3]


def test_permutations_differ_by_seed_and_epoch():
    orders = [permutation(seed, epoch, 50) for seed in range(5) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 25
    permutation(2**32 - 1, 10**6, 3)  # the largest seed


def test_every_epoch_is_a_permutation_without_the_remainder(mesh):
    data = create(mesh)
    assert (data.size, data.steps_per_epoch) == (22, 2)
    epochs = []
    for epoch in range(3):
        order = labels(data.batch(2 * epoch)) + labels(data.batch(2 * epoch + 1))
        assert len(order) == len(set(order)) == 16 and set(order) <= set(range(SIZE))
        assert order == permutation(0, epoch, SIZE)[:16].tolist()
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_every_example_is_seen_though_remainders_drop(mesh):
    data = create(mesh)
    assert {label for step in range(20) for label in labels(data.batch(step))} == set(range(SIZE))


def test_a_batch_is_a_function_of_the_step(mesh):
    data = create(mesh)
    steps = [5, 0, 3, 3, 1, 4, 2, 0]
    found = {step: labels(data.batch(step)) for step in steps}
    fresh = create(mesh)
    assert found == {step: labels(fresh.batch(step)) for step in range(6)}
    assert labels(create(mesh, seed=1).batch(0)) != found[0]


def test_each_example_is_mirrored_in_every_other_epoch(mesh):
    data = create(mesh, alternates=True)
    seen = {}
    for step in range(40):
        batch = data.batch(step)
        mirrored = np.asarray(batch["mirrored"])
        assert mirrored.dtype == bool
        for label, value in zip(labels(batch), mirrored.tolist(), strict=True):
            seen.setdefault(label, set()).add((value + step // 2) % 2)  # two steps an epoch
    assert all(len(phases) == 1 for phases in seen.values())
    assert {phase for phases in seen.values() for phase in phases} == {0, 1}
    share = mirrored_of(0, 0, 10_000).mean()
    assert abs(share - 0.5) < 0.025
    np.testing.assert_array_equal(mirrored_of(0, 1, 99), ~mirrored_of(0, 0, 99))
    assert (mirrored_of(1, 0, 99) != mirrored_of(0, 0, 99)).any()


@pytest.mark.parametrize("size", [22, 24, 5, 8, 1])
def test_evaluation_yields_each_example_once(mesh, size):
    seen = []
    for batch in create(mesh, size=size).evaluation():
        mask = np.asarray(batch["mask"])
        assert mask.shape == (8,) and mask.dtype == bool
        seen += np.asarray(labels(batch))[mask].tolist()
    assert seen == list(range(size))


def test_evaluation_starts_again(mesh):
    data = create(mesh)
    next(data.evaluation())
    assert [np.asarray(b["mask"]).sum() for b in data.evaluation()] == [8, 8, 6]


def test_each_device_holds_its_share(mesh):
    data = create(mesh)
    for batch in (data.batch(0), next(data.evaluation())):
        for array in batch.values():
            assert array.sharding.is_equivalent_to(parallel.split(mesh), array.ndim)
            assert {s.data.shape[0] for s in array.addressable_shards} == {8 // mesh.size}
