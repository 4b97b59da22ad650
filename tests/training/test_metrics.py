"""Metrics against closed forms: the mean loss, top-5, ties and the mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from densejax.training import losses, metrics


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_ranks():
    # Logits fall with the class number: the label is the number of classes before it.
    logits = jnp.broadcast_to(-jnp.arange(10.0), (10, 10))
    labels = jnp.arange(10, dtype=jnp.int32)
    sums = metrics.sums(logits, labels, jnp.zeros(10), jnp.ones(10, bool))
    assert (sums["correct"], sums["correct_top5"], sums["count"]) == (1, 5, 10)
    assert sums["count"].dtype == jnp.int32


def test_a_tie_counts_against_the_label():
    # No order of classes decides, and a network that says nothing knows nothing.
    logits = jnp.zeros((6, 6))
    labels = jnp.arange(6, dtype=jnp.int32)
    sums = metrics.sums(logits, labels, jnp.zeros(6), jnp.ones(6, bool))
    assert sums["correct"] == sums["correct_top5"] == 0
    sums = metrics.sums(logits.at[:, 2].set(1), labels, jnp.zeros(6), jnp.ones(6, bool))
    assert (sums["correct"], sums["correct_top5"]) == (1, 1)


def test_logits_that_are_not_numbers_are_never_correct():
    logits, labels = jnp.full((4, 10), jnp.nan), jnp.arange(4, dtype=jnp.int32)
    sums = metrics.sums(logits, labels, jnp.zeros(4), jnp.ones(4, bool))
    assert sums["correct"] == sums["correct_top5"] == 0


@pytest.mark.parametrize("classes", [5, 6])
def test_top_five_needs_more_than_five_classes(classes):
    names = {"loss", "correct", "count"} | ({"correct_top5"} if classes > 5 else set())
    logits, labels = jnp.zeros((2, classes)), jnp.zeros(2, jnp.int32)
    sums = metrics.sums(logits, labels, jnp.zeros(2), jnp.ones(2, bool))
    assert set(sums) == set(metrics.zeros(classes)) == names
    dtypes = {name: value.dtype for name, value in sums.items()}
    assert dtypes == {name: value.dtype for name, value in metrics.zeros(classes).items()}
    assert ("top5_accuracy" in metrics.means(sums)) == (classes > 5)


def test_padding_counts_nothing_and_means_are_over_the_real_examples():
    random = generator(1)
    logits = random.normal(size=(12, 8)).astype(np.float32)
    labels = random.integers(8, size=12).astype(np.int32)
    mask = random.random(12) < 0.6
    of_each = np.asarray(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
    padded = [np.where(mask, of_each, value) for value in (np.nan, np.inf)]
    order = np.argsort(-logits, 1)
    found = metrics.means(metrics.sums(logits, labels, of_each, mask))
    assert found["accuracy"] == pytest.approx((order[:, 0] == labels)[mask].mean())
    top5 = (order[:, :5] == labels[:, None]).any(1)[mask].mean()
    assert found["top5_accuracy"] == pytest.approx(top5) and top5 < 1
    assert found["loss"] == pytest.approx(of_each[mask].mean(), rel=1e-6)
    for broken in padded:
        assert metrics.means(metrics.sums(logits, labels, broken, mask)) == found
    assert metrics.sums(logits, labels, of_each, mask)["count"] == mask.sum()
    parts = [
        metrics.sums(logits[p], labels[p], of_each[p], mask[p]) for p in np.split(np.arange(12), 3)
    ]
    added = {name: sum(part[name] for part in parts) for name in metrics.zeros(8)}
    assert metrics.means(added) == pytest.approx(found, rel=1e-6)
    assert all(type(value) is float for value in found.values())


def test_of_probabilities_the_most_probable_class_counts():
    random = generator()
    logits = jnp.asarray(random.normal(size=(40, 10)), jnp.float32)
    labels = np.asarray(random.dirichlet([1.0] * 10, 40), np.float32)
    found, expected = (
        metrics.sums(logits, of, jnp.zeros(40), jnp.ones(40, bool))
        for of in (jnp.asarray(labels), jnp.asarray(labels.argmax(1), jnp.int32))
    )
    assert found == expected and found["correct"] > 0
