"""Optimizers and learning-rate schedules by name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from densejax.config import UserError
from densejax.models.layers import belongs

Schedule = Callable[[jax.Array | int], jax.Array]


def _step(config: ConfigDict, steps: int, warmup: int) -> Schedule:
    """Drops the rate after exactly the given fractions of training (the paper: 50 % and 75 %)."""
    drops = {}
    for fraction in config.drop_at:
        step = round(fraction * steps) - warmup
        if step < 0:
            raise UserError(f"optimizer.drop_at = {config.drop_at}: {fraction} is within warm-up")
        drops[step] = drops.get(step, 1.0) * config.drop_factor
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def _cosine(config: ConfigDict, steps: int, warmup: int) -> Schedule:
    """Half a cosine from the peak to zero (Loshchilov and Hutter 2017, no restarts)."""
    return optax.cosine_decay_schedule(config.learning_rate, steps - warmup)


def _linear(config: ConfigDict, steps: int, warmup: int) -> Schedule:
    """A straight line from the peak to zero."""
    return optax.linear_schedule(config.learning_rate, 0.0, steps - warmup)


def _constant(config: ConfigDict, steps: int, warmup: int) -> Schedule:
    return optax.constant_schedule(config.learning_rate)


# Each gives the rate as a function of the steps done since warm-up ended.
SCHEDULES = {"step": _step, "cosine": _cosine, "linear": _linear, "constant": _constant}


def schedule(config: ConfigDict, steps: int, steps_per_epoch: int, batch_size: int) -> Schedule:
    """The learning rate of the next step as a function of the number of steps done.

    Args:
      config: the section `config.optimizer`.
      steps: length of the whole training; warm-up is part of it.
      steps_per_epoch: the unit of `warmup_epochs`.
      batch_size: if there is a `reference_batch_size`, the peak is proportional to this
        (Goyal et al. 2017, section 2.1).

    Raises:
      UserError: an unknown schedule, or a warm-up as long as training.
    """
    if config.schedule not in SCHEDULES:
        raise UserError(
            f"optimizer.schedule = {config.schedule!r}: allowed are {', '.join(SCHEDULES)}"
        )
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise UserError(
            f"optimizer.warmup_epochs = {config.warmup_epochs}: must be below the "
            f"{steps / steps_per_epoch:g} epochs of training "
            f"(train.epochs, train.max_steps); 0.0 is no warm-up"
        )
    decay = SCHEDULES[config.schedule](config, steps, warmup)
    reference = config.reference_batch_size
    scale = batch_size / reference if reference else 1.0

    def rate(step):
        step = jnp.asarray(step, float)
        rise = scale * jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        return rise * decay(jnp.maximum(step - warmup, 0))

    return rate


def _sgd(config: ConfigDict, learning_rate: Schedule, decayed) -> optax.GradientTransformation:
    """SGD with momentum. Weight decay is coupled: it is added to the gradient before momentum.

    With decoupled weight decay this would be another optimizer.
    """
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.sgd(learning_rate, config.momentum or None, config.nesterov),
    )


def _adamw(config: ConfigDict, learning_rate: Schedule, decayed) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101)."""
    return optax.adamw(
        learning_rate,
        b1=config.momentum,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
        nesterov=config.nesterov,
    )


def _muon(config: ConfigDict, learning_rate: Schedule, decayed) -> optax.GradientTransformation:
    """Muon for the kernels of convolutions, and SGD for everything else.

    Muon makes the momentum of a kernel, as a matrix of inputs by outputs, nearly orthogonal. So all
    its directions learn equally fast (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).
    Weight decay of kernels is decoupled. They learn at a tenth of the rate: one rate suits both.
    """
    last = contrib.MuonDimensionNumbers((0, 1, 2), 3)
    muon = optax.chain(
        contrib.scale_by_muon(
            ns_steps=3,  # as in Jordan's code for CIFAR-10; there are five for language models
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=lambda kernels: jax.tree.map(lambda _: last, kernels),
        ),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: 0.1 * learning_rate(step)),
    )

    def named(params):  # a kernel of one input, as depthwise convolutions have, is no matrix
        is_matrix = jax.tree.map(lambda leaf: leaf.ndim == 4 and leaf.shape[2] > 1, params)
        return jax.tree.map(lambda found: "muon" if found else "sgd", is_matrix)

    return optax.partition({"muon": muon, "sgd": _sgd(config, learning_rate, decayed)}, named)


# Each makes an optimizer from config.optimizer, a schedule, and a function that says which
# parameters decay.
OPTIMIZERS = {"sgd": _sgd, "adamw": _adamw, "muon": _muon}


def create(
    config: ConfigDict,
    learning_rate: Schedule,
    groups: Any = None,
    held: Sequence[str] = (),
    head_steps: int = 0,
) -> optax.GradientTransformation:
    """The optimizer that `config.optimizer` names, with its clipping and its rates of parts.

    With `decay_all`, weight decay reaches every parameter, as in the code of DenseNet's authors;
    otherwise it reaches only kernels.

    `groups` is a tree like that of the parameters and says the group of each: "frozen", "head" or
    "rest"; None: all learn alike. Each group has an optimizer of its own, which does nothing for
    groups in `held`. The group "rest" starts to learn after `head_steps` steps.

    Raises:
      UserError: an unknown name; at `init`, a part in `config.rates` that the network lacks.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name = {config.name!r}: allowed are {', '.join(OPTIMIZERS)}")

    def decayed(params):
        return jax.tree.map(lambda leaf: config.decay_all or leaf.ndim > 1, params)

    create_one = OPTIMIZERS[config.name]
    optimizer = create_one(config, learning_rate, decayed)
    if groups is not None:
        later = create_one(config, lambda step: learning_rate(step + head_steps), decayed)
        each = {"head": optimizer, "rest": later, "frozen": optax.identity()}
        each = {name: _hold(one) if name in held else one for name, one in each.items()}
        optimizer = optax.partition(each, groups)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if config.rates:
        optimizer = optax.chain(optimizer, _scale_parts(config.rates))
    return optimizer


def _hold(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that changes no parameter, nor its own state."""

    def update(updates, state, params=None):
        # p + -0.0 is p, bit for bit. Adding 0.0 would not do, since -0.0 + 0.0 is 0.0.
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _scale_parts(rates: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies the updates of each named part; the first name that fits a path counts."""

    def is_below(path, part):
        return belongs(jax.tree_util.keystr(path, simple=True, separator="/"), part)

    def init(params):
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for part, _ in rates:
            if not any(is_below(path, part) for path in paths):
                raise UserError(
                    f"optimizer.rates: the network has no part {part!r}; it has {', '.join(params)}"
                )
        return optax.EmptyState()

    def update(updates, state, params=None):
        def scale(path, leaf):
            return leaf * next((rate for part, rate in rates if is_below(path, part)), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)
