"""The average of the variables against its formula, and through a whole run."""

import jax
import jax.numpy as jnp
import numpy as np

from densejax.training import experiment
from densejax.training.step import averaged
from tests import small
from tests.programs import shared_programs  # noqa: F401


def test_the_average_follows_its_formula():
    values = np.random.default_rng(0).normal(size=(30, 3))
    found, expected = {"a": jnp.asarray(values[0], jnp.float32)}, values[0]
    for done, value in enumerate(values[1:]):
        decay = min(0.9, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * value
        new = {"a": jnp.asarray(value, jnp.float32)}
        found = averaged(found, new, 0.9, jnp.asarray(done, jnp.int32))
    np.testing.assert_allclose(found["a"], expected, rtol=1e-5)


def test_a_step_averages_what_it_makes_and_evaluates_the_average():
    built = small.build(small.tiny(train__average_decay=0.9))
    state = built.start()
    small.assert_same_bits(state.average["params"], state.params)
    before, take_step = state, small.stepper(built)
    for number in range(2):
        after, _ = take_step(before, built.data.train.batch(number))
        share = 1 - (1 + number) / (10 + number)
        variables = {"params": after.params, "batch_stats": after.batch_stats}
        expected = jax.tree.map(
            lambda old, new, share=share: old + share * (new - old),
            jax.device_get(before.average),
            jax.device_get(variables),
        )
        assert small.distance(after.average, expected) < 1e-6
        before = after
    average = after.replace(average={}, **after.average)
    assert built.evaluate(after, "test") == built.evaluate(average, "test")
    assert built.evaluate(after, "test") != built.evaluate(after.replace(average={}), "test")
    broken = after.replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, after.params))
    skipped, _ = take_step(broken, built.data.train.batch(2))
    small.assert_same_bits(skipped.average, after.average)


def test_a_run_from_weights_averages_from_them(tmp_path):
    config = small.tiny(train__weights=str(small.trained()), train__average_decay=0.9)
    built = experiment.build(config)
    state = built.start()
    small.assert_same_bits(state.average, built.weights)
    small.assert_same_bits(state.average["params"], state.params)
