"""The unified quantizer: clip, normalise, round, de-normalise, with a straight-through or scaled gradient.

One affine map serves every quantizer: `value = (code - zero_point) * scale` with integer codes `0 ... levels - 1`.
Arithmetic is ordered so that no compiler can contract it (`x / scale + zero_point`, `(code - zero_point) * scale`):
the eager and the compiled form give the same bits on a CPU.
"""

import functools
import itertools
import logging
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


logger = logging.getLogger(__name__)

# Below this size a compiled kernel saves less than compiling it costs. On a GPU launches dominate: always fuse there.
_MIN_FUSED_NUMEL = 1 << 15
# The narrowest range: keeps `scale` positive and `1 / scale` finite in float32.
MIN_RANGE = 1e-6


class Grid(NamedTuple):
    """The values a quantizer can take, without gradient: each field is 1-D float, `(1,)` or `(channels,)`.

    `lower` and `upper` bound the elements that pass a gradient; `scale` and `zero_point` map codes to values.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor


@torch.no_grad()
def affine_grid(lower: torch.Tensor, upper: torch.Tensor, levels: int, integer_zero_point: bool = False) -> Grid:
    """Return the grid of `levels` equidistant values from `lower` to `upper`.

    Args:
        lower (`torch.Tensor`): Lower end of the clip range, 1-D.
        upper (`torch.Tensor`): Upper end, same shape; raised to `lower + MIN_RANGE` where it is below.
        levels (`int`): Number of codes, `2 ** bits`.
        integer_zero_point (`bool`, *optional*, defaults to `False`):
            Widen the range to contain zero and shift it by less than half a step so that zero is exactly a grid
            value, as integer kernels and zero padding want it.

    Examples:
        >>> grid = affine_grid(torch.tensor([-0.9]), torch.tensor([2.1]), levels=4, integer_zero_point=True)
        >>> grid.scale.item(), grid.zero_point.item()
        (1.0, 1.0)
    """
    lower, upper = lower.detach(), upper.detach()
    # Relative as well: far from zero, float32 does not resolve the absolute floor.
    floor = (lower.abs() * MIN_RANGE).clamp(min=MIN_RANGE)
    if not integer_zero_point:
        upper = torch.maximum(upper, lower + floor)
        scale = (upper - lower) / (levels - 1)
        return Grid(lower, upper, scale, -lower / scale)
    lower = lower.clamp(max=0)
    upper = torch.maximum(upper.clamp(min=0), lower + floor)
    scale = (upper - lower) / (levels - 1)
    zero_point = torch.round(-lower / scale).clamp(0, levels - 1)
    return Grid(-zero_point * scale, (levels - 1 - zero_point) * scale, scale, zero_point)


def fake_quantize(
    x: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    levels: int,
    *,
    grid: Grid | None = None,
    delta: float = 0.0,
    channel_axis: int | None = None,
    binary: bool = False,
    clip_only: bool = False,
) -> torch.Tensor:
    """Round `x` to the grid, with the unified gradient of SQAKD.

    With `x_n = (x - lower) / (upper - lower)`, its rounded form `x_q`, the upstream gradient `g` and
    `kappa = 1[lower <= x <= upper] * (1 + delta * sign(g) * (x_n - x_q))`:

        dL/dx = g * kappa     dL/dupper = sum g * (x_q - kappa * x_n)     dL/dlower = sum g * (1 - kappa) - dL/dupper

    `delta=0` is the straight-through estimator, `delta > 0` the element-wise gradient scaling of
    [EWGS](https://huggingface.co/papers/2104.00903). SQAKD writes the same as `g + mu * (x_n - x_q)` with
    `mu = delta * |g|`.

    Args:
        x (`torch.Tensor`): Any shape; floating point. Arithmetic runs in the wider of its dtype and the grid's.
        lower (`torch.Tensor`): 1-D, `(1,)` or `(channels,)`; takes the gradient of the lower end.
        upper (`torch.Tensor`): Same shape; takes the gradient of the upper end.
        levels (`int`): Number of codes, `2 ** bits`.
        grid (`Grid`, *optional*): The values used in the forward where they differ from the learned ends (an integer
            zero point, a floor): gradients go to `lower` and `upper` as if these were the grid's ends.
        delta (`float`, *optional*, defaults to 0.0): Gradient scaling factor, non-negative.
        channel_axis (`int`, *optional*): The axis of `x` that `lower` and `upper` run along; `None`: one range.
        binary (`bool`, *optional*, defaults to `False`): Two levels split at their midpoint, which belongs to the
            upper one: `sign(0) = +1`.
        clip_only (`bool`, *optional*, defaults to `False`): The range learns from clipped elements alone, and the
            upper end counts as clipped, as in [PACT](https://huggingface.co/papers/1805.06085).

    Returns:
        `torch.Tensor`: Same shape and dtype as `x`.

    Examples:
        >>> x = torch.tensor([0.1, 0.6, 2.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.zeros(1), torch.ones(1), levels=4)
        >>> y
        tensor([0.0000, 0.6667, 1.0000], grad_fn=<_FakeQuantizeBackward>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 1., 0.])
    """
    grid = affine_grid(lower.detach(), upper.detach(), levels) if grid is None else grid
    if torch.jit.is_tracing():
        scale, zero_point = along(grid.scale, x, channel_axis), along(grid.zero_point, x, channel_axis)
        return _traced(x.detach(), scale, zero_point, levels - 1, binary)
    return _FakeQuantize.apply(x, lower, upper, grid, levels - 1, float(delta), channel_axis, binary, clip_only)


@torch.no_grad()
def quantize(
    x: torch.Tensor, grid: Grid, levels: int, *, channel_axis: int | None = None, binary: bool = False
) -> torch.Tensor:
    """Return the integer codes of `x`, `uint8` in `[0, levels - 1]`, by the arithmetic of [`fake_quantize`].

    Examples:
        >>> quantize(torch.tensor([0.1, 0.6, 2.0]), affine_grid(torch.zeros(1), torch.ones(1), 4), levels=4)
        tensor([0, 2, 3], dtype=torch.uint8)
    """
    scale, zero_point = along(grid.scale, x, channel_axis), along(grid.zero_point, x, channel_axis)
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    return _code(wide, scale, zero_point, levels - 1, binary).to(torch.uint8)


@torch.no_grad()
def dequantize(codes: torch.Tensor, grid: Grid, *, channel_axis: int | None = None) -> torch.Tensor:
    """Return the values of integer `codes`, in the grid's dtype.

    Examples:
        >>> dequantize(torch.tensor([0, 2, 3]), affine_grid(torch.zeros(1), torch.full((1,), 3.0), 4))
        tensor([0., 2., 3.])
    """
    scale, zero_point = along(grid.scale, codes, channel_axis), along(grid.zero_point, codes, channel_axis)
    # In place: whole models are unpacked this way.
    return codes.to(scale.dtype, copy=True).sub_(zero_point).mul_(scale)


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def along(values: torch.Tensor, x: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """View 1-D `values` so that they broadcast along `channel_axis` of `x`."""
    if channel_axis is None or values.numel() == 1:
        return values.view([1] * x.dim())
    return values.view([-1 if axis == channel_axis % x.dim() else 1 for axis in range(x.dim())])


# --- element-wise bodies: eager as they stand, one kernel each when compiled -----------------------------------------
# In place wherever a tensor is their own: the eager form is bound by the memory that it touches. One division an
# element: the codes need it, everything else divides by `qmax` after the sums.


def _code(x, scale, zero_point, qmax, binary):
    if binary:
        return (x >= (0.5 - zero_point) * scale).to(x.dtype)
    return _rounded(x / scale, zero_point, qmax)


def _rounded(steps, zero_point, qmax):
    """Return the codes of `x` in units of `scale`, whose memory is used for that.

    Whole zero points are added after rounding, as QuantizeLinear of ONNX and every engine do: before it, ties would go
    to the other side where they are odd, and adding a large one to a small number makes new ties.
    """
    whole = zero_point.floor()
    return steps.add_(zero_point - whole).round_().add_(whole).clamp_(0, qmax)


def _forward(x, scale, zero_point, qmax, binary):
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    return _code(wide, scale, zero_point, qmax, binary).sub_(zero_point).mul_(scale).to(x.dtype)


def _traced(x, scale, zero_point, qmax, binary):
    """[`_forward`] for `torch.jit.trace`, without changes in place: OpenVINO, which reads such graphs, takes none."""
    whole = zero_point.floor()
    if binary:
        code = (x >= (0.5 - zero_point) * scale).to(scale.dtype)
    else:
        code = (torch.round(x / scale + (zero_point - whole)) + whole).clamp(0, qmax)
    return ((code - zero_point) * scale).to(x.dtype)


def _backward(x, grad, lower, upper, scale, zero_point, slope, qmax, binary, clip_only, want_x, want_range):
    """Return the gradient of `x` or `None`, and what sums up to those of the range, see [`_range_gradients`].

    `slope` is `delta / qmax`, or `None` for the straight-through estimator.
    """
    wide = torch.promote_types(x.dtype, scale.dtype)
    x, g = x.to(wide), grad.to(wide)
    outside = ((x >= lower) & ((x < upper) if clip_only else (x <= upper))).logical_not()
    if slope is None:
        grad_x = g.masked_fill(outside, 0)
    if slope is not None or (want_range and not clip_only):
        steps = x / scale
        position = (steps + zero_point).clamp_(0, qmax)  # x_n in units of codes, before rounding
        code = _code(x, scale, zero_point, qmax, binary) if binary else _rounded(steps, zero_point, qmax)
    if slope is not None:
        kappa = (position - code).mul_(torch.sign(g)).mul_(slope).add_(1).masked_fill_(outside, 0)
        grad_x = g * kappa
    if not want_range:
        return grad_x.to(grad.dtype), None, None
    if clip_only:
        below, above = torch.where(x < lower, g, 0), torch.where(x >= upper, g, 0)
    else:
        below = g - grad_x
        kept = position.masked_fill_(outside, 0) if slope is None else position.mul_(kappa)
        above = code.sub_(kept).mul_(g)
    return grad_x.to(grad.dtype) if want_x else None, below, above


def _backward_flat(*args):
    """[`_backward`] on a flat `(n,)` or `(channels, n)` view, the range's parts summed over the last axis."""
    grad_x, below, above = _backward(*args)
    if below is None:
        return grad_x, None, None
    return grad_x, below.sum(-1, keepdim=True), above.sum(-1, keepdim=True)


def _range_gradients(below, above, qmax, clip_only):
    """Return the gradients of `lower` and of `upper` from the sums that [`_backward`] prepared."""
    if clip_only:
        return below, above
    grad_upper = above / qmax
    return below - grad_upper, grad_upper


class _FakeQuantize(torch.autograd.Function):
    """Saves `x` and the range only: what the backward needs beyond them costs less to recompute than to store."""

    @staticmethod
    def forward(ctx, x, lower, upper, grid, qmax, delta, channel_axis, binary, clip_only):
        ctx.save_for_backward(x, *grid)
        ctx.options = (qmax, delta, channel_axis, binary, clip_only)
        if _is_watched():
            return _forward(
                x, along(grid.scale, x, channel_axis), along(grid.zero_point, x, channel_axis), qmax, binary
            )
        flat, rows, like = _flatten(x, channel_axis)
        out = _run(_forward, flat, *(_column(v, rows) for v in grid[2:]), qmax, binary)
        return _unflatten(out, like, x, channel_axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *grid = ctx.saved_tensors
        qmax, delta, channel_axis, binary, clip_only = ctx.options
        want_x, want_range = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        flags = (qmax, binary, clip_only, want_x, want_range)
        if _is_watched():
            # Multiplied, and zero as well: where a graph depended on the number, dynamo would make it anew for others.
            slope = along(grid[0].new_ones(1).mul_(delta / qmax), x, channel_axis)
            zero = _late_zero(grad)
            columns = [along(v + zero, x, channel_axis) for v in grid]
            grad_x, below, above = _backward(x, grad, *columns, slope, *flags)
            if want_range:
                below, above = (_sum_along(v, grid[0], channel_axis) for v in (below, above))
        else:
            flat, rows, like = _flatten(x, channel_axis)
            flat_grad, _, _ = _flatten(grad, channel_axis, like)
            columns = [_column(v, rows) for v in grid]
            # A tensor, not a number: one compiled kernel serves every delta.
            slope = grid[0].new_full((1,), delta / qmax) if delta else None
            grad_x, below, above = _run(_backward_flat, flat, flat_grad, *columns, slope, *flags)
            grad_x = _unflatten(grad_x, like, x, channel_axis) if want_x else None
            if want_range:
                below, above = (v.flatten() if v.numel() == grid[0].numel() else v.sum(0) for v in (below, above))
        ranges = _range_gradients(below, above, qmax, clip_only) if want_range else (None, None)
        return grad_x, *ranges, None, None, None, None, None, None


def _is_watched() -> bool:
    """Tell whether single operations are wanted: by a graph that is compiled, or a mode (a FLOP counter, say)."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _late_zero(grad: torch.Tensor) -> torch.Tensor:
    """Return a zero, `(1,)`, that no compiler knows for one and that needs `grad`.

    What it is added to stays in the backward. A compiler that splits the graph would else compute masks and codes in
    the forward and keep them, several tensors for one `x`.
    """
    first = grad[(slice(0, 1),) * grad.dim()].flatten()
    return ((first != first) & (first == first)).float()


def _sum_along(values: torch.Tensor, like: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    if like.numel() == 1:
        return values.sum().view(1)
    others = [axis for axis in range(values.dim()) if axis != channel_axis % values.dim()]
    return values.sum(others) if others else values


# --- flat views ------------------------------------------------------------------------------------------------------


def _column(values: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Shape a 1-D range so that it broadcasts over a flat `(n,)` or `(rows, n)` view."""
    return values if rows is None else values.view(-1, 1)


def _flatten(
    x: torch.Tensor, channel_axis: int | None, like: torch.Tensor | None = None
) -> tuple[torch.Tensor, int | None, torch.Tensor]:
    """View `x` as `(n,)`, or `(channels, n)`, without a copy where its memory layout allows (channels-last does).

    With `like`, `x` is first brought to the layout of `like`, so that both flatten element by element alike.
    Returns the view, the number of rows (`None` for one range) and the tensor that has the layout.
    """
    if channel_axis is not None:
        x = x.movedim(channel_axis, 0)
    if like is None:
        like = x if _is_dense(x, channel_axis is not None) else x.contiguous()
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    if channel_axis is None:
        return _alias(x, (x.numel(),), (1,)), None, like
    rows = x.shape[0]
    return _alias(x, (rows, x.numel() // max(rows, 1)), (x.stride(0), 1)), rows, like


def _unflatten(flat: torch.Tensor, like: torch.Tensor, x: torch.Tensor, channel_axis: int | None) -> torch.Tensor:
    """Return the shape and memory layout of `x`; not a view, so that later layers may change it in place."""
    out = flat.as_strided(like.shape, like.stride())
    if channel_axis is not None:
        out = out.movedim(0, channel_axis)
    if out.stride() != x.stride() and _is_dense(x, False):
        return torch.empty_like(x, dtype=out.dtype).copy_(out)
    return _alias(out, out.shape, out.stride())


def _alias(x: torch.Tensor, shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """Return a tensor over the memory of `x` that is no view of it: dynamo compiles anew for each kind of base."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


def _is_dense(x: torch.Tensor, rows_outermost: bool) -> bool:
    """Tell whether the elements of `x` (and of each row of it) lie side by side in memory."""
    order = sorted((axis for axis in range(x.dim()) if x.shape[axis] > 1), key=lambda axis: -x.stride(axis))
    expected = 1
    for axis in reversed(order):
        if x.stride(axis) != expected:
            return False
        expected *= x.shape[axis]
    return not rows_outermost or x.stride(0) * x.shape[0] == x.numel()


# --- compiled or eager -----------------------------------------------------------------------------------------------


def _run(body: Callable, x: torch.Tensor, *args):
    """Run `body` as a fused kernel where that pays and a compiler works, else eagerly; the results are the same."""
    large = x.is_cuda or x.numel() >= _MIN_FUSED_NUMEL
    if not large or _compiler_failures:
        return body(x, *args)
    if torch._C._len_torch_function_stack():
        # Dynamo compiles anew for each stack of function modes, such as the one that watches attention.
        with torch.overrides._pop_mode_temporarily():
            return _run(body, x, *args)
    flags = tuple(a for a in args if isinstance(a, bool))
    dtypes = tuple(a.dtype for a in (x, *args) if isinstance(a, torch.Tensor))
    try:
        return _compiled(body, *_kind(x), dtypes, flags)(x, *args)
    except _COMPILER_ERRORS as error:
        _compiler_failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
        logger.info("Quantizers run without a compiled kernel, up to a third slower: %s", _compiler_failures[0])
        return body(x, *args)


def _kind(x: torch.Tensor) -> tuple:
    """Return what dynamo compiles anew for, dtypes and flags apart: sizes of 0 and 1, the device and two modes."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(min(size, 2) for size in x.shape), x.device, autocast, torch.is_inference_mode_enabled()


@functools.cache
def _compiled(body: Callable, *variant) -> Callable:
    """Compile `body` once for each variant of [`_kind`], dtypes and flags; other sizes and `qmax` stay symbolic.

    Each variant gets a code object of its own, with a name of its own lest two compare equal, because dynamo counts
    recompilations per code object and gives up at the eighth.
    """
    name = f"{body.__name__}_{next(_variants)}"
    own = types.FunctionType(body.__code__.replace(co_name=name), body.__globals__, name)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_exact_division())


def _exact_division() -> dict[str, bool]:
    """Return Inductor's option to divide on a GPU as eager torch does, correctly rounded.

    Its own division there is approximate, which moves values that lie next to the threshold between two codes. The
    option's name differs by version; 2.9 has none.
    """
    names = ("eager_numerics.division_rounding", "emulate_divison_rounding")
    known = torch._inductor.list_options()
    return {name: True for name in names if name in known}


_COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit, OSError)
_variants = itertools.count()
# Filled by the first failure to compile: nothing is compiled after it, and it is logged once.
_compiler_failures: list[str] = []
