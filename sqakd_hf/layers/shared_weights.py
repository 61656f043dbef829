"""One quantization of each weight for all the batches whose gradients an optimizer step accumulates."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .quantized_layer import QuantizedLayer


class SharedWeights:
    """Let the batches of an optimizer step share the quantized weights of `model`.

    The quantized weight is computed for the first batch. All batches but the last use it as a leaf, which gathers
    their gradients; the last goes through its graph, and takes what was gathered along. Parameters get their gradient
    in the last backward alone, which is where DDP expects it. With element-wise gradient scaling the sum is scaled,
    as for one large batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
        self._shared: dict[QuantizedLayer, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextlib.contextmanager
    def batch(self, is_last: bool) -> Iterator[None]:
        """Context of the forward and backward of one batch; `is_last` before the optimizer steps."""
        try:
            if not self._shared and not is_last:
                self._quantize()
            for layer, (quantized, leaf) in self._shared.items():
                layer.shared_weight = quantized if is_last else leaf
            if is_last:
                self._pass_on()
            yield
            if is_last:
                self._pass_on_unused()
        except BaseException:
            self._shared.clear()
            raise
        finally:
            for layer in self._layers:
                layer.shared_weight = None
            if is_last:
                self._shared.clear()

    def _quantize(self) -> None:
        for layer in self._layers:
            quantized = layer.quantized_weight()
            if quantized.requires_grad and not quantized.is_leaf:
                self._shared[layer] = quantized, quantized.detach().requires_grad_()

    def _pass_on(self) -> None:
        """Let what the leaves gathered join the gradient that arrives from the last batch."""
        for quantized, leaf in self._shared.values():

            def join(gradient: torch.Tensor, leaf: torch.Tensor = leaf) -> torch.Tensor:
                gathered, leaf.grad = leaf.grad, None
                return gradient if gathered is None else gathered + gradient

            quantized.register_hook(join)

    def _pass_on_unused(self) -> None:
        """Pass on what the leaves of layers gathered that the last batch went around, such as dropped ones."""
        for quantized, leaf in self._shared.values():
            gathered, leaf.grad = leaf.grad, None
            if gathered is not None:
                quantized.backward(gathered)
