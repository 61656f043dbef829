"""How far each quantized layer's output is from the same layer's in the teacher."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..conversion.student import parameter_shapes, quantized_layers
from ..conversion.trace import evaluating
from ..outputs.forward import run_model
from ..quantization.functional import widest_float


IMAGES = 8  # together: what all layers of both models put out is kept at once


@torch.no_grad()
def layer_sqnr(
    student: nn.Module, teacher: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]
) -> dict[str, float]:
    """Return each quantized layer's signal-to-quantization-noise ratio, in the model's order.

    `10 · log10(Σ teacher² / Σ (teacher - student)²)`, in dB, over all elements of the layer's output: 20 dB are an
    error of a tenth, 0 dB one as large as the signal. It holds what the layers before it did as well. Layers whose
    module is not called once are left out, and those whose outputs are not finite. A teacher of another architecture
    has nothing to compare: the result is empty.

    Args:
        student (`nn.Module`): A calibrated student.
        teacher (`nn.Module`): The model it was copied from, or another with the same weights by name and shape, on the
            same device.
        batches (`Iterable`): Images `(B, C, H, W)` on that device, as both take them, or dicts with `pixel_values`
            (and `pixel_mask`). Both run in eval mode; their own mode is restored.
    """
    names = list(quantized_layers(student)) if parameter_shapes(student) == parameter_shapes(teacher) else []
    sums: dict[str, torch.Tensor] = {}
    with evaluating(student), evaluating(teacher):
        for inputs in _few_at_a_time(batches):
            expected, found = (_outputs(model, names, inputs) for model in (teacher, student))
            for name in found.keys() & expected.keys():
                wide = widest_float(expected[name].device)
                signal, value = expected[name].to(wide), found[name].to(wide)
                if signal.shape == value.shape:
                    pair = torch.stack([signal.square().sum(), (signal - value).square().sum()])
                    sums[name] = sums[name] + pair if name in sums else pair
    tiny = torch.finfo(torch.float32).tiny
    in_order = {name: sums[name].clamp(min=tiny) for name in names if name in sums}
    ratios = {name: 10 * float(torch.log10(signal / noise)) for name, (signal, noise) in in_order.items()}
    return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def _few_at_a_time(batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        inputs = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
        tensors = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        for pieces in zip(*(tensor.split(IMAGES) for tensor in tensors.values()), strict=True):
            yield dict(zip(tensors, pieces, strict=True))


def _outputs(model: nn.Module, names: Iterable[str], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a model and return what these modules put out, if that is one tensor and they were called once."""
    calls: dict[str, list] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, n=name: calls[n].append(output))
        for name in names
    ]
    try:
        run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: outputs[0]
        for name, outputs in calls.items()
        if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor)
    }
