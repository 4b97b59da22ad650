"""The dense block in somebody else's network: the U-Net of docs/extending.md."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import models
from densejax.config import UserError
from densejax.models import DenseBlock
from tests import small
from tests.models.oracle import random_variables
from tests.models.test_in_place import compiled, on_a_cpu  # noqa: F401

PAGE = pathlib.Path(models.__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines."""
    section = PAGE.read_text().partition("## Use the dense block in your own network\n")[2]
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    assert code.count("\n") <= 40
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", compiled)  # tests/test_docs.py runs it without
        exec(compile(code, PAGE.name, "exec"), names)
    return names


def arguments(page):
    variables = page["variables"]
    return variables["params"], variables["batch_stats"], page["images"], page["labels"]


@pytest.mark.parametrize(
    "block",
    [nn.remat(DenseBlock, static_argnums=(2,)), functools.partial(DenseBlock, block="concat")],
    ids=["remat", "concat"],
)
def test_other_forms_give_the_same_loss_and_gradients(page, monkeypatch, block):
    monkeypatch.setitem(page, "DenseBlock", block)
    found = compiled(jax.value_and_grad(page["loss"], has_aux=True))(*arguments(page))
    expected = (page["value"], page["statistics"]), page["gradients"]
    assert small.distance(found, expected) < 1e-4


def test_two_steps_make_the_loss_fall(page):
    params, statistics, *batch = arguments(page)
    losses = []
    for _ in range(3):
        (value, statistics), gradients = page["step"](params, statistics, *batch)
        losses.append(float(value))
        params = jax.tree.map(lambda leaf, gradient: leaf - 0.3 * gradient, params, gradients)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.slow
def test_vmap_trains_two_networks_at_once(page):
    params, statistics, *batch = arguments(page)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), params)
    step = jax.value_and_grad(page["loss"], has_aux=True)
    found = compiled(jax.vmap(step, (0, None, None, None)))(both, statistics, *batch)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in (0, 1))
    expected = (page["value"], page["statistics"]), page["gradients"]
    assert small.distance(first, expected) < 1e-4 < small.distance(second, expected)
    seeds = jax.random.split(jax.random.key(0), 2)
    drawn = jax.eval_shape(jax.vmap(page["network"].init, (0, None)), seeds, page["images"])
    assert jax.tree.map(jnp.shape, drawn["params"]) == jax.tree.map(jnp.shape, both)


def test_intermediates_are_the_features(page):
    def intermediates(variables, images):
        settings = {"capture_intermediates": True, "mutable": ["batch_stats", "intermediates"]}
        return page["network"].apply(variables, images, True, **settings)[1]["intermediates"]

    captured = jax.eval_shape(intermediates, page["variables"], page["images"])
    (features,) = captured["down1"]["__call__"]
    assert features.shape == (4, 16, 16, 8 + 2 * 4)


class InSetup(nn.Module):
    """A block that `setup` makes, and features that are sown."""

    def setup(self):
        self.block = DenseBlock(2, 3, dropout_rate=0.5, survival=(1.0, 0.5))

    def __call__(self, x, train):
        x = self.block(x, train)
        self.sow("intermediates", "features", x)
        return x.mean()


def test_a_block_of_setup_draws_from_the_stream_dropout():
    x = np.random.default_rng(0).normal(size=(4, 4, 4, 2)).astype(np.float32)
    network = InSetup()
    variables = random_variables(network, x, train=True)

    @compiled
    def features(key):
        rngs, mutable = {"dropout": key}, ["batch_stats", "intermediates"]
        _, state = network.apply(variables, x, True, rngs=rngs, mutable=mutable)
        return state["intermediates"]["features"][0]

    first, again, other = (features(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.shape == (4, 4, 4, 8)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"depth": 0}, "DenseBlock.depth = 0: must be at least 1"),
        ({"growth_rate": 0}, "growth_rate = 0: must be at least 1"),
        ({"recompute": "all"}, "recompute = 'all': allowed are none, norm, layer"),
        ({"block": "fast"}, "block = 'fast': allowed are in_place, concat"),
        ({"survival": (1.0,)}, "survival = (1.0,): give one number, or one for each of the 2"),
        ({"survival": 0.0}, "survival = 0.0: must be in (0, 1]"),
        ({"survival": (1.0, 2.0)}, "survival = (1.0, 2.0): must be in (0, 1]"),
        ({"bottleneck_width": 0}, "bottleneck_width = 0: must be at least 1"),
        ({"dropout_rate": 1.0}, "dropout_rate = 1.0: must be in [0, 1)"),
        ({"batch_norm_epsilon": 0.0}, "batch_norm_epsilon = 0.0: must be above 0"),
    ],
)
def test_fields_that_describe_no_block_are_said_in_one_line(fields, said):
    block = DenseBlock(**{"depth": 2, "growth_rate": 4} | fields)
    with pytest.raises(UserError, match=re.escape(said)):
        block.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
