"""Self-supervised quantization-aware knowledge distillation for Hugging Face and timm vision models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import research as _research  # noqa: F401  registers its quantizers, and its extensions of a training
from .conversion.config import QuantizationConfig
from .conversion.convert import quantize_model
from .conversion.plan import LayerPlan, QuantizationPlan
from .conversion.planner import plan_quantization
from .conversion.student import is_calibrated, quantized_layers
from .distillation.losses import distillation_loss
from .errors import ExportMismatchError, InputError
from .hub.hf_quantizer import SQAKDHfQuantizer
from .layers.quantized_layer import QuantizedLayer, register_quantized_layer
from .quantization.functional import fake_quantize
from .quantization.quantizers import FakeQuantizer, create_quantizer, list_quantizers, register_quantizer
from .reconstruction import Reconstruction, UnitResult, calibrate_model, reconstruct_model


if TYPE_CHECKING:
    from .data.collator import ImageCollator
    from .data.dataset import ImageData, load_image_data
    from .data.splits import split_holdout
    from .data.transforms import ImageTransform
    from .distillation.interrupt import InterruptCallback
    from .distillation.metrics import TeacherAgreement, TeacherDivergence, TopKAccuracy
    from .distillation.trainer import SQAKDTrainer
    from .distillation.training_args import SQAKDTrainingArguments
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
    from .hub.loading import WeightsNotFoundError, build_model, load_model, load_teacher
    from .search.sensitivity import SensitivityReport, SiteError, sensitivity

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
    "SensitivityReport",
    "SiteError",
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
    "load_model",
    "load_teacher",
    "measure_latency",
    "plan_quantization",
    "quantize_model",
    "quantized_layers",
    "reconstruct_model",
    "register_quantized_layer",
    "register_quantizer",
    "sensitivity",
    "split_holdout",
    "verify_export",
]

# Loaded on first use: transformers' Trainer takes seconds to import, `datasets` and `evaluate` one more.
_LAZY = {
    "ImageCollator": "data.collator",
    "ImageData": "data.dataset",
    "load_image_data": "data.dataset",
    "split_holdout": "data.splits",
    "DeployReport": "export",
    "deploy_report": "export",
    "ExportCheck": "export",
    "ExportReport": "export",
    "export_onnx": "export",
    "LatencyReport": "export",
    "measure_latency": "export",
    "verify_export": "export",
    "InterruptCallback": "distillation.interrupt",
    "TeacherAgreement": "distillation.metrics",
    "TeacherDivergence": "distillation.metrics",
    "TopKAccuracy": "distillation.metrics",
    "WeightsNotFoundError": "hub.loading",
    "build_model": "hub.loading",
    "load_model": "hub.loading",
    "load_teacher": "hub.loading",
    "SQAKDTrainer": "distillation.trainer",
    "SQAKDTrainingArguments": "distillation.training_args",
    "ImageTransform": "data.transforms",
    "SensitivityReport": "search.sensitivity",
    "SiteError": "search.sensitivity",
    "sensitivity": "search.sensitivity",
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
