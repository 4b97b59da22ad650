"""SGD against PyTorch's formula written in NumPy, and the schedules' exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from densejax import config as schema
from densejax.config import UserError
from densejax.training import optimizer


def section(**changes):
    config = schema.default().optimizer
    config.update(changes)
    return config


def sgd(value, gradients, rates, momentum, nesterov, decay):
    """torch.optim.SGD's documented update, dampening 0, in float64."""
    value, velocity = np.float64(value), 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = np.float64(gradient) + decay * value
        velocity = momentum * velocity + gradient
        value = value - rate * (gradient + momentum * velocity if nesterov else velocity)
    return value


def trained(config, rates, value, gradients):
    rates = jnp.asarray(rates, jnp.float32)
    transformation = optimizer.create(config, lambda step: rates[step])
    params = {"value": jnp.asarray(value, jnp.float32)}
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update({"value": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    return params["value"]


@pytest.mark.parametrize("momentum, nesterov", [(0.9, True), (0.9, False), (0.0, False)])
def test_steps_equal_pytorch(momentum, nesterov):
    gradients = np.float32([[[0.5]], [[-1.5]], [[0.25]], [[2.0]], [[-0.125]]])
    rates = [0.1, 0.1, 0.05, 0.01, 0.01]
    config = section(momentum=momentum, nesterov=nesterov, weight_decay=0.05)
    found = trained(config, rates, [[1.5]], gradients)
    expected = sgd([[1.5]], gradients, rates, momentum, nesterov, 0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_equals_pytorch(clip):
    gradients = np.float32([[[0.5]], [[-1.5]], [[0.25]], [[2.0]], [[-0.125]]])
    rates = [0.1, 0.1, 0.05, 0.01, 0.01]
    config = section(name="adamw", nesterov=False, weight_decay=0.05, beta2=0.99, clip_norm=clip)
    with jax.numpy_dtype_promotion("standard"):  # optax itself promotes
        found = trained(config, rates, [[1.5]], gradients)
    # torch.optim.AdamW's documented update, after clip_grad_norm_, in float64.
    value, mean, square = 1.5, 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients.ravel(), rates, strict=True), 1):
        gradient = float(gradient) * (min(1.0, clip / abs(gradient)) if clip else 1.0)
        value -= rate * 0.05 * value
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        root = np.sqrt(square / (1 - 0.99**step)) + 1e-8
        value -= rate * mean / (1 - 0.9**step) / root
    np.testing.assert_allclose(found, [[value]], rtol=1e-5)


def orthogonalized(momentum):
    """Jordan's iteration (https://kellerjordan.github.io/posts/muon), on singular values."""
    left, values, right = np.linalg.svd(
        momentum.reshape(-1, momentum.shape[-1]), full_matrices=False
    )
    values = values / np.linalg.norm(values)
    for _ in range(3):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return (left * values @ right).reshape(momentum.shape)


def test_muon_equals_its_formula_on_kernels_and_sgd_elsewhere():
    draw = np.random.default_rng(0).normal
    shapes = {"kernel": (3, 3, 2, 4), "one": (1, 1, 6, 4), "depthwise": (3, 3, 1, 4), "scale": (4,)}
    params = {name: jnp.asarray(draw(size=shape)) for name, shape in shapes.items()}
    gradients = [{name: draw(size=shape) for name, shape in shapes.items()} for _ in range(2)]
    config = section(name="muon", momentum=0.5, nesterov=False, weight_decay=0.01)
    transformation, found = optimizer.create(config, lambda step: 0.4), params
    state = transformation.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax itself promotes
        for gradient in gradients:
            updates, state = transformation.update(gradient, state, found)
            found = optax.apply_updates(found, updates)
    first, second = gradients
    for name in ("kernel", "one"):
        value = np.asarray(params[name])
        for momentum in (first[name], 0.5 * first[name] + second[name]):  # its scale is no matter
            value = value - 0.04 * (orthogonalized(momentum) + 0.01 * value)
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    for name in ("depthwise", "scale"):
        steps = [first[name], second[name]]
        expected = sgd(np.asarray(params[name]), steps, [0.4, 0.4], 0.5, False, 0.01)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_parts_have_their_own_rates():
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "stem2": {"kernel": jnp.ones((2, 2))}}
    params |= {"block1": {"layer1": {"kernel": jnp.ones(2)}, "layer2": {"kernel": jnp.ones(2)}}}
    config = section(momentum=0.0, nesterov=False, weight_decay=0.0)
    with config.ignore_type():
        config.rates = (("stem", 0.0), ("block1/layer2", 0.5), ("block1", 2))
    transformation = optimizer.create(config, lambda step: 0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = transformation.update(ones, transformation.init(params), params)
    found = {"/".join(k.key for k in path): float(u.ravel()[0])
             for path, u in jax.tree_util.tree_leaves_with_path(updates)}  # fmt: skip
    assert found == pytest.approx({
        "stem/kernel": 0.0, "stem2/kernel": -0.1, "block1/layer1/kernel": -0.2,
        "block1/layer2/kernel": -0.05})  # fmt: skip
    config.rates = (("stage9", 0.1),)
    with pytest.raises(UserError, match="no part 'stage9'; it has stem, stem2, block1"):
        optimizer.create(config, lambda step: 0.1).init(params)
    blocks = {f"{part}_block1": {"kernel": jnp.ones(2)} for part in ("stage1", "stage10")}
    config.rates = (("stage1", 0.0),)
    transformation = optimizer.create(config, lambda step: 0.1)
    updates, _ = transformation.update(blocks, transformation.init(blocks), blocks)
    assert [float(updates[name]["kernel"][0]) for name in blocks] == pytest.approx([0, -0.1])


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_groups_start_one_after_the_other_with_an_optimizer_of_their_own(name):
    config = section(name=name, momentum=0.9, nesterov=False, weight_decay=0.01, epsilon=1e-8)
    groups = {"head": "head", "body": "rest", "stem": "frozen"}
    values = jnp.asarray([1.5, -0.0])
    params = {part: values for part in groups}
    gradients = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    rates = {"head": lambda step: 0.1 / (1 + step), "body": lambda step: 0.1 / (4 + step)}
    each = {part: optimizer.OPTIMIZERS[name](config, rates[part], None) for part in rates}
    alone, expected = {part: one.init(values) for part, one in each.items()}, dict(params)
    phases = [
        optimizer.create(config, rates["head"], groups, held, 3)
        for held in (("frozen", "rest"), ("frozen",))
    ]
    with jax.numpy_dtype_promotion("standard"):  # optax's AdamW itself promotes
        state = phases[0].init(params)
        assert jax.tree.structure(state) == jax.tree.structure(phases[1].init(params))
        for step, gradient in enumerate(jnp.asarray(gradients)):
            same = dict.fromkeys(groups, gradient)
            updates, state = phases[step >= 3].update(same, state, params)
            params = optax.apply_updates(params, updates)
            for part in rates if step >= 3 else ("head",):
                update, alone[part] = each[part].update(gradient, alone[part], expected[part])
                expected[part] = expected[part] + update
        for part in groups:
            np.testing.assert_array_equal(params[part], expected[part])
    assert np.asarray(params["stem"]).tobytes() == np.asarray(values).tobytes()


def test_nesterov_of_two_steps_by_hand():
    # v = 1, p = 0 - 0.1 (1 + 0.5) = -0.15; v = 1.5, p = -0.15 - 0.1 (1 + 0.75) = -0.325.
    config = section(momentum=0.5, weight_decay=0.0)
    found = trained(config, [0.1, 0.1], [[0.0]], np.float32([[[1.0]], [[1.0]]]))
    np.testing.assert_allclose(found, -0.325, rtol=1e-6)


@pytest.mark.parametrize("decay_all", [True, False])
def test_decay_reaches_all_or_kernels_alone(decay_all):
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "classifier": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    config = section(momentum=0.0, nesterov=False, weight_decay=0.5, decay_all=decay_all)
    transformation = optimizer.create(config, lambda step: 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(zeros, transformation.init(params), params)
    for layer, leaves in updates.items():
        for name, update in leaves.items():
            decays = decay_all or name == "kernel"
            np.testing.assert_allclose(update, -0.05 if decays else 0.0, err_msg=f"{layer}/{name}")


EPOCH = 50_000 // 64
STEPS = 300 * EPOCH


def rates(steps, *, total=STEPS, epoch=EPOCH, **changes):
    rate = jax.jit(optimizer.schedule(section(**changes), total, epoch, 64))
    return [float(rate(jnp.int32(step))) for step in steps]


def test_step_drops_after_150_and_225_of_300_epochs():
    first, second = 150 * EPOCH, 225 * EPOCH
    found = rates([0, first - 1, first, first + 1, second - 1, second, STEPS - 1])
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001], rel=1e-6)


def test_step_takes_other_drops():
    # ImageNet: 90 epochs, a tenth after 30 and 60.
    changes = {"drop_at": (1 / 3, 2 / 3), "total": 900, "epoch": 10}
    found = rates([299, 300, 599, 600], **changes)
    assert found == pytest.approx([0.1, 0.01, 0.01, 0.001], rel=1e-6)
    found = rates([299, 300, 600], drop_factor=0.5, **changes)
    assert found == pytest.approx([0.1, 0.05, 0.025], rel=1e-6)


def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step():
    changes = {"warmup_epochs": 2.0, "total": 100, "epoch": 5}
    found = rates(range(12), schedule="constant", **changes)
    assert found == pytest.approx([0.01 * n for n in range(1, 11)] + [0.1, 0.1], rel=1e-6)


def test_drops_do_not_move_with_warmup():
    found = rates([49, 50, 74, 75], warmup_epochs=2.0, total=100, epoch=5)
    assert found == pytest.approx([0.1, 0.01, 0.01, 0.001], rel=1e-6)


def test_cosine():
    found = rates([0, 25, 50, 75, 100], schedule="cosine", total=100, epoch=5)
    expected = [0.05 * (1 + np.cos(np.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    # After ten steps of warm-up the half cosine fits into the ninety that are left.
    found = rates([9, 10, 55, 100], schedule="cosine", warmup_epochs=2.0, total=100, epoch=5)
    assert found == pytest.approx([0.1, 0.1, 0.05, 0.0], rel=1e-5, abs=1e-9)


def test_linear_and_constant():
    found = rates([0, 25, 99, 100], schedule="linear", total=100, epoch=5)
    assert found == pytest.approx([0.1, 0.075, 0.001, 0.0], rel=1e-5, abs=1e-8)
    assert rates([0, 99], schedule="constant", learning_rate=0.3) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_the_peak_is_proportional_to_the_batch_where_a_reference_is_given(name):
    found = []
    for reference in (0, 64, 256, 16):
        config = section(schedule=name, reference_batch_size=reference, warmup_epochs=1.0)
        rate = optimizer.schedule(config, 100, 10, 64)
        found.append([float(rate(step)) for step in range(100)])
    plain, same, quarter, fourfold = np.array(found)
    np.testing.assert_array_equal(plain, same)
    np.testing.assert_allclose(quarter, plain / 4, rtol=1e-6)
    np.testing.assert_allclose(fourfold, plain * 4, rtol=1e-6)


def test_every_schedule_is_tested():
    assert set(optimizer.SCHEDULES) == {"step", "cosine", "linear", "constant"}


def test_errors_name_the_field():
    with pytest.raises(UserError, match="optimizer.schedule = 'stairs': allowed are step, cosine"):
        optimizer.schedule(section(schedule="stairs"), 100, 10, 64)
    with pytest.raises(UserError, match="optimizer.warmup_epochs = 10.0: must be below"):
        optimizer.schedule(section(warmup_epochs=10.0), 100, 10, 64)
