"""Dense blocks: their layer, and the ways to join layers and to compute the result."""

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.ad_checkpoint import checkpoint_name

from densejax.models import dense_block
from densejax.models.layers import Layers
from densejax.models.normalization import Seen, Statistics, update
from densejax.models.regularization import salt


class DenseLayer(nn.Module):
    """H_l: BN-ReLU-3x3, with a bottleneck BN-ReLU-1x1 before it (paper, section 3)."""

    growth_rate: int
    bottleneck_width: int  # in growth rates; 0: no bottleneck
    layers: Layers
    survival: float = 1.0  # p_l of stochastic depth

    @nn.compact
    def __call__(self, *features: jax.Array) -> jax.Array:
        """Maps features [batch, height, width, channels] of each to `growth_rate` new maps."""
        conv, norm, dropout = self.layers.conv, self.layers.norm, self.layers.dropout
        x = nn.relu(norm(name="norm1")(jnp.concatenate(features, axis=-1)))
        if self.bottleneck_width:
            x = conv(self.bottleneck_width * self.growth_rate, (1, 1), name="conv1")(x)
            x = checkpoint_name(dropout(x, name="dropout1"), "convolution")
            x = nn.relu(norm(name="norm2")(x))
            x = dropout(conv(self.growth_rate, (3, 3), name="conv2")(x), name="dropout2")
        else:
            x = dropout(conv(self.growth_rate, (3, 3), name="conv1")(x), name="dropout1")
        return self.layers.survive(x, self.survival, name="survival")


# What the backward pass computes again instead of keeping it from the forward pass.
RECOMPUTE = {
    "none": "nothing; an in-place block never keeps what a norm or ReLU makes",
    "norm": "concatenations, norms and ReLUs; what convolutions make is kept (Pleiss et al. 2017)",
    "layer": "all but each layer's new feature maps",
    "block": "all but each block's input, through the transition or norm that follows it",
}


class Block(nn.Module):
    """The fields and the layers of a dense block; its kinds have the same variables."""

    depth: int
    growth_rate: int
    bottleneck_width: int  # in growth rates; 0: no bottleneck
    layers: Layers
    survivals: tuple[float, ...] = ()  # of each layer; () is 1 for all
    recompute: str = "none"  # a name in RECOMPUTE

    def dense_layers(self) -> Iterable[DenseLayer]:
        """The layers, made one by one."""
        policy, layer = jax.checkpoint_policies.save_only_these_names("convolution"), DenseLayer
        if self.recompute in ("norm", "layer"):
            layer = nn.remat(DenseLayer, policy=policy if self.recompute == "norm" else None)
        fields = (self.growth_rate, self.bottleneck_width, self.layers)
        for index, survival in enumerate(self.survivals or (1.0,) * self.depth, 1):
            yield layer(*fields, survival, name=f"layer{index}")


class ConcatBlock(Block):
    """A dense block as the paper writes it: every layer reads the concatenation of all before."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Seen | None]:
        """Maps c feature maps to c + depth * growth_rate, its own input first."""
        features = [x]
        for layer in self.dense_layers():
            features.append(layer(*features))
        return jnp.concatenate(features, axis=-1), None


class OneShotBlock(Block):
    """One-shot aggregation in a dense block's place (Lee et al., arXiv:1904.09730, section 3.2).

    Every layer reads only the layer before it; the block's input and all layers are concatenated
    once, at its end, and the transition that follows is the 1x1 that mixes them.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Seen | None]:
        """Maps c feature maps to c + depth * growth_rate, its own input first."""
        features = [x]
        for layer in self.dense_layers():
            features.append(layer(features[-1]))
        return jnp.concatenate(features, axis=-1), None


class InPlaceBlock(Block):
    """ConcatBlock's results from one buffer (densejax.models.dense_block)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Seen | None]:
        """As ConcatBlock; in training also the statistics of the features, which it knows."""
        if self.is_initializing():
            return ConcatBlock.__call__(self, x)
        policy, names = self.layers, [f"layer{index}" for index in range(1, self.depth + 1)]
        # Gradients by hand are dictionaries; variables may be frozen ones.
        variables, x = unfreeze(self.variables), x.astype(policy.dtype)
        layers = [variables["params"][name] for name in names]
        running = [variables["batch_stats"][name] for name in names]
        survivals = self.survivals or (1.0,) * self.depth
        if not policy.train:
            return dense_block.evaluate(policy.epsilon, survivals, x, layers, running), None
        places = ("dropout1", "dropout2", "survival")
        settings = dense_block.Settings(
            epsilon=policy.epsilon,
            axis=policy.batch_norm_axis,
            dropout_rate=policy.dropout_rate,
            salts=tuple(tuple(salt((*self.path, n, place)) for place in places) for n in names),
            survivals=survivals,
            keep_bottlenecks=self.recompute != "layer",
        )
        features, seen, bottlenecks = dense_block.train(settings, x, layers, policy.keys)
        for name, old, bottleneck in zip(names, running, bottlenecks, strict=True):
            first = Statistics(*(leaf[: len(old["norm1"]["mean"])] for leaf in seen.running))
            new = {"norm1": first, "norm2": bottleneck}
            stats = {norm: update(stats, new[norm]) for norm, stats in old.items()}
            self.put_variable("batch_stats", name, stats)
        return features, seen


# Implementations of a dense block.
BLOCKS = {"in_place": InPlaceBlock, "concat": ConcatBlock}
