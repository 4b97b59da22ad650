"""The dense block as a linen module, for DenseNet and for any other network."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.ad_checkpoint import checkpoint_name

from densejax.models import connections, in_place, layers
from densejax.models.connections import Connect, Graph
from densejax.models.layers import Layers
from densejax.models.normalization import PrecomputedStatistics, update_running
from densejax.models.regularization import layer_seed

IMPLEMENTATIONS = {
    "in_place": "one buffer and gradients by hand: the fastest and smallest on every platform",
    "concat": "the paper's form, which the other is tested against",
}
# What the backward pass computes again instead of keeping it from the forward pass.
RECOMPUTE = {
    "none": "nothing; but an in-place block always computes norms and ReLUs again",
    "norm": "concatenations, norms and ReLUs; what convolutions make is kept (Pleiss et al. 2017); "
    "of an in-place block, this is the same as 'none'",
    "layer": "all but each layer's new feature maps",
}


class DenseLayer(nn.Module):
    """H_l: BN-ReLU-3x3, with a bottleneck BN-ReLU-1x1 before it (paper, section 3)."""

    growth_rate: int
    bottleneck_width: int  # in growth rates; 0: no bottleneck
    layers: Layers
    survival: float  # p_l of stochastic depth

    @nn.compact
    def __call__(self, *features: jax.Array) -> jax.Array:
        """Makes `growth_rate` new maps from several features [batch, height, width, channels]."""
        conv, norm, dropout = self.layers.conv, self.layers.norm, self.layers.dropout
        x = nn.relu(norm(name="norm1")(jnp.concatenate(features, axis=-1)))
        if self.bottleneck_width:
            x = conv(self.bottleneck_width * self.growth_rate, (1, 1), name="conv1")(x)
            x = checkpoint_name(dropout(x, name="dropout1"), "convolution")
            x = nn.relu(norm(name="norm2")(x))
            x = dropout(conv(self.growth_rate, (3, 3), name="conv2")(x), name="dropout2")
        else:
            x = dropout(conv(self.growth_rate, (3, 3), name="conv1")(x), name="dropout1")
        return self.layers.stochastic_depth(x, self.survival, name="survival")


class DenseBlock(nn.Module):
    """Layers that each read the feature maps of all layers before them (paper, section 3).

    With another `connect`, they read what its pattern says.

    It is an ordinary linen module, with the variables "layer1/norm1", "layer1/conv1", ... in
    "params" and "batch_stats". `nn.remat` needs `static_argnums=(2,)`, as for every module with an
    argument `train`.

    Attributes:
      depth: number of layers.
      growth_rate: k in the paper: the feature maps that a layer adds; "hardnet" multiplies it.
      bottleneck: a 1x1 convolution before each 3x3.
      bottleneck_width: output width of that 1x1 in growth rates.
      dropout_rate: after every convolution.
      survival: probability that stochastic depth keeps a layer; one for all, or one for each.
      convolution_bias: convolutions add a bias.
      batch_norm_epsilon: added to the variance.
      connect: what each layer reads and the block emits, as densejax.models.connections.graph
        takes it.
      block: how the block is computed, a name in IMPLEMENTATIONS; variables and results are the
        same.
      recompute: what the backward pass computes again to save memory, a name in RECOMPUTE.
      dtype: precision of the computation; variables are float32.
      batch_norm_axis: mapped axis (or axes) that batch statistics are averaged over.
      frozen: with "batch_norm" in it, norms use running statistics in training, too; the block is
        then computed in the paper's form.
    """

    depth: int
    growth_rate: int
    bottleneck: bool = True
    bottleneck_width: int = 4
    dropout_rate: float = 0.0
    survival: float | tuple[float, ...] = 1.0
    convolution_bias: bool = False
    batch_norm_epsilon: float = 1e-5
    connect: Connect = "dense"
    block: str = "in_place"
    recompute: str = "none"
    dtype: Any = jnp.float32
    batch_norm_axis: Any = None
    frozen: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        keys: jax.Array | None = None,
        return_statistics: bool = False,
    ) -> Any:
        """Maps x [batch, height, width, c] to the outputs that the block emits, concatenated.

        A dense block gives c + depth * growth_rate channels, and those of x come first.

        Args:
          x: features.
          train: use batch statistics, dropout and stochastic depth, and update "batch_stats".
          keys: one random key per example, for dropout and stochastic depth; None: they are drawn
            from the module's random stream "dropout", as nn.Dropout does.
          return_statistics: return (features, statistics) instead of the features alone. The
            statistics are PrecomputedStatistics for the norm that follows; None: not known.
        """
        survivals = _survivals(self)
        graph = connections.graph(self.connect, self.depth, self.growth_rate)
        is_random = self.dropout_rate > 0 or min(survivals) < 1
        if train and is_random and keys is None:
            keys = jax.random.split(self.make_rng("dropout"), len(x))
        builder, x = Layers.of(self, train, keys, x), x.astype(self.dtype)
        norms_are_frozen = train and "batch_norm" in self.frozen
        if self.is_initializing() or self.block == "concat" or norms_are_frozen:
            features, statistics = _concatenate(self, graph, builder, survivals, x), None
        else:
            features, statistics = _compute_in_place(self, graph, builder, survivals, x)
        return (features, statistics) if return_statistics else features


def _survivals(block: DenseBlock) -> tuple[float, ...]:
    """The probability that stochastic depth keeps each layer; UserError for wrong fields."""
    require = functools.partial(layers.require, block, owner="DenseBlock")
    require("depth", block.depth >= 1, "must be at least 1")
    for field in ("growth_rate", "bottleneck_width"):
        require(field, getattr(block, field) >= 1, "must be at least 1")
    require("dropout_rate", 0 <= block.dropout_rate < 1, "must be in [0, 1)")
    require("batch_norm_epsilon", block.batch_norm_epsilon > 0, "must be above 0")
    choices = {"block": IMPLEMENTATIONS, "recompute": RECOMPUTE}
    layers.require_choices(block, "DenseBlock", **choices)
    survival = block.survival
    survival = (survival,) * block.depth if isinstance(survival, float | int) else tuple(survival)
    each = f"give one number, or one for each of the {block.depth} layers"
    require("survival", len(survival) == block.depth, each)
    require("survival", all(0 < share <= 1 for share in survival), "must be in (0, 1]")
    return survival


def _names(block: DenseBlock) -> list[str]:
    return [f"layer{index}" for index in range(1, block.depth + 1)]


def _concatenate(block, graph: Graph, builder, survivals, x) -> jax.Array:
    """The block's features, computed in the paper's form."""
    layer, policy = DenseLayer, None
    if block.recompute == "norm":
        policy = jax.checkpoint_policies.save_only_these_names("convolution")
    if block.recompute != "none":
        layer = nn.remat(DenseLayer, policy=policy)
    bottleneck_width, outputs = block.bottleneck_width if block.bottleneck else 0, [x]
    for name, read, width, survival in zip(
        _names(block), graph.reads, graph.widths, survivals, strict=True
    ):
        inputs = [outputs[number] for number in read]
        new = layer(width, bottleneck_width, builder, survival, name=name)(*inputs)
        outputs.append(new)
    return jnp.concatenate([outputs[number] for number in graph.emits], axis=-1)


def _compute_in_place(
    block, graph: Graph, builder, survivals, x
) -> tuple[jax.Array, PrecomputedStatistics | None]:
    """The block's features and, in training, their statistics (densejax.models.in_place)."""
    # Hand-written gradients are plain dictionaries; the user's variables may be frozen ones.
    variables, names = unfreeze(block.variables), _names(block)
    params = [variables["params"][name] for name in names]
    running = [variables["batch_stats"][name] for name in names]
    drops = ("dropout1", "dropout2", "survival")
    settings = in_place.Settings(
        graph=graph,
        epsilon=block.batch_norm_epsilon,
        axis=block.batch_norm_axis,
        dropout_rate=block.dropout_rate,
        seeds=tuple(tuple(layer_seed((*block.path, n, drop)) for drop in drops) for n in names),
        survivals=survivals,
        keep_hidden=block.recompute != "layer",
    )
    if not builder.train:
        return in_place.evaluate(settings, x, params, running), None
    features, statistics, batch = in_place.train(settings, x, params, builder.keys)
    for name, old, new in zip(names, running, batch, strict=True):
        stats = {norm: update_running(old[norm], new[norm]) for norm in old}
        block.put_variable("batch_stats", name, stats)
    return features, statistics
