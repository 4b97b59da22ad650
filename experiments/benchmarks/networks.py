"""The training steps that the benchmarks compile or time: the package's own, and a plain flax one.

Both are made of abstract values, so that they compile for devices that are not there too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from densejax import config as schema
from densejax import models
from densejax.config import UserError
from densejax.data.augment import Preparation
from densejax.models.densenet import IMPLEMENTATIONS, RECOMPUTE, DenseNet
from densejax.topology import targets
from densejax.training import experiment, optimizer, parallel, step
from densejax.weights import conversion


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured.

    Attributes:
      model: a name of densejax.models.MODELS.
      batch_size: images per step.
      image_size: height and width; 0: 32 with the CIFAR stem, 224 otherwise.
      dtype: of the computation.
      fields: changes to the named network.
    """

    model: str
    batch_size: int
    image_size: int = 0
    dtype: str = "float32"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether it is a network for CIFAR."""
        return models.fields(self.model).get("stem", "imagenet") == "cifar"

    @property
    def num_classes(self) -> int:
        """10 of a network for CIFAR, 1,000 otherwise."""
        return 10 if self.is_small else 1000

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        size = self.image_size or (32 if self.is_small else 224)
        return size, size, 3

    def network(self, name: str = "densejax") -> nn.Module:
        """Our network in one of its implementations (raises UserError; see `changes`)."""
        fields = models.fields(self.model, **self.fields, **changes(name, self.model))
        return models.create(fields, self.num_classes, jnp.dtype(self.dtype), parallel.AXIS)

    def examples(self) -> dict[str, np.ndarray]:
        """One synthetic batch: image uint8 and label int32."""
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (self.batch_size, *self.image_shape), np.uint8)
        labels = random.integers(0, self.num_classes, self.batch_size, np.int32)
        return {"image": images, "label": labels}


def mesh(target: str) -> Mesh:
    """One device of densejax/targets, which need not be there, to compile for; "cpu"; or "here".

    Raises:
      UserError: no such target, or its compiler is not installed.
    """
    if target == "cpu":
        jax.config.update("jax_platforms", "cpu")
        devices = jax.devices()
    elif target == "here":
        devices = jax.devices()
    else:
        devices = targets.target(target).devices()
    return Mesh(np.array(devices[:1]), (parallel.AXIS,), axis_types=(AxisType.Auto,))


def changes(name: str, model: str) -> dict[str, str]:
    """Fields that an implementation stands for: "densejax" none, "in_place:layer" two.

    Raises:
      UserError: no such block or recompute level, or a network without dense blocks.
    """
    if name == "densejax":
        return {}
    block, _, recompute = name.partition(":")
    recompute = recompute or "none"
    for what, value, allowed in (
        ("block", block, IMPLEMENTATIONS),
        ("recompute", recompute, RECOMPUTE),
    ):
        if value not in allowed:
            raise UserError(f"{name}: {value!r} is no {what}; allowed are {', '.join(allowed)}")
    if models.fields(model).family != "densenet":
        raise UserError(f"{name}: {model} has no dense block; its one implementation is densejax")
    return {"block": block, "recompute": recompute}


def preparation(dtype: str) -> Preparation:
    """From stored images to the network's input; no augmentation, which the peers do not have."""
    return Preparation((128.0,) * 3, (64.0,) * 3, dtype=dtype)


def recipe() -> ConfigDict:
    """The optimizer of every implementation, at a rate at which random images do no harm."""
    settings = schema.default().optimizer
    settings.learning_rate = 0.001
    return settings


def training(work: Work, name: str, mesh: Mesh) -> tuple[Callable, Any, Any]:
    """The package's own step: (mapped and jitted with a donated state, abstract state, batch)."""
    config = schema.default()
    config.optimizer = recipe()
    rate = optimizer.schedule(
        config.optimizer, batch_size=work.batch_size, steps=10**6, steps_per_epoch=10**3
    )
    task = step.Task(
        model=work.network(name),
        optimizer=optimizer.create(config.optimizer, rate),
        learning_rate=rate,
        preparation=preparation(work.dtype),
        image_shape=work.image_shape,
        log_every=1,
    )
    config.train.batch_size = config.evaluate.batch_size = work.batch_size
    built = experiment.Experiment(config, None, task, 10**6, list(mesh.devices.flat))
    batch = experiment.abstract_batch(mesh, work.image_shape, work.batch_size)
    return built.map(step.train_step, donate=True), built.abstract_state, batch


class PlainDenseNet(nn.Module):
    """A DenseNet as a flax user writes it: nn.Conv, nn.BatchNorm and jnp.concatenate."""

    network: DenseNet  # whose fields it has; nothing else of it is used

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images [batch, height, width, channels] to logits [batch, classes]."""
        net = self.network
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=net.batch_norm_epsilon,
            dtype=net.dtype,
        )

        def conv(x, width, size, name, strides=1):
            padding = ((size // 2, size // 2),) * 2
            bias = net.convolution_bias
            layer = nn.Conv(width, (size, size), strides, padding, use_bias=bias, dtype=net.dtype,
                            name=name)  # fmt: skip
            return layer(x)

        def active(x, name):
            return nn.relu(norm(name=name)(x))

        widths = net.widths()
        if net.stem == "imagenet":
            x = active(conv(x, widths[0], 7, "stem_conv", 2), "stem_norm")
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        else:
            x = conv(x, widths[0], 3, "stem_conv")
        plan = zip(net.block_depths(), net.growth_rates(), strict=True)
        for block, (depth, growth_rate) in enumerate(plan, 1):
            for index in range(1, depth + 1):
                layer, y = f"block{block}_layer{index}", x
                if net.bottleneck:
                    y = active(y, f"{layer}_norm1")
                    y = conv(y, net.bottleneck_width * growth_rate, 1, f"{layer}_conv1")
                last = 2 if net.bottleneck else 1
                y = active(y, f"{layer}_norm{last}")
                y = conv(y, growth_rate, 3, f"{layer}_conv{last}")
                x = jnp.concatenate([x, y], axis=-1)
            if block < len(widths):
                x = active(x, f"transition{block}_norm")
                x = conv(x, widths[block], 1, f"transition{block}_conv")
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = active(x, "norm").mean((1, 2))
        return nn.Dense(net.num_classes, name="head_classifier")(x.astype(jnp.float32))


def plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Our variables as PlainDenseNet has them: one name for each layer, "block1_layer2_norm1"."""
    renamed = {}
    for path, leaf in conversion.flatten(variables).items():
        collection, *modules, name = path.split("/")
        renamed[f"{collection}/{'_'.join(modules)}/{name}"] = leaf
    return conversion.unflatten(renamed)


def plain_network(work: Work) -> PlainDenseNet:
    """The plain flax network of some work (raises UserError where it has no such form)."""
    network = work.network()
    if not isinstance(network, DenseNet) or network.connect != "dense":
        raise UserError(f"flax: the benchmark has no plain form of {work.model}")
    if network.dropout_rate or network.survival < 1:
        raise UserError("flax: the benchmark's plain form draws nothing at random")
    return PlainDenseNet(network)


def plain_training(work: Work, mesh: Mesh) -> tuple[Callable, Any, Any]:
    """The plain network's step with optax: (jitted, donated; abstract state; abstract batch).

    The step maps (state, batch) to (state, mean loss).
    """
    network, settings = plain_network(work), recipe()
    rule = optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(settings.learning_rate, settings.momentum, settings.nesterov),
    )
    prepare = preparation(work.dtype).evaluation

    def init():
        variables = network.init(jax.random.key(0), jnp.zeros((1, *work.image_shape)), False)
        return variables | {"optimizer": rule.init(variables["params"])}

    def take_step(state, batch):
        def loss_of(params):
            variables = {"params": params, "batch_stats": state["batch_stats"]}
            logits, updates = network.apply(
                variables, prepare(batch["image"]), True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), updates["batch_stats"]

        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (loss, batch_stats), gradient = differentiate(state["params"])
        updates, memory = rule.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "batch_stats": batch_stats, "optimizer": memory}, loss

    whole = parallel.replicated(mesh)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(init),
    )
    batch = experiment.abstract_batch(mesh, work.image_shape, work.batch_size)
    return jax.jit(take_step, donate_argnums=0), state, batch
