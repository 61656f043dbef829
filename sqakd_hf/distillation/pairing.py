"""Which models can be student and teachers of one training."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..conversion.student import quantized_layers, require_planned_layers
from ..errors import InputError
from ..hub.loading import num_classes
from ..outputs.forward import require_classes
from .losses import check_same_classes


def require_student(model: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Raise `InputError` unless `model` is a student of `quantize_model` that can learn from these teachers."""
    require_planned_layers(model)
    require_classes(model)
    if not quantized_layers(model):
        raise InputError("The student is not quantized. Call quantize_model(model, QuantizationConfig(...)) first.")
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        raise InputError(
            "The student has quantized layers that quantize_model did not put there, and could not be saved. "
            "Use quantize_model, with overrides for single layers."
        )
    for teacher in teachers:
        if teacher is model:
            raise InputError("Student and teacher are one object. Use copy.deepcopy(model) before quantizing it.")
        if quantized_layers(teacher):
            raise InputError("The teacher is quantized. Pass the full-precision model.")
        require_classes(teacher)
        classes = num_classes(model), num_classes(teacher)
        if None not in classes:
            check_same_classes(*classes)
