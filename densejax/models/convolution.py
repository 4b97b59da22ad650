"""Convolutions, and how each platform computes them best."""

import contextlib
import contextvars
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from densejax.models.normalization import at_least_float32, per_channel, sum_over, varying_like
from densejax.models.sharding import EXAMPLES, WHOLE, by_device

Params = dict[str, jax.Array]  # "kernel", and "bias" where the convolution has one

CACHE_SIZE = "/sys/devices/system/cpu/cpu0/cache/index2/size"  # such as "512K"
# The kernel's gradient of a depthwise convolution takes at most so many rows per loop iteration.
ROWS_AT_ONCE = 56


@dataclasses.dataclass(frozen=True)
class Plan:
    """How convolutions and dense blocks are computed on a platform; results differ by rounding.

    Attributes:
      piece_bytes: a batch is computed in pieces; the widest array of a piece has about so many
        bytes.
      products: whether narrow 3x3 convolutions are computed as matrix products, whose results are
        shifted and added up.
      new_gradients: whether the backward pass of a dense block makes a new gradient for each layer,
        of only those channels that are still needed; otherwise it updates one buffer in place.
      batch_multiple: in a dense block the batch is the fastest axis in memory if its size is a
        multiple of this number; 0: never.
      channels_first: whether all pixels of a channel lie together in memory while a dense block
        trains. Its 3x3 convolutions are then such products, too: cuDNN would want another layout.
      core_bytes: replaces `piece_bytes` if there is a CPU device for each core; None: never.
      shared_code: whether XLA is not told at which channels a layer of a dense block writes. Then
        all layers share the machine code that writes there and that reads the gradient there.
    """

    piece_bytes: float = float("inf")
    products: bool = False
    new_gradients: bool = False
    batch_multiple: int = 0
    channels_first: bool = False
    core_bytes: float | None = None
    shared_code: bool = False

    def most_bytes(self) -> float:
        """The size of a piece: `core_bytes` if each core is a CPU device, else `piece_bytes`."""
        if self.core_bytes is None or jax.default_backend() != "cpu":
            return self.piece_bytes
        return self.core_bytes if cores() <= jax.local_device_count() else self.piece_bytes

    def with_layout(self, x: jax.Array) -> jax.Array:
        """The features of a dense block, or their gradient, in the plan's layout in memory."""
        if self.channels_first:
            return with_layout_constraint(x, Layout((3, 0, 1, 2)))
        batch = x.shape[0]  # an exported program may leave it open
        if not self.batch_multiple or not isinstance(batch, int) or batch % self.batch_multiple:
            return x
        return with_layout_constraint(x, Layout((1, 2, 3, 0)))


PLANS = {
    # If each core is a device, a few arrays of a piece should fit into the core's own cache of 1 or
    # 2 MB. If one device uses several cores, XLA distributes every piece among them, which takes
    # time: there should be fewer pieces. On two cores of an Intel Xeon, DenseNet-BC-100's step took
    # 0.99 s with pieces of 0.25 MB and 1.12 s with 2 MB if each core was a device. With one device
    # it took 1.80 and 1.66 s.
    # With shared machine code, DenseNet-BC-100's step compiles in 0.8 of the time on an AMD EPYC.
    "cpu": Plan(piece_bytes=2e6, products=True, core_bytes=2.5e5, shared_code=True),
    # With a new gradient for each layer, one kernel of XLA:TPU computes the product, adds it to the
    # gradient and sums the gradient for BatchNorm. Otherwise XLA would write the gradient and read
    # it again. One kernel is possible if the product and the features have the same layout; without
    # `batch_multiple`, XLA chooses another layout after a transition. With 128 images, the step of
    # DenseNet-BC-100 then reads and writes 10.7 GiB on a v5e instead of 12.1.
    "tpu": Plan(new_gradients=True, batch_multiple=128),
    # In this layout, statistics and the sums for BatchNorm's gradients are sums along rows, which
    # XLA:GPU computes fast. DenseNet-BC-100's step with 256 images took 16.0 ms on an H100 instead
    # of 24.7 ms; with the layout alone it took 21.3 ms, with products alone 24.3 ms. All were timed
    # without the barrier that in_place.py has after each layer for this plan.
    "cuda": Plan(new_gradients=True, channels_first=True),
    "default": Plan(),
}


_platform = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Within its context, functions are traced for this platform ("cpu", "tpu", ...) alone."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def per_platform(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(plan, *arguments), with the plan of the platform that it is compiled for."""
    if platform := _platform.get():
        platform = {"gpu": "cuda"}.get(platform, platform)  # as JAX calls their devices
        return function(PLANS.get(platform, PLANS["default"]), *arguments)
    return lax.platform_dependent(
        *arguments,
        **{name: lambda *x, plan=plan: function(plan, *x) for name, plan in PLANS.items()},
    )


def quick_compilation(platform: str) -> dict[str, int] | None:
    """Options of `jax.jit` for a program that runs once.

    XLA:CPU would optimise the drawing of a network's parameters for minutes, and gain nothing.
    """
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else None


class Convolution(nn.Module):
    """A convolution with nn.Conv's parameters and PyTorch's padding: half the kernel on every side.

    At stride 2, flax's "SAME" would shift the image by one pixel. A kernel of even size reads
    patches: it has no padding. With `groups`, an output reads only the inputs of its own group.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int
    use_bias: bool
    dtype: Any
    kernel_init: nn.initializers.Initializer
    groups: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, affine: tuple[jax.Array, jax.Array] | None = None
    ) -> jax.Array:
        """Convolves x [batch, height, width, channels]; `affine` is folded into the parameters."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        params = {"kernel": self.param("kernel", self.kernel_init, shape)}
        if self.use_bias:
            params["bias"] = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        if affine is not None:
            params = fold(params, *affine)
        x = x.astype(self.dtype)
        if self.kernel_size == (1, 1) and self.groups == 1:
            return pointwise(subsampled(x, self.strides), params)
        padding = tuple((size // 2 * (size % 2),) * 2 for size in self.kernel_size)
        kernel = params["kernel"].astype(x.dtype)
        if self.groups == x.shape[-1] == self.features > 1:
            y = _depthwise(x, varying_like(x, kernel), self.strides, padding)
        elif self.groups == 1:
            y = _product_conv(x, varying_like(x, kernel), self.strides, padding)
        else:
            y = _conv(x, kernel, self.strides, padding, self.groups)
        return _biased(y, params)


def cores() -> int:
    """The processor's hardware threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS lacks it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_bytes() -> int:
    """The second-level caches of all cores that this process may use; 2 MB each if unknown."""
    try:
        size = pathlib.Path(CACHE_SIZE).read_text().strip()
        return cores() * 1024 * int(size.removesuffix("K"))
    except (OSError, ValueError):  # only Linux has this file
        return cores() * 2**21


def subsampled(x: jax.Array, stride: int) -> jax.Array:
    """Every stride-th row and column of x [batch, height, width, channels]."""
    return lax.slice(x, (0,) * 4, x.shape, (1, stride, stride, 1)) if stride > 1 else x


def divisor(number: int, most: float) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max((n for n in range(1, number + 1) if n <= most and number % n == 0), default=1)


def fold(params: Params, slope: jax.Array, shift: jax.Array) -> Params:
    """Parameters of the convolution that gives slope * y + shift where the given one gives y."""
    bias = shift + params["bias"] * slope if "bias" in params else shift
    return {"kernel": params["kernel"] * per_channel(slope), "bias": bias}


def pointwise(x: jax.Array, params: Params) -> jax.Array:
    """A 1x1 convolution, computed as a matrix product.

    XLA fuses the operations before and after it into a product, but not into a convolution.
    """
    y = _rows(x) @ params["kernel"][0, 0].astype(x.dtype)
    return _biased(y.reshape(*x.shape[:-1], y.shape[-1]), params)


def pointwise_backward(x: jax.Array, dy: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `pointwise`."""
    kernel = params["kernel"][0, 0].astype(x.dtype)
    dkernel = _transposed_product(dy, x, params["kernel"].dtype).T[None, None]
    dx = (_rows(dy) @ kernel.T).reshape(x.shape)
    return dx, {"kernel": dkernel} | _bias_gradient(dy, params)


def arrange_kernel(params: Params, plan: Plan) -> Params:
    """Parameters of a 3x3 convolution in the form that `conv3x3` takes.

    Where the plan wants products there, the kernel becomes a matrix [c_in, 9 c_out].
    """
    kernel = params["kernel"]
    if plan.products or plan.channels_first:
        kernel = kernel.transpose(2, 0, 1, 3).reshape(kernel.shape[2], -1)
    return params | {"kernel": kernel}


def restore_kernel(gradient: Params, plan: Plan) -> Params:
    """Undoes `arrange_kernel` for the gradient of a 3x3 convolution's parameters."""
    kernel = gradient["kernel"]
    if plan.products or plan.channels_first:
        kernel = kernel.reshape(kernel.shape[0], 3, 3, -1).transpose(1, 2, 0, 3)
    return gradient | {"kernel": kernel}


def conv3x3(x: jax.Array, params: Params) -> jax.Array:
    """A 3x3 convolution, stride 1, zero padding, of x [batch, height, width, channels].

    Its parameters come from `arrange_kernel`.
    """
    kernel = params["kernel"].astype(x.dtype)
    if kernel.ndim == 4:
        return _biased(_conv(x, kernel), params)
    batch, height, width, _ = x.shape
    n = kernel.shape[-1] // 9
    # One product applies each of the kernel's nine weights to each pixel. The nine results are
    # shifted to their places and added up.
    results = (_rows(x) @ kernel).reshape(*x.shape[:-1], 9 * n)
    results = jnp.pad(results, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # An index would become a gather in an exported program that leaves the batch size open.
    shifted = [
        lax.slice(
            results,
            (0, i, j, (3 * i + j) * n),
            (batch, i + height, j + width, (3 * i + j + 1) * n),
        )
        for i in range(3)
        for j in range(3)
    ]
    return _biased(sum(shifted), params)


def conv3x3_backward(x: jax.Array, dy: jax.Array, params: Params) -> tuple[jax.Array, Params]:
    """Gradients of x and of the parameters of `conv3x3`."""
    kernel = params["kernel"].astype(x.dtype)
    if kernel.ndim == 4:
        # In bfloat16 the kernel's gradient is rounded to bfloat16, as in any flax network. For a
        # float32 result XLA:GPU would convert the operands, and DenseNet-BC-100's step would move
        # 4 % more data.
        dx, dkernel = jax.vjp(_conv, x, kernel)[1](dy)
        return dx, {"kernel": dkernel.astype(params["kernel"].dtype)} | _bias_gradient(dy, params)
    _, height, width, _ = x.shape
    padded = jnp.pad(dy, ((0, 0), (1, 1), (1, 1), (0, 0)))
    # The output's gradient is narrow, so nine shifted copies of it are small. Both gradients are
    # products with these copies.
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


def _conv(x, kernel, stride=1, padding=((1, 1), (1, 1)), groups=1):
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, **settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product_conv(x, kernel, stride, padding):
    """`_conv`, but products give its kernel's gradient if a plan says so.

    XLA:CPU computes this gradient at a fifth to a half of the forward pass's speed.
    """
    return _conv(x, kernel, stride, padding)


def _product_conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _product_conv_backward(stride, padding, saved, dy):
    x, kernel = saved
    dx = jax.vjp(lambda x: _conv(x, kernel, stride, padding), x)[1](dy)[0]

    def of_kernel(plan, x, kernel, dy):
        if plan.products and len(x):
            settings = (plan, kernel.shape, stride, padding)
            return _over_devices(_kernel_gradient, x, dy, *settings).astype(kernel.dtype)
        return jax.vjp(lambda kernel: _conv(x, kernel, stride, padding), kernel)[1](dy)[0]

    return dx, per_platform(of_kernel, x, kernel, dy)


_product_conv.defvjp(_product_conv_forward, _product_conv_backward)


def _over_devices(gradient, x, dy, *settings):
    """The gradient of a kernel: the sum of each device's gradient for its share of x and dy."""

    def on_one(axes, x, dy):
        return sum_over(gradient(x, dy, *settings), axes)

    return by_device(on_one, (x, dy), (EXAMPLES, EXAMPLES), WHOLE)


def _kernel_gradient(x, dy, plan, shape, stride, padding):
    """The gradient, at least float32, of the kernel of a convolution.

    First the pixels of each square of stride x stride become channels, so that the stride becomes
    1. Then the gradient is a sum of matrix products. For DenseNet-121's stem this takes half of the
    time of XLA's convolution.
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
    most = max(plan.most_bytes(), 4 * math.prod(shape))  # each iteration reads and writes the sum
    size = divisor(batch, most / (x.nbytes * steps[1] / batch))
    # The operand that is transposed should be the narrower one. XLA would undo it for each product,
    # so the sum is transposed instead.
    widths = (steps[1] * x.shape[-1], shape[-1])
    order = -1 if widths[0] > widths[1] else 1

    def add(number, gradient):
        part, of_part = (lax.dynamic_slice_in_dim(y, number * size, size) for y in (x, dy))
        part = jnp.concatenate([part[:, :, j : j + columns] for j in range(steps[1])], axis=-1)
        products = [
            _transposed_product(*(part[:, i : i + rows], of_part)[::order], gradient.dtype)
            for i in range(steps[0])
        ]
        return gradient + jnp.stack(products)

    gradient = jnp.zeros_like(at_least_float32(dy), shape=(steps[0], *widths[::order]))
    gradient = lax.fori_loop(0, batch // size, add, gradient)
    gradient = gradient.swapaxes(1, 2) if order < 0 else gradient
    gradient = gradient.reshape(*steps, stride, stride, *shape[2:]).transpose(0, 2, 1, 3, 4, 5)
    gradient = gradient.reshape(steps[0] * stride, steps[1] * stride, *shape[2:])
    return gradient[: shape[0], : shape[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, padding):
    """A convolution of each channel by itself: a sum of shifted products if a plan says so.

    XLA:CPU's own convolution takes 10 to 30 times as long, backward and forward.
    """

    def forward(plan, x, kernel):
        if not plan.products:
            return _conv(x, kernel, stride, padding, x.shape[-1])
        return _sum_of_shifts(_padded(x, *padding), kernel, stride)

    return per_platform(forward, x, kernel)


def _depthwise_forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, saved, dy):
    def backward(plan, x, kernel, dy):
        if not (plan.products and len(x)):
            groups = x.shape[-1]
            return jax.vjp(lambda *x: _conv(*x, stride, padding, groups), x, kernel)[1](dy)
        # The transposed convolution: zeros between the pixels of dy, and the kernel turned by 180
        # degrees.
        margins = []
        for axis, (low, _) in enumerate(padding):
            before = kernel.shape[axis] - 1 - low
            after = x.shape[axis + 1] + low - stride * (dy.shape[axis + 1] - 1) - 1
            margins.append((before, after, stride - 1))
        dx = _sum_of_shifts(_padded(dy, *margins), kernel[::-1, ::-1], 1)
        x = _padded(x, *padding)
        gradient = _over_devices(_depthwise_kernel_gradient, x, dy, kernel.shape, stride)
        return dx, gradient.astype(kernel.dtype)

    return per_platform(backward, *saved, dy)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _padded(x, rows, columns):
    """x with (before, after) zeros around it, or (before, after, between)."""
    margins = [(0, 0, 0), (*rows, 0)[:3], (*columns, 0)[:3], (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), margins)


def _sum_of_shifts(x, kernel, stride):
    """The depthwise convolution of x without padding, summed in float32 at least.

    It loops over the images. If a layer norm follows a sum over the whole batch, XLA:CPU moves a
    part of the sum into the norm, and writes arrays between the two parts to memory.
    """
    rows, columns = kernel.shape[:2]
    last = [1 + (x.shape[n + 1] - kernel.shape[n]) // stride * stride for n in range(2)]

    def on_one(_, x, kernel):
        def of_image(image):
            image = at_least_float32(image)
            shifts = (
                image[i : i + last[0] : stride, j : j + last[1] : stride] * kernel[i, j][None]
                for i in range(rows)
                for j in range(columns)
            )
            return sum(shifts).astype(x.dtype)

        return lax.map(of_image, x)

    return by_device(on_one, (x, at_least_float32(kernel)), (EXAMPLES, WHOLE), EXAMPLES)


def _depthwise_kernel_gradient(x, dy, shape, stride):
    """The gradient, at least float32, of the kernel of a depthwise convolution without padding.

    Products are added up over the rows of an image, for all rows of the kernel at once. The image's
    columns and channels are kept apart, since the processor's vectors run along them; the columns
    are summed last.
    """
    batch, rows, columns, channels = dy.shape
    part = divisor(rows, ROWS_AT_ONCE)
    read = (1, stride * (part - 1) + shape[0], stride * (columns - 1) + 1, channels)

    def of_column(column):
        def add(number, total):
            image, row = number // (rows // part), number % (rows // part) * part
            inputs = lax.dynamic_slice(x, (image, stride * row, column, 0), read)
            inputs = at_least_float32(inputs)[0, :, ::stride]
            slopes = lax.dynamic_slice(dy, (image, row, 0, 0), (1, part, columns, channels))[0]
            slopes = at_least_float32(slopes)
            reads = (inputs[stride * i : stride * i + shape[0]] for i in range(part))
            return total + sum(x * slopes[i, None] for i, x in enumerate(reads))

        total = jnp.zeros_like(at_least_float32(dy), shape=(shape[0], columns, channels))
        return lax.fori_loop(0, batch * (rows // part), add, total).sum(1)

    return lax.map(of_column, jnp.arange(shape[1])).transpose(1, 0, 2)[:, :, None]


def _biased(y, params):
    return y + per_channel(params["bias"].astype(y.dtype)) if "bias" in params else y


def _bias_gradient(dy, params):
    return {"bias": dy.sum((0, 1, 2), dtype=params["bias"].dtype)} if "bias" in params else {}


def _transposed_product(narrow, broad, dtype):
    """narrow^T broad, over all pixels: the operand that is transposed is the smaller one."""
    contract = (((0,), (0,)), ((), ()))
    return lax.dot_general(_rows(narrow), _rows(broad), contract, preferred_element_type=dtype)
