"""Convolutions, and how each platform computes them best."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Params = dict[str, jax.Array]  # "kernel", and "bias" where the convolution has one


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a platform is kept busy; the results differ by rounding alone.

    Attributes:
      piece_bytes: a batch is worked through in pieces whose widest array has about so many bytes.
      products: narrow 3x3 convolutions are matrix products and sums of shifted results.
      shrink: each layer of a dense block makes a new gradient, of the channels still needed; else
        it is one buffer, updated in place.
      lanes: a batch of a multiple of so many images is a dense block's fastest axis; 0: none is.
    """

    piece_bytes: float = float("inf")
    products: bool = False
    shrink: bool = False
    lanes: int = 0

    def laid_out(self, x: jax.Array) -> jax.Array:
        """The features of a dense block, or their gradient, in the layout of the plan."""
        if not self.lanes or not isinstance(x.shape[0], int) or x.shape[0] % self.lanes:
            return x
        return with_layout_constraint(x, Layout((1, 2, 3, 0)))


PLANS = {
    "cpu": Plan(piece_bytes=2e6, products=True),
    # Without an update in place XLA:TPU adds a layer's gradient up and sums it for BatchNorm in the
    # kernel of the product that makes it, instead of writing it and reading it again. It can where
    # product and features have one layout; left alone, it takes another after a transition. Of 128
    # images, the step of DenseNet-BC-100 then reads and writes 10.7 GiB on a v5e instead of 12.1.
    "tpu": Plan(shrink=True, lanes=128),
    "default": Plan(),
}


_platform = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for this platform ("cpu", "tpu", ...) alone: no other is traced."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def per_platform(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(plan, *arguments) with the plan of the platform that it is compiled for."""
    if platform := _platform.get():
        return function(PLANS.get(platform, PLANS["default"]), *arguments)
    return lax.platform_dependent(
        *arguments,
        **{name: lambda *x, plan=plan: function(plan, *x) for name, plan in PLANS.items()},
    )


class Convolution(nn.Module):
    """A convolution with nn.Conv's parameters and PyTorch's padding.

    Half the kernel on every side; flax's "SAME" shifts the image by one at stride 2.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int
    use_bias: bool
    dtype: Any
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: jax.Array, affine: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """Convolves x [batch, height, width, channels]; `affine` is folded into the parameters."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        params = {"kernel": self.param("kernel", self.kernel_init, shape)}
        if self.use_bias:
            params["bias"] = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        params, x = params if affine is None else fold(params, *affine), x.astype(self.dtype)
        if self.kernel_size == (1, 1) and self.strides == 1:
            return pointwise(x, params)
        padding = tuple((size // 2, size // 2) for size in self.kernel_size)
        return _biased(_conv(x, params["kernel"].astype(x.dtype), self.strides, padding), params)


def fold(params: Params, slope: jax.Array, shift: jax.Array) -> Params:
    """Parameters of a convolution whose result is slope * y + shift of the given one's y."""
    bias = shift + params["bias"] * slope if "bias" in params else shift
    return {"kernel": params["kernel"] * slope, "bias": bias}


def pointwise(x: jax.Array, params: Params) -> jax.Array:
    """A 1x1 convolution as the matrix product it is.

    XLA fuses what comes before and after into a product, which it does not for a convolution.
    """
    y = _rows(x) @ params["kernel"][0, 0].astype(x.dtype)
    return _biased(y.reshape(*x.shape[:-1], -1), params)


def pointwise_backward(x: jax.Array, dy: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `pointwise`."""
    kernel = params["kernel"][0, 0].astype(x.dtype)
    dkernel = _transposed_product(dy, x, params["kernel"].dtype).T[None, None]
    dx = (_rows(dy) @ kernel.T).reshape(x.shape)
    return dx, {"kernel": dkernel} | _bias_gradient(dy, params)


def conv3x3(x: jax.Array, params: Params, products: bool) -> jax.Array:
    """A 3x3 convolution, stride 1, zero padding, of x [batch, height, width, channels]."""
    kernel = params["kernel"].astype(x.dtype)
    if not products:
        return _biased(_conv(x, kernel), params)
    _, height, width, _ = x.shape
    n = kernel.shape[-1]
    # All nine taps in one product with few columns; then their results, shifted, are added up.
    taps = (_rows(x) @ _taps(kernel)).reshape(*x.shape[:-1], -1)
    taps = jnp.pad(taps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        taps[:, i : i + height, j : j + width, (3 * i + j) * n : (3 * i + j + 1) * n]
        for i in range(3)
        for j in range(3)
    ]
    return _biased(sum(shifted), params)


def conv3x3_backward(x, dy, params: Params, products: bool) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `conv3x3`."""
    kernel = params["kernel"].astype(x.dtype)
    if not products:
        # In bfloat16 the kernel's gradient is rounded to it, as in any flax network: for a float32
        # result XLA:GPU converts operands, and DenseNet-BC-100's step moves 4 % more.
        dx, dkernel = jax.vjp(_conv, x, kernel)[1](dy)
        return dx, {"kernel": dkernel.astype(params["kernel"].dtype)} | _bias_gradient(dy, params)
    _, height, width, channels = x.shape
    padded = jnp.pad(dy, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # The nine shifts of the narrow output's gradient; both gradients are products with them.
    columns = jnp.concatenate(
        [
            padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width]
            for i in range(3)
            for j in range(3)
        ],
        axis=-1,
    )
    dx = (_rows(columns) @ _taps(kernel).T).reshape(x.shape)
    dkernel = _transposed_product(x, columns, params["kernel"].dtype)
    dkernel = dkernel.reshape(channels, 3, 3, -1).transpose(1, 2, 0, 3)
    return dx, {"kernel": dkernel} | _bias_gradient(dy, params)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _taps(kernel):
    """[3, 3, c_in, c_out] -> [c_in, 9 c_out]."""
    return kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)


def _conv(x, kernel, stride=1, padding=((1, 1), (1, 1))):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def _biased(y, params):
    return y + params["bias"].astype(y.dtype) if "bias" in params else y


def _bias_gradient(dy, params):
    return {"bias": dy.sum((0, 1, 2), dtype=params["bias"].dtype)} if "bias" in params else {}


def _transposed_product(narrow, broad, dtype):
    """narrow^T broad, over all pixels: the operand that is transposed is the smaller one."""
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(_rows(narrow), _rows(broad), contract, preferred_element_type=dtype)
