"""Losses against closed forms, and a loss of one's own under its name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from densejax.config import UserError
from densejax.data.augment import Preparation
from densejax.training import losses
from densejax.training.step import evaluated_logits


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_uniform_logits_cost_the_logarithm_of_the_classes(classes, smoothing):
    logits, labels = jnp.full((3, classes), 7.0), jnp.asarray([0, 1, 1])
    found = losses.cross_entropy(logits, labels, smoothing)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.log(classes), rtol=1e-6)


def test_cross_entropy_of_two_classes():
    # -log(1 / (1 + e^-2)) where right, 2 more where wrong.
    found = losses.cross_entropy(jnp.asarray([[2.0, 0.0], [2.0, 0.0]]), jnp.asarray([0, 1]))
    right = np.log1p(np.exp(-2.0))
    np.testing.assert_allclose(found, [right, right + 2], rtol=1e-6)


def test_smoothing_mixes_the_losses_of_all_classes():
    logits = generator().normal(size=(4, 7)).astype(np.float32)
    labels = np.asarray([0, 3, 6, 3], np.int32)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(0.9 * logs[np.arange(4), labels] + 0.1 * logs.mean(1))
    found = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_loss_is_finite_for_large_logits():
    found = losses.cross_entropy(jnp.asarray([[1e4, 0.0], [0.0, 1e4]]), jnp.asarray([0, 0]))
    np.testing.assert_allclose(found, [0.0, 1e4])


def test_probabilities_are_labels_too():
    logits = jnp.asarray(generator().normal(size=(4, 7)), jnp.float32)
    labels = np.asarray([0, 3, 6, 3], np.int32)
    for loss in losses.LOSSES.values():
        np.testing.assert_array_equal(loss(logits, np.eye(7)[labels]), loss(logits, labels))
        half = (np.eye(7)[labels] + np.eye(7)[labels[::-1]]) / 2  # both are linear in the target
        mean = (loss(logits, labels) + loss(logits, labels[::-1])) / 2
        np.testing.assert_allclose(loss(logits, half), mean, rtol=1e-5)


def test_binary_cross_entropy_sums_over_the_classes():
    logits = generator().normal(size=(4, 7))
    labels = np.asarray([0, 3, 6, 3], np.int32)
    target = np.where(np.eye(7)[labels] > 0, 0.9 + 0.1 / 7, 0.1 / 7)
    right = 1 / (1 + np.exp(-logits))
    expected = -(target * np.log(right) + (1 - target) * np.log(1 - right)).sum(1)
    found = losses.binary_cross_entropy(jnp.asarray(logits, jnp.float32), labels, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_balanced_losses_weigh_every_class_the_same(name):
    everyone = np.asarray([0, 0, 0, 0, 0, 0, 2, 2, 3], np.int32)  # class 1 has no example
    plain = losses.create(name, 0.1)
    balanced = losses.balanced(plain, lambda: everyone)
    logits = jnp.asarray(generator().normal(size=(9, 4)), jnp.float32)
    of_class = compute_class_weight("balanced", classes=np.asarray([0, 2, 3]), y=everyone)
    weights = np.asarray([of_class[0], 0.0, *of_class[1:]], np.float32)
    assert weights[everyone].mean() == pytest.approx(1)
    expected = weights[everyone] * plain(logits, everyone)
    np.testing.assert_allclose(balanced(logits, everyone), expected, rtol=1e-6)
    sums = [expected[everyone == label].sum() / plain(logits, everyone)[everyone == label].mean()
            for label in (0, 2, 3)]  # fmt: skip
    np.testing.assert_allclose(sums, 3, rtol=1e-5)
    mixed = (0.25 * np.eye(4)[everyone] + 0.75 * np.eye(4)[everyone[::-1]]).astype(np.float32)
    shares = 0.25 * weights[everyone] + 0.75 * weights[everyone[::-1]]
    found = balanced(logits, jnp.asarray(mixed))
    np.testing.assert_allclose(found, shares * plain(logits, mixed), rtol=1e-5)


def test_an_unknown_loss_is_refused_by_name():
    with pytest.raises(UserError, match="train.loss = 'hinge': allowed are cross_entropy, binary"):
        losses.create("hinge")


class Half(nn.Module):
    """A network whose logits are of half precision, as a stranger's may be."""

    @nn.compact
    def __call__(self, image, train=False, keys=None):
        return nn.Dense(3, dtype=jnp.bfloat16)(image.mean((1, 2))), {}


def test_what_is_evaluated_is_summed_in_float32():
    images = jnp.ones((2, 4, 4, 1), jnp.uint8)
    variables = Half().init(jax.random.key(0), images.astype(jnp.float32))
    logits = evaluated_logits(Half(), Preparation((0.0,), (1.0,)), variables, images)
    assert logits.dtype == jnp.float32
