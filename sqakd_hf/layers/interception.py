"""Quantization inside a module's own forward: attention products, weights applied without their layer, outputs.

Such modules keep their code. While it runs, a [`TorchFunctionMode`] hands the functions it calls quantized operands.
"""

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._text import quote
from ..errors import InputError
from ..quantization.quantizers import FakeQuantizer
from .quantized_layer import QuantizedLayer


logger = logging.getLogger(__name__)

# Functions that apply a weight to an input: `function(input, weight, ...)`.
WEIGHTED = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__}
SOFTMAX = {F.softmax, torch.softmax, torch.Tensor.softmax}
PRODUCTS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__, torch.einsum}


def input_and_weight(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the first two arguments of one of `WEIGHTED`, however they were passed."""
    return (
        args[0] if args else kwargs.get("input"),
        args[1] if len(args) > 1 else kwargs.get("weight"),
    )


class AttentionQuantizers(nn.Module):
    """The quantizers of attention's two products, queries by keys and probabilities by values."""

    def __init__(self, query: FakeQuantizer, key: FakeQuantizer, value: FakeQuantizer, probability: FakeQuantizer):
        super().__init__()
        self.query_quantizer = query
        self.key_quantizer = key
        self.value_quantizer = value
        self.probability_quantizer = probability


class InterceptedModule(nn.Module):
    """Mixin for a module whose forward is intercepted, see [`intercept`]."""

    bypassed_layers: tuple[str, ...] = ()
    planned_fused: bool | None = None
    told_of_missed = False
    float_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output_quantizer = self._modules.get("output_quantizer")
        if not self.bypassed_layers and "attention_quantizers" not in self._modules:
            return output_quantizer(super().forward(*args, **kwargs))
        with self._as_planned(), _Interceptor(self) as interceptor:
            output = super().forward(*args, **kwargs)
        if output_quantizer is not None:
            output = output_quantizer(output)
        if missed := [name for name in self.bypassed_layers if name not in interceptor.met_layers]:
            self._warn_of_missed(missed)
        if interceptor.quantizers is not None and not interceptor.met_attention:
            raise InputError(
                f"{self.float_class.__name__} was quantized, but now computes attention by a function that can't be. "
                "Use attn_implementation='sdpa' or 'eager', as when it was quantized."
            )
        return output

    def _warn_of_missed(self, missed: list[str]) -> None:
        """Say once that weights are used in another way than when the model was quantized, which leaves them float."""
        if not self.told_of_missed:
            self.told_of_missed = True
            logger.warning(
                "%s computed without the quantized weights of %s, which it applied itself when it was quantized: that "
                "computation is in float.",
                self.float_class.__name__,
                quote(missed),
            )

    @contextlib.contextmanager
    def _as_planned(self) -> Iterator[None]:
        """Compute attention in the way that its ranges are for, whatever timm's switch or environment says now."""
        asked = getattr(self, "fused_attn", None)
        if self.planned_fused in (None, asked):
            yield
            return
        self.fused_attn = self.planned_fused
        try:
            yield
        finally:
            self.fused_attn = asked

    def __reduce_ex__(self, protocol: int):
        # The class exists in memory only.
        return _rebuild, (self.float_class,), vars(self)


def intercept(
    module: nn.Module,
    bypassed: Iterable[str] = (),
    attention_quantizers: AttentionQuantizers | None = None,
    output_quantizer: FakeQuantizer | None = None,
    fused: bool | None = None,
) -> None:
    """Make `module` quantize inside its own forward, or what that returns, in place.

    Args:
        module (`nn.Module`): The module; its class becomes a subclass that intercepts.
        bypassed (`list[str]`): Names of children, quantized layers, whose weight the module applies itself.
        attention_quantizers (`AttentionQuantizers`, *optional*): Applied to the operands of its attention.
        output_quantizer (`FakeQuantizer`, *optional*): Applied to its output, one tensor.
        fused (`bool`, *optional*): What timm's `fused_attn` is while it runs; `None` leaves that as it is.
    """
    if not isinstance(module, InterceptedModule):
        module.__class__ = _intercepted(type(module))
    module.bypassed_layers = (*module.bypassed_layers, *bypassed)
    if attention_quantizers is not None:
        module.attention_quantizers = attention_quantizers
        module.planned_fused = fused
    if output_quantizer is not None:
        module.output_quantizer = output_quantizer


def release(module: InterceptedModule) -> None:
    """Undo [`intercept`], in place."""
    module.__class__ = module.float_class
    for name in ("attention_quantizers", "output_quantizer"):
        module._modules.pop(name, None)
    for name in ("bypassed_layers", "planned_fused", "told_of_missed"):
        vars(module).pop(name, None)


@functools.cache
def _intercepted(cls: type[nn.Module]) -> type[InterceptedModule]:
    # The name ends as it did: transformers looks for that.
    return type(
        f"Intercepted{cls.__name__}", (InterceptedModule, cls), {"__module__": cls.__module__, "float_class": cls}
    )


def _rebuild(cls: type[nn.Module]) -> InterceptedModule:
    new = _intercepted(cls)
    return new.__new__(new)


class _Interceptor(TorchFunctionMode):
    """Active for one forward of one module."""

    def __init__(self, module: InterceptedModule):
        super().__init__()
        self.layers: dict[str, QuantizedLayer] = {name: module._modules[name] for name in module.bypassed_layers}
        self.met_layers: set[str] = set()
        self.quantizers: AttentionQuantizers | None = module._modules.get("attention_quantizers")
        self.probabilities: list[torch.Tensor] = []
        self.met_attention = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.layers and func in WEIGHTED:
            x, weight = input_and_weight(args, kwargs)
            for name, layer in self.layers.items():
                if weight is layer.stored_weight:
                    self.met_layers.add(name)
                    rest = {name: value for name, value in kwargs.items() if name not in ("input", "weight")}
                    return func(layer.quantized_input(x), layer.quantized_weight(), *args[2:], **rest)
        if self.quantizers is None:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.met_attention = True
            return self._attention(*args, **kwargs)
        if func in SOFTMAX:
            self.met_attention = True
            output = self.quantizers.probability_quantizer(func(*args, **kwargs))
            self.probabilities.append(output)
            return output
        if func in PRODUCTS:
            return func(*self._quantized_operands(args), **kwargs)
        output = func(*args, **kwargs)
        if args and self._is_probability(args[0]) and isinstance(output, torch.Tensor):
            self.probabilities.append(output)  # dropped out, cast, reshaped
        return output

    def _is_probability(self, x: Any) -> bool:
        return any(x is probability for probability in self.probabilities)

    def _quantized_operands(self, args: tuple) -> list[Any]:
        first = next(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor))
        left, right = args[first : first + 2]
        if self._is_probability(left):
            right = self.quantizers.value_quantizer(right)
        elif self._is_probability(right):
            left = self.quantizers.value_quantizer(left)
        else:
            left, right = self.quantizers.query_quantizer(left), self.quantizers.key_quantizer(right)
        return [*args[:first], left, right, *args[first + 2 :]]

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Compute `scaled_dot_product_attention` in steps, since fused kernels hide the probabilities."""
        quantizers = self.quantizers
        query, key = quantizers.query_quantizer(query), quantizers.key_quantizer(key)
        value = quantizers.value_quantizer(value)
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, float("-inf"))
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
            )
        probabilities = scores.softmax(-1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Who sees nothing gets zeros, as from the fused kernels.
            probabilities = probabilities.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
        probabilities = quantizers.probability_quantizer(probabilities)
        return F.dropout(probabilities, dropout_p) @ value
