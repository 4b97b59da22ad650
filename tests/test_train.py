"""`densejax.train`: a run from Python, without flags."""

import json
import os
import signal

import flax.linen as nn
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

import densejax
from densejax import models
from densejax.config import UserError
from densejax.training import loop, losses, optimizer, parallel, result
from tests import small
from tests.programs import shared_programs  # noqa: F401


@pytest.fixture(autouse=True)
def cache_of_the_tests(monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda: None)  # it would choose another folder


def logged(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def stop_by_a_signal(step, values):
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_call_goes_on_and_callbacks_get_what_is_logged(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    seen, config = [], small.tiny(train__epochs=1)
    callbacks = [lambda step, values: seen.append({"step": step, **values})]
    first = densejax.train(config, callbacks=callbacks)
    assert densejax.train(config) == first and config == small.tiny(train__epochs=1)
    (path,) = (tmp_path / "runs").iterdir()  # every call has the same default directory
    assert json.loads((path / "summary.json").read_text()).items() >= first.items()
    assert 0 < first["test_accuracy"] < 1 and first["steps"] == 5
    second = densejax.train(small.tiny(), str(path), callbacks)
    assert second["steps"] == 10 and second["config"]["train"]["epochs"] == 2
    records = [{k: v for k, v in one.items() if k != "epoch"} for one in logged(path)]
    assert seen == records and {"step", "train_loss", "learning_rate"} <= set(seen[0])
    assert densejax.train(small.tiny(), str(path), callbacks) == second  # it is finished
    assert len(seen) == len(records) and "test accuracy" in capfd.readouterr().out


def test_a_run_that_is_stopped_gives_no_result_of_other_versions(tmp_path, monkeypatch):
    config, versions = small.tiny(train__epochs=1), result.versions
    assert densejax.train(config, str(tmp_path))["steps"] == 5
    monkeypatch.setattr(result, "versions", lambda config: versions(config) | {"jax": "newer"})
    monkeypatch.setattr(loop, "run", lambda *_, **__: 130)  # stopped before it measures again
    assert densejax.train(config, str(tmp_path), force=True) is None


def test_a_mistake_is_an_exception_of_one_line(tmp_path):
    with pytest.raises(UserError, match="train.epochs = 0: allowed is"):
        densejax.train(small.tiny(train__epochs=0), str(tmp_path))
    for key, name in {"train.loss": "hinge", "optimizer.name": "lion"}.items():
        config = small.tiny(**{key.replace(".", "__"): name})
        with pytest.raises(UserError, match=f"{key} = {name!r}: allowed are "):
            densejax.train(config, str(tmp_path))


class Plain(nn.Module):
    """A network of one's own: no BatchNorm, no dropout."""

    num_classes: int
    width: int = 8

    def check(self):
        if self.width < 1:
            raise UserError(f"model.width = {self.width}: must be at least 1")

    @nn.compact
    def __call__(self, image, train=False, keys=None):
        x = nn.LayerNorm()(nn.relu(nn.Conv(self.width, (3, 3), strides=2)(image)))
        pooled = x.mean((1, 2))
        return nn.Dense(self.num_classes)(pooled), {"pooled": pooled}


def own(**changes):
    config = small.tiny(**changes)
    config.model = ConfigDict({"family": "plain", "width": 8})
    return config


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_network_without_batch_norm_goes_all_the_way(tmp_path, monkeypatch, mode):
    monkeypatch.setitem(models.FAMILIES, "plain", Plain)
    config, parts = own(parallel__mode=mode, train__accumulate_steps=2), tmp_path / "parts"
    assert densejax.train(config, str(tmp_path / "whole"))["test_examples"] == 360
    assert densejax.train(config, str(parts), [stop_by_a_signal]) is None
    assert densejax.train(config, str(parts))["steps"] == 10
    assert logged(parts) == logged(tmp_path / "whole")  # bit for bit


def test_a_loss_and_an_optimizer_of_ones_own_are_names_in_tables(tmp_path, monkeypatch):
    def squared(logits, labels, smoothing=0.0):
        target = losses.targets(logits, labels, smoothing)
        return jnp.square(logits - target).sum(-1)

    used = []

    def lion(config, learning_rate, decayed):
        used.append(config.name)
        return optax.lion(learning_rate, weight_decay=config.weight_decay, mask=decayed)

    monkeypatch.setitem(losses.LOSSES, "squared", squared)
    monkeypatch.setitem(optimizer.OPTIMIZERS, "lion", lion)
    config = small.tiny(train__loss="squared", optimizer__name="lion", train__epochs=1)
    config.optimizer.learning_rate = 1e-3
    result = densejax.train(config, str(tmp_path))
    assert result["config"]["train"]["loss"] == "squared"
    assert logged(tmp_path)[-1]["test_loss"] == result["test_loss"]
    assert "lion" in used
    assert not 2.2 < result["test_loss"] < 2.4  # as the cross-entropy of ten classes would be


def test_a_loss_that_is_one_number_for_all_images_is_refused(tmp_path, monkeypatch):
    def mean(logits, labels, smoothing=0.0):
        return losses.cross_entropy(logits, labels, smoothing).mean()

    monkeypatch.setitem(losses.LOSSES, "mean", mean)
    with pytest.raises(UserError, match="train.loss: it gives an array .* one number for each"):
        densejax.train(small.tiny(train__loss="mean"), str(tmp_path))
