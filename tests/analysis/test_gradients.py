"""Gradient norms at initialisation against a gradient worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from densejax import models
from densejax.analysis import gradients


def test_norms_from_the_image_to_the_classifier():
    fields = models.fields("densenet_40_12", depth=None, blocks=(2,), growth_rate=3)
    model = models.create(fields, 4)
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    labels = jnp.array([0, 1, 2, 3, 0, 1], jnp.int32)
    norms = gradients.kernel_norms(model, images, labels, seed=5)
    assert list(norms) == [
        "stem/conv",
        "block1/layer1/conv1",
        "block1/layer2/conv1",
        "head/classifier",
    ]
    # Of a softmax layer: the mean over examples of pooled features times (probabilities - labels).
    options = {"xla_backend_optimization_level": 0}  # optimising takes longer than it saves
    init = jax.jit(model.init, compiler_options=options)
    variables = init(jax.random.key(5), images[:1])
    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    (logits, features), _ = jax.jit(apply, compiler_options=options)(variables, images)
    wrong = np.asarray(jax.nn.softmax(logits)) - np.eye(4)[labels]
    expected = np.linalg.norm(np.asarray(features["pooled"]).T @ wrong / 6)
    np.testing.assert_allclose(norms["head/classifier"], expected, rtol=1e-5)
    assert min(norms.values()) > 0
