"""How far each quantized layer's output is from the same layer's in the teacher."""

from collections.abc import Iterable

import torch
from torch import nn

from .convert import quantized_layers
from .outputs import run_model
from .trace import evaluating


@torch.no_grad()
def layer_sqnr(student: nn.Module, teacher: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Return each quantized layer's signal-to-quantization-noise ratio, in the model's order.

    `10 · log10(Σ teacher² / Σ (teacher - student)²)`, in dB, over all elements of the layer's output: 20 dB are an
    error of a tenth, 0 dB one as large as the signal. It holds what the layers before it did as well. Layers that the
    teacher has not, or whose module is not called, are left out; so are layers that are called several times.

    Args:
        student (`nn.Module`): A calibrated student.
        teacher (`nn.Module`): The model it was copied from, on the same device.
        batches (`Iterable[torch.Tensor]`): Images `(B, C, H, W)` on that device, as both take them. Both run in eval
            mode; their own mode is restored.
    """
    names = [name for name in quantized_layers(student) if _has(teacher, name)]
    sums: dict[str, torch.Tensor] = {}
    with evaluating(student), evaluating(teacher):
        for images in batches:
            expected, found = (_outputs(model, names, images) for model in (teacher, student))
            for name in found.keys() & expected.keys():
                signal, value = expected[name].double(), found[name].double()
                if signal.shape == value.shape:
                    pair = torch.stack([signal.square().sum(), (signal - value).square().sum()])
                    sums[name] = sums[name] + pair if name in sums else pair
    tiny = torch.finfo(torch.float32).tiny
    in_order = {name: sums[name].clamp(min=tiny) for name in names if name in sums}
    return {name: 10 * float(torch.log10(signal / noise)) for name, (signal, noise) in in_order.items()}


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _outputs(model: nn.Module, names: Iterable[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model and return what these modules put out, if that is one tensor and they were called once."""
    calls: dict[str, list] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, n=name: calls[n].append(output))
        for name in names
    ]
    try:
        run_model(model, {"pixel_values": images})
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: outputs[0]
        for name, outputs in calls.items()
        if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor)
    }
