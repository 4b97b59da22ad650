"""Numbers of an assessment against scikit-learn, a loop and closed forms; logits on any devices."""

import jax
import numpy as np
import pytest
from sklearn import metrics

from densejax.analysis import assessment
from densejax.training.step import evaluated_logits
from tests import small

GENERATOR = np.random.default_rng(0)


@pytest.fixture
def drawn():
    """Logits [images, classes] and labels: no image is of class 5, none is taken for class 6."""
    labels = GENERATOR.integers(0, 7, 300).astype(np.int32)
    labels[labels == 5] = 6
    logits = GENERATOR.normal(0, 2, (300, 7)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    logits[:, 6] = -9
    return logits, labels


def test_classes_are_as_scikit_learn_counts_them(drawn):
    logits, labels = drawn
    found = assessment.assess(logits, labels, tuple("abcdefg"))
    predicted = logits.argmax(1)
    expected = metrics.confusion_matrix(labels, predicted, labels=range(7))
    np.testing.assert_array_equal(found["confusion"], expected)
    assert found["accuracy"] == metrics.accuracy_score(labels, predicted)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=np.nan
    )
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        got = np.array(found["classes"][name], float)
        np.testing.assert_allclose(got, values, rtol=1e-12)
    assert found["classes"]["recall"][5] is None and found["classes"]["precision"][6] is None
    assert found["classes"]["recall"][6] == 0


def test_calibration_error_as_a_loop_over_bins_has_it(drawn):
    logits, labels = drawn
    probabilities = np.exp(logits.astype(float))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidences, correct = probabilities.max(1), probabilities.argmax(1) == labels
    error, bins = assessment.calibration(confidences, correct)
    expected = 0.0
    for number in range(15):
        inside = [i for i in range(300) if number / 15 < confidences[i] <= (number + 1) / 15]
        assert bins["images"][number] == len(inside)
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            assert bins["accuracy"][number] == pytest.approx(accuracy)
            assert bins["confidence"][number] == pytest.approx(confidence)
            expected += len(inside) / 300 * abs(accuracy - confidence)
    assert error == pytest.approx(expected) and error > 0.1
    assert np.isnan(bins["accuracy"][bins["images"] == 0]).all()
    assert assessment.assess(logits, labels, tuple("abcdefg"))["calibration_error"] == error


def test_a_bin_has_its_upper_edge():
    # Half as confident as right in the second bin, half of whose edge is in it; 1 is in the last.
    error, bins = assessment.calibration(np.array([0.5, 0.5, 1.0]), np.array([1, 0, 1]), bins=2)
    assert (error, bins["images"].tolist()) == (0, [2, 1])
    error, _ = assessment.calibration(np.array([0.9, 0.9]), np.array([1, 0]))
    assert error == pytest.approx(0.4)


def test_a_tie_counts_against_the_label():
    logits = np.array([[1, 1, 0], [1, 1, 0], [0, 2, 1], [0, 0, 0]], np.float32)
    predicted = assessment.winners(logits, np.array([0, 1, 1, 2]))
    assert predicted.tolist() == [1, 0, 1, 0]


def test_mistakes_come_with_the_most_confident_first(drawn):
    logits, labels = drawn
    found = assessment.assess(logits, labels, tuple("abcdefg"))["mistakes"]
    places = [one["image"] for one in found]
    assert len(set(places)) == assessment.SHOWN < (logits.argmax(1) != labels).sum()
    for one in found:
        row = logits[one["image"]].astype(float)
        assert one["class"] == "abcdefg"[labels[one["image"]]]
        assert one["predicted"] == "abcdefg"[row.argmax()] != one["class"]
        assert one["probability"] == pytest.approx(np.exp(row.max()) / np.exp(row).sum())
    listed = [one["probability"] for one in found]
    assert listed == sorted(listed, reverse=True)
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    shares = np.exp(logits).max(1) / np.exp(logits).sum(1)
    assert places[0] == wrong[shares[wrong].argmax()]


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_logits_are_of_every_image_in_order_on_any_devices(mode):
    built = small.build(small.tiny(parallel__mode=mode, train__average_decay=0.5))
    state = built.init()
    state = state.replace(average=jax.tree.map(lambda x: x + 0.1, state.average))
    logits, labels = assessment.predictions(built, state, "test")
    images, expected = (
        np.asarray(built.data.evaluation["test"]._arrays[name]) for name in ("image", "label")
    )
    np.testing.assert_array_equal(labels, expected)
    task = built.task
    alone = jax.jit(evaluated_logits, static_argnums=(0, 1))
    whole = alone(task.model, task.preparation, jax.device_get(state.average), images)
    assert logits.shape == (360, 10) and np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)
    measured = built.evaluate(state, "test")["accuracy"]
    assert assessment.assess(logits, labels, tuple("0123456789"))["accuracy"] == measured
