"""Features inside student and teacher: the last output at each resolution, and what one layer's quantizer puts out."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .._text import suggest
from ..conversion.plan import QuantizationPlan
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer
from ..outputs.forward import run_model


class FeatureTap:
    """Keeps what chosen modules of a model put out, or what goes in, while it listens.

    Args:
        modules (`dict[str, nn.Module]`): Name → module.
        inputs (`bool`, *optional*, defaults to `False`): Keep the first input instead of the output.
    """

    def __init__(self, modules: Mapping[str, nn.Module], inputs: bool = False):
        self.features: dict[str, torch.Tensor] = {}
        self._listens = False
        self._handles = [
            module.register_forward_hook(
                lambda _, args, output, name=name: self._keep(name, args[0] if inputs else output)
            )
            for name, module in modules.items()
        ]

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        if self._listens:
            self.features[name] = tensor

    @contextlib.contextmanager
    def listening(self) -> Iterator[dict[str, torch.Tensor]]:
        """Context whose value holds the features by name once the model has run; they are let go at its end."""
        self._listens = True
        try:
            yield self.features
        finally:
            self._listens = False
            self.features.clear()


@torch.no_grad()
def find_stages(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Return, for each resolution, the outermost module that puts out features of it, in order of execution.

    Features are maps `(B, C, H, W)` or tokens `(B, N, C)`; of several outermost modules the last one counts. In a
    ResNet these are the stem and the stages, in a ViT the last block's normalised tokens. What has many more positions
    than what ran before it (attention's products, a decoder's maps) is no stage.

    Raises:
        `InputError`: No module puts out features, or they are of another layout.
    """
    # timm's models say it; its patch embeddings say it of what goes on to become tokens.
    models = [module for module in model.modules() if hasattr(module, "feature_info")]
    if any(getattr(each, "output_fmt", None) == "NHWC" for each in models):
        raise InputError(
            f"{type(model).__name__} has features (B, H, W, C); feature terms compare maps (B, C, H, W) and tokens. "
            "Use the terms 'kl' and 'ce' alone."
        )
    found: dict[tuple[int, ...], str] = {}
    handles = []

    def note(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() in (3, 4):
            positions = tuple(output.shape[2:] if output.dim() == 4 else output.shape[1:2])
            if positions not in found or name.count(".") <= found[positions].count("."):
                found.pop(positions, None)  # it moves to the end of the order
                found[positions] = name

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError(
            f"{type(model).__name__} has no feature maps (B, C, H, W) or tokens (B, N, C) to compare. Use "
            "the terms 'kl' and 'ce' alone."
        )
    stages, before = [], math.inf
    for positions, name in found.items():
        if math.prod(positions) <= 2 * before:  # a class token may join the others
            stages.append(name)
            before = math.prod(positions)
    return stages


def feature_maps(features: torch.Tensor) -> torch.Tensor:
    """Return features as `(B, C, H, W)`: tokens `(B, N, C)` become one column of positions."""
    return features if features.dim() == 4 else features.transpose(1, 2)[..., None]


def find_lattice_layer(student: nn.Module, name: str | None = None) -> str:
    """Return the quantized layer whose input the feature term of SQuaT compares.

    That is the last convolution of more than one pixel (ResNets: the last block's second), or without convolutions the
    last linear layer that widens its input (ViTs: the last block's first MLP layer), or else the last before the head.

    Args:
        student (`nn.Module`): After `quantize_model`.
        name (`str`, *optional*): Choose this layer.

    Raises:
        `InputError`: No such layer, one whose input is not quantized, or a student that was put together by hand.
    """
    plan: QuantizationPlan | None = getattr(student, "quantization_plan", None)
    if plan is None:
        raise InputError(
            "The term 'squat' looks for its layer in the plan of quantize_model, which this student was not made by."
        )
    names = [
        line.name
        for line in plan.quantized
        if line.activation_bits is not None and not line.bypassed and not line.reads_images
    ]
    if name is not None:
        if name not in names:
            raise InputError(
                f"feature_layer={name!r} is no layer whose quantized input can be compared.{suggest(name, names)}"
            )
        return name
    head = plan.layers[-1].name  # in float it is not among the names
    layers: dict[str, QuantizedLayer] = {name: student.get_submodule(name) for name in names if name != head}
    convolutions = [name for name, layer in layers.items() if layer.stored_weight.dim() > 2]
    wide = [name for name in convolutions if layers[name].stored_weight[0, 0].numel() > 1]
    widening = [name for name, layer in layers.items() if layer.stored_weight.shape[0] > layer.stored_weight.shape[1]]
    for found in (wide, convolutions, widening, list(layers)):
        if found:
            return found[-1]
    raise InputError("The student has no quantized input between its first and its last layer to compare.")
