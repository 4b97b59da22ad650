"""Convolutions, and how each platform computes them best."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from densejax.models.normalization import pixelwise, varying_as, wide

Params = dict[str, jax.Array]  # "kernel", and "bias" where the convolution has one

# With at most so many input channels XLA:CPU's gradient of a kernel is slow: an image's.
FEW_CHANNELS = 4


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
        conv = _conv_of_few if x.shape[-1] <= FEW_CHANNELS else _conv
        return _biased(conv(x, params["kernel"].astype(x.dtype), self.strides, padding), params)


def divisor(number: int, most: float) -> int:
    """The largest divisor that is at most so large, or 1."""
    return max((n for n in range(1, number + 1) if n <= most and number % n == 0), default=1)


def fold(params: Params, slope: jax.Array, shift: jax.Array) -> Params:
    """Parameters of a convolution whose result is slope * y + shift of the given one's y."""
    bias = shift + params["bias"] * slope if "bias" in params else shift
    return {"kernel": params["kernel"] * pixelwise(slope), "bias": bias}


def pointwise(x: jax.Array, params: Params) -> jax.Array:
    """A 1x1 convolution as the matrix product it is.

    XLA fuses what comes before and after into a product, which it does not for a convolution.
    """
    y = _rows(x) @ params["kernel"][0, 0].astype(x.dtype)
    return _biased(y.reshape(*x.shape[:-1], y.shape[-1]), params)


def pointwise_backward(x: jax.Array, dy: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `pointwise`."""
    kernel = params["kernel"][0, 0].astype(x.dtype)
    dkernel = _transposed_product(dy, x, params["kernel"].dtype).T[None, None]
    dx = (_rows(dy) @ kernel.T).reshape(x.shape)
    return dx, {"kernel": dkernel} | _bias_gradient(dy, params)


def taps(params: Params, plan: Plan) -> Params:
    """Parameters of a 3x3 convolution as `conv3x3` takes them.

    Where the plan wants products, the kernel is a matrix [c_in, 9 c_out], made once for all pieces.
    """
    kernel = params["kernel"]
    if plan.products:
        kernel = kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    return params | {"kernel": kernel}


def from_taps(gradient: Params, plan: Plan) -> Params:
    """The gradient of a convolution's parameters, from that of the `taps` made of them."""
    kernel = gradient["kernel"]
    if plan.products:
        kernel = kernel.reshape(kernel.shape[0], 3, 3, -1).transpose(1, 2, 0, 3)
    return gradient | {"kernel": kernel}


def conv3x3(x: jax.Array, params: Params) -> jax.Array:
    """A 3x3 convolution, stride 1, zero padding, of x [batch, height, width, channels].

    Its parameters come through `taps`.
    """
    kernel = params["kernel"].astype(x.dtype)
    if kernel.ndim == 4:
        return _biased(_conv(x, kernel), params)
    _, height, width, _ = x.shape
    n = kernel.shape[-1] // 9
    # All nine taps in one product with few columns; then their results, shifted, are added up.
    results = (_rows(x) @ kernel).reshape(*x.shape[:-1], 9 * n)
    results = jnp.pad(results, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        results[:, i : i + height, j : j + width, (3 * i + j) * n : (3 * i + j + 1) * n]
        for i in range(3)
        for j in range(3)
    ]
    return _biased(sum(shifted), params)


def conv3x3_backward(x: jax.Array, dy: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `conv3x3`."""
    kernel = params["kernel"].astype(x.dtype)
    if kernel.ndim == 4:
        # In bfloat16 the kernel's gradient is rounded to it, as in any flax network: for a float32
        # result XLA:GPU converts operands, and DenseNet-BC-100's step moves 4 % more.
        dx, dkernel = jax.vjp(_conv, x, kernel)[1](dy)
        return dx, {"kernel": dkernel.astype(params["kernel"].dtype)} | _bias_gradient(dy, params)
    _, height, width, _ = x.shape
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
    dx = (_rows(columns) @ kernel.T).reshape(x.shape)
    dkernel = _transposed_product(x, columns, params["kernel"].dtype)
    return dx, {"kernel": dkernel} | _bias_gradient(dy, params)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _conv(x, kernel, stride=1, padding=((1, 1), (1, 1))):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def _conv_of_few(x, kernel, stride, padding):
    """As `_conv`; the gradient of its kernel is in products where the plan wants them."""
    return _narrow_conv(x, varying_as(x, kernel), stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _narrow_conv(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding)


def _narrow_conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _narrow_conv_backward(stride, padding, saved, dy):
    x, kernel = saved
    dx = jax.vjp(lambda x: _conv(x, kernel, stride, padding), x)[1](dy)[0]

    def of_kernel(plan, x, kernel, dy):
        if plan.products and len(x):
            gradient = _kernel_gradient(plan, x, kernel.shape, dy, stride, padding)
            return gradient.astype(kernel.dtype)
        return jax.vjp(lambda kernel: _conv(x, kernel, stride, padding), kernel)[1](dy)[0]

    return dx, per_platform(of_kernel, x, kernel, dy)


_narrow_conv.defvjp(_narrow_conv_forward, _narrow_conv_backward)


def _kernel_gradient(plan, x, shape, dy, stride, padding):
    """The gradient, at least float32, of the kernel of a convolution with few input channels.

    A stride is undone first: squares of so many pixels become channels, the stride becomes 1. What
    is left are matrix products. DenseNet-121's stem takes half of the time of XLA's convolution.
    """
    batch, rows, columns, _ = dy.shape
    steps = [-(-size // stride) for size in shape[:2]]
    sizes = [(n + more - 1) * stride for n, more in zip((rows, columns), steps, strict=True)]
    margins = [
        (low, size - low - length, 0)
        for (low, _), size, length in zip(padding, sizes, x.shape[1:3], strict=True)
    ]
    none = (0, 0, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), (none, *margins, none))
    x = x.reshape(batch, sizes[0] // stride, stride, sizes[1] // stride, stride, -1)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*(x.shape[n] for n in (0, 1, 3)), -1)
    size = divisor(batch, plan.piece_bytes / (x.nbytes * steps[1] / batch))

    def add(number, gradient):
        part, of_part = (lax.dynamic_slice_in_dim(y, number * size, size) for y in (x, dy))
        part = jnp.concatenate([part[:, :, j : j + columns] for j in range(steps[1])], axis=-1)
        products = [
            _transposed_product(part[:, i : i + rows], of_part, gradient.dtype)
            for i in range(steps[0])
        ]
        return gradient + jnp.stack(products)

    shape_of_sum = (steps[0], steps[1] * x.shape[-1], shape[-1])
    gradient = jnp.zeros_like(wide(dy), shape=shape_of_sum)
    gradient = lax.fori_loop(0, batch // size, add, gradient)
    gradient = gradient.reshape(*steps, stride, stride, *shape[2:]).transpose(0, 2, 1, 3, 4, 5)
    gradient = gradient.reshape(steps[0] * stride, steps[1] * stride, *shape[2:])
    return gradient[: shape[0], : shape[1]]


def _biased(y, params):
    return y + pixelwise(params["bias"].astype(y.dtype)) if "bias" in params else y


def _bias_gradient(dy, params):
    return {"bias": dy.sum((0, 1, 2), dtype=params["bias"].dtype)} if "bias" in params else {}


def _transposed_product(narrow, broad, dtype):
    """narrow^T broad, over all pixels: the operand that is transposed is the smaller one."""
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(_rows(narrow), _rows(broad), contract, preferred_element_type=dtype)
