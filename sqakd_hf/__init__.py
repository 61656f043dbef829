"""Self-supervised quantization-aware knowledge distillation for Hugging Face and timm vision models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .configuration import QuantizationConfig
from .convert import is_calibrated, quantize_model, quantized_layers
from .errors import ExportMismatchError, InputError
from .functional import fake_quantize
from .hf_quantizer import SQAKDHfQuantizer
from .layers import QuantizedLayer, register_quantized_layer
from .losses import distillation_loss
from .plan import LayerPlan, QuantizationPlan, plan_quantization
from .quantizers import FakeQuantizer, create_quantizer, list_quantizers, register_quantizer
from .reconstruction import Reconstruction, UnitResult, calibrate_model, reconstruct_model


if TYPE_CHECKING:
    from .collator import ImageCollator
    from .data import ImageData, load_image_data, split_holdout
    from .export import (
        DeployReport,
        ExportCheck,
        ExportReport,
        LatencyReport,
        deploy_report,
        export_onnx,
        measure_latency,
        verify_export,
    )
    from .interrupt import InterruptCallback
    from .metrics import TeacherAgreement, TeacherDivergence, TopKAccuracy
    from .modeling import WeightsNotFoundError, build_model, load_teacher
    from .trainer import SQAKDTrainer
    from .training_args import SQAKDTrainingArguments
    from .transforms import ImageTransform

__version__ = "0.1.0.dev0"

__all__ = [
    "DeployReport",
    "ExportCheck",
    "ExportMismatchError",
    "ExportReport",
    "FakeQuantizer",
    "ImageCollator",
    "ImageData",
    "ImageTransform",
    "InputError",
    "InterruptCallback",
    "LatencyReport",
    "LayerPlan",
    "QuantizationConfig",
    "QuantizationPlan",
    "QuantizedLayer",
    "Reconstruction",
    "SQAKDHfQuantizer",
    "SQAKDTrainer",
    "SQAKDTrainingArguments",
    "TeacherAgreement",
    "TeacherDivergence",
    "TopKAccuracy",
    "UnitResult",
    "WeightsNotFoundError",
    "build_model",
    "calibrate_model",
    "create_quantizer",
    "deploy_report",
    "distillation_loss",
    "export_onnx",
    "fake_quantize",
    "is_calibrated",
    "list_quantizers",
    "load_image_data",
    "load_teacher",
    "measure_latency",
    "plan_quantization",
    "quantize_model",
    "quantized_layers",
    "reconstruct_model",
    "register_quantized_layer",
    "register_quantizer",
    "split_holdout",
    "verify_export",
]

# Loaded on first use: transformers' Trainer takes seconds to import, `datasets` and `evaluate` one more.
_LAZY = {
    "ImageCollator": "collator",
    "ImageData": "data",
    "load_image_data": "data",
    "split_holdout": "data",
    "DeployReport": "export",
    "deploy_report": "export",
    "ExportCheck": "export",
    "ExportReport": "export",
    "export_onnx": "export",
    "LatencyReport": "export",
    "measure_latency": "export",
    "verify_export": "export",
    "InterruptCallback": "interrupt",
    "TeacherAgreement": "metrics",
    "TeacherDivergence": "metrics",
    "TopKAccuracy": "metrics",
    "WeightsNotFoundError": "modeling",
    "build_model": "modeling",
    "load_teacher": "modeling",
    "SQAKDTrainer": "trainer",
    "SQAKDTrainingArguments": "training_args",
    "ImageTransform": "transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_LAZY[name]}", __name__)
    except InputError as error:
        return _stand_in(name, error)
    return getattr(module, name)


def _stand_in(name: str, error: InputError) -> type:
    """Return what stands for a name whose packages are not installed: who calls it is told which to install."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> None:
        raise InputError(str(error)) from error

    return type(name, (), {"__new__": refuse, "__doc__": str(error), "__module__": __name__})


def __dir__() -> list[str]:
    return sorted(__all__)
