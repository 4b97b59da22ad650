"""Layers by hand in NumPy float64, and random variables for a module."""

import jax
import numpy as np


def random_variables(module, *arguments, seed=0, **keywords):
    """Variables of a module with nothing at its initial value; float32, without compiling."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, **keywords), *arguments)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            return generator.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        if name in ("scale", "var"):
            return generator.uniform(0.5, 1.5, shape)
        return generator.normal(0, 0.2, shape)

    return jax.tree.map(lambda x: x.astype(np.float32), jax.tree.map_with_path(draw, shapes))


def conv(x, variables, stride=1):
    """A convolution whose padding is half the kernel on every side, as PyTorch's networks do."""
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    margins = [(size // 2, size // 2) for size in kernel.shape[:2]]
    x = np.pad(x, [(0, 0), *margins, (0, 0)])
    y = 0
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            window = x[:, row::stride, column::stride][:, :height, :width]
            y = y + window @ kernel[row, column]
    return y


def depthwise(x, variables):
    """A depthwise convolution with `conv`'s padding."""
    kernel = np.asarray(variables["params"]["kernel"])
    full = np.zeros((*kernel.shape[:2], kernel.shape[-1], kernel.shape[-1]))
    full[:, :, range(len(kernel.T)), range(len(kernel.T))] = kernel[:, :, 0]
    return conv(x, {"params": {"kernel": full}})


def squeeze_excite(x, variables):
    params = child(variables, "conv")["params"]
    gate = x.mean((1, 2), keepdims=True) @ params["kernel"][0, 0] + params["bias"]
    return x * np.clip(gate / 6 + 0.5, 0, 1)


def norm(x, variables):
    params, stats = variables["params"], variables["batch_stats"]
    params, stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, stats))
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def child(variables, name):
    """The variables of a submodule."""
    return {key: tree[name] for key, tree in variables.items() if name in tree}
