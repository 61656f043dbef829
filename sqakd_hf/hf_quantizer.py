"""The bridge to `from_pretrained`: after `import sqakd_hf`, transformers loads and saves students as quantized models.

A student is stored with its float weights and its ranges (the form that training resumes from), and computes after
loading exactly what it computed before.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from .configuration import QuantizationConfig
from .convert import is_calibrated, quantize_model, quantized_layers, quantizers, record_signedness
from .errors import InputError


if TYPE_CHECKING:
    from transformers import PreTrainedModel

register_quantization_config("sqakd")(QuantizationConfig)


@register_quantizer("sqakd")
class SQAKDHfQuantizer(HfQuantizer):
    """Rebuild the quantized layers before transformers loads the weights, and bring their state up to date after.

    With a float checkpoint and `quantization_config=QuantizationConfig(...)`, the result is an uncalibrated student.
    """

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        quantize_model(model, self.quantization_config)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        if not self.pre_quantized:
            # A float checkpoint has no ranges: nothing to report as missing.
            ranges = [rf"{name}\.(weight|input)_quantizer\." for name in quantized_layers(model)]
            model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or []), *ranges]

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            # transformers 5.17 leaves renamed weights of quantized models in the dtype of their file.
            if parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        for quantizer in quantizers(model):
            # transformers fills what a checkpoint lacks with uninitialised memory, and marks what it loaded.
            tensors = quantizer.state_dict(keep_vars=True).values()
            loaded = all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
            quantizer.refresh() if loaded else quantizer.reset()
        if self.pre_quantized and not is_calibrated(model):
            raise InputError(
                f"The checkpoint {model.config._name_or_path!r} says it is quantized but lacks ranges. "
                "It was saved before calibration, or is damaged: calibrate the student and save it again."
            )
        if self.pre_quantized:
            record_signedness(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True
