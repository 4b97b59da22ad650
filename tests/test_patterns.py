"""Every connection pattern through a whole run: stopped, resumed, and what opens it."""

import contextlib

import jax
import numpy as np
import pytest

import densejax
from densejax import models
from densejax.analysis import reuse
from densejax.config import UserError
from densejax.inference import classifier
from densejax.models.connections import CONCATENATING
from densejax.training import experiment, parallel
from tests import small
from tests.models.test_connections import LEARNED, OWN
from tests.test_train import logged, stop_by_a_signal

pytestmark = pytest.mark.slow
PREACTIVATION = {"blocks": (3, 2), "widths": (4, 6), "block": "basic", "stride_on": "3x3"}


def model(connect):
    if connect in CONCATENATING or connect is OWN:
        fields = {"depth": None, "blocks": (4,), "growth_rate": 4}
        return models.fields("densenet_bc_40_12", **fields, connect=connect)
    return models.fields("preact_resnet164", **PREACTIVATION, connect=connect)


CASES = [(connect, "shard_map") for connect in (*CONCATENATING, OWN, "add", *LEARNED)]
CASES += [(connect, "pmap") for connect in ("exponential", LEARNED[-1])]


@pytest.mark.parametrize(("connect", "mode"), CASES, ids=str)
def test_a_run_resumes_bit_for_bit_and_is_opened(tmp_path, monkeypatch, connect, mode):
    monkeypatch.setattr(parallel, "start", lambda: None)
    config = small.tiny(model=model(connect), parallel__mode=mode)
    whole, parts = (str(tmp_path / name) for name in ("whole", "parts"))
    assert densejax.train(config, whole)["steps"] == 10
    assert densejax.train(config, parts, [stop_by_a_signal]) is None
    assert densejax.train(config, parts)["steps"] == 10
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    network = classifier.load(whole)
    small.assert_same_bits(network.variables, classifier.load(parts).variables)

    images = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)).astype(np.uint8)
    logits = network.logits(network.variables, images)
    program = jax.export.deserialize(bytearray(network.serialised(("cpu",))))
    np.testing.assert_allclose(program.call(images), logits, rtol=1e-4, atol=1e-5)
    has_weights = contextlib.nullcontext()
    if connect in ("add", "chain"):
        has_weights = pytest.raises(UserError, match="layers read only one source")
    with has_weights:
        assert reuse.heat_maps(
            network.model, network.variables["params"], network.variables.get("batch_stats")
        )

    start = experiment.build(config).init().params
    for path, leaf in small.named(network.variables["params"]).items():
        if "['stage" in path and "_block" not in path:  # weights of connections
            assert (leaf != small.named(start)[path]).any(), path
