"""The bridge to `from_pretrained`: after `import sqakd_hf`, transformers loads and saves students as quantized models.

On disk a weight is its integer codes, packed; in memory it is the float `weight` of an ordinary quantized layer.
Training checkpoints keep the float latents instead, see [`SQAKDHfQuantizer.saving`].
"""

import contextlib
import copy
import functools
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from .._compat import (
    expect_missing,
    initialise_now,
    look_for_shared_modules,
    mark_loaded,
    put_off_initialisation,
    save_under_own_names,
    was_loaded,
)
from .._text import quote
from ..conversion.config import FORMAT_VERSION, QuantizationConfig
from ..conversion.convert import (
    HALF,
    after_quantizing,
    apply_plan,
    convert_model,
    create_weight_quantizer,
    dequantize_model,
    fix_image_ranges,
    warn_of_float32,
)
from ..conversion.plan import LayerPlan
from ..conversion.student import (
    is_calibrated,
    layer_quantizers,
    quantized_layers,
    quantizers,
    record_signedness,
    require_planned_layers,
)
from ..data.hub_access import hub_id
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer, weight_of
from ..quantization.packing import pack_bits, unpack_bits
from ..quantization.quantizers import FakeQuantizer
from .manifest import FORMATS, Manifest, packed_shape


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

register_quantization_config("sqakd")(QuantizationConfig)


@register_quantizer("sqakd")
class SQAKDHfQuantizer(HfQuantizer):
    """Rebuild the quantized layers before transformers loads the weights, unpack their codes after, pack on saving.

    With a float checkpoint and `quantization_config=QuantizationConfig(...)`, the result is an uncalibrated student.
    """

    def __init__(self, quantization_config: QuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._format = "packed"
        self._gathered: dict[str, torch.Tensor] | None = None
        self._packed: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._new: list[str] = []
        self.base_model: str | None = None

    @staticmethod
    def make_savable(model: nn.Module, config: QuantizationConfig) -> None:
        """Make a transformers `model` that was just quantized one that saves itself packed, with `config`."""
        if isinstance(getattr(model, "config", None), PretrainedConfig):
            SQAKDHfQuantizer(_to_be_stored(config), pre_quantized=False).attach(model)

    def attach(self, model: "PreTrainedModel") -> None:
        """Make `model` one that saves and uploads itself by this quantizer."""
        # The name of a folder says nothing to others; a reloaded student knows its base from its own file.
        self.base_model = hub_id(getattr(model.config, "_name_or_path", None))
        model.hf_quantizer = self
        model.push_to_hub = functools.partial(_push_to_hub, model)
        if type(model.config).__name__ == "TimmWrapperConfig":
            from .labelled_config import LabelledTimmConfig  # which imports timm

            model.config.__class__ = LabelledTimmConfig
        model.config.quantization_config = self.quantization_config  # last: nobody takes it back where this fails

    # --- loading ---

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        stored = self.quantization_config.stored or {}
        layers = stored.get("layers")
        if isinstance(layers, dict) and any(name.startswith("timm_model.") for name in layers):
            # Before the model is built: it may be one of the paper's networks.
            from . import paper_networks  # noqa: F401

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.pre_quantized or dtype not in HALF:
            return dtype
        warn_of_float32([dtype])
        return torch.float32

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        _refuse_offload(kwargs.get("device_map"))
        stored = self.quantization_config.stored if self.pre_quantized else None
        if stored is None:
            # A float checkpoint, or a student in format version 1: latents, and layers as the patterns say.
            self.quantization_config = _to_be_stored(self.quantization_config)
            convert_model(model, self.quantization_config, None)
            self.attach(model)
            if _aliases(model):
                look_for_shared_modules(model)
        else:
            self._rebuild(model, stored, kwargs.get("checkpoint_files"))
        self._expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters()}
        if not self.pre_quantized:
            # A float checkpoint has no ranges: nothing to report as missing.
            expect_missing(
                model,
                [
                    rf"{re.escape(name)}\."
                    for name, module in model.named_modules()
                    if isinstance(module, FakeQuantizer)
                ],
            )

    def _rebuild(self, model: "PreTrainedModel", stored: dict[str, Any], files: list[str] | None) -> None:
        where = f"{model.config._name_or_path or 'The student'}: config.json"
        manifest = Manifest.from_dict(stored, where)
        if not files:
            raise InputError(f"{where}: a stored student is loaded from its safetensors files, not from a state dict.")
        manifest.verify(files)
        self.attach(model)
        self.base_model = manifest.base_model
        prefix = model.base_model_prefix
        apply_plan(model, manifest.plan_for(model, prefix, where))
        if _aliases(model):
            look_for_shared_modules(model)
        missing = model.state_dict().keys() - manifest.tensors.keys() - _never_stored(model)
        if missing and type(model).__name__ in (model.config.architectures or ()):
            # A backbone with a new head may lack tensors, and transformers reports them; the model that was saved not.
            raise InputError(f"{where}: nothing is stored for {quote(sorted(missing)[:5])} of {type(model).__name__}.")
        for name, layer in quantized_layers(model).items():
            shape = layer.stored_weight.shape
            if shape != manifest.stored_shape(name, prefix):
                # Classes of another number: transformers decides whether to refuse or to start this layer anew.
                self._new.append(name)
            elif manifest.format == "packed":
                self._packed[name] = shape, layer.stored_weight.dtype
                _hold_place_of_weight(layer)
        if self._packed:
            put_off_initialisation(model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        _refuse_offload(getattr(model, "hf_device_map", None))
        layers = quantized_layers(model)
        for quantizer in quantizers(model):
            # transformers fills what a checkpoint lacks with uninitialised memory, and marks what it loaded.
            tensors = quantizer.state_dict(keep_vars=True).values()
            loaded = all(was_loaded(tensor) for tensor in tensors)
            quantizer.refresh() if loaded else quantizer.reset()
        missing = [
            name
            for name, layer in layers.items()
            if name not in self._new and not all(quantizer.calibrated for quantizer in layer_quantizers(layer))
        ]
        missing += [
            line.name
            for line in model.quantization_plan.attention
            if line.skipped is None and not is_calibrated(model.get_submodule(line.name).attention_quantizers)
        ]
        missing += [
            line.name
            for line in model.quantization_plan.residuals
            if line.skipped is None and not model.get_submodule(line.name).output_quantizer.calibrated
        ]
        if self.pre_quantized and missing:
            raise InputError(
                f"The checkpoint {model.config._name_or_path!r} says it is quantized but lacks the ranges of "
                f"{quote(missing[:3])}. It was saved before calibration, or is damaged: calibrate the student and "
                "save it again."
            )
        fix_image_ranges(model)
        for layer in layers.values():
            for name in layer.packed_state():
                buffer = getattr(layer, name)
                if not was_loaded(buffer):
                    buffer.zero_()
            layer.refresh()
        _leave_the_file(model, {layers[name].stored_weight for name in self._packed})
        for name, (shape, dtype) in self._packed.items():
            if not was_loaded(layers[name].stored_weight):
                raise InputError(f"{model.config._name_or_path}: the files lack the packed weight of {name!r}.")
            _unpack(layers[name], shape, dtype)
        if self._packed:
            initialise_now(model)
        for name, parameter in model.named_parameters():
            shape, dtype = self._expected.get(name, (parameter.shape, parameter.dtype))
            if parameter.shape != shape:
                # transformers 5.17 passes over this for quantized models.
                raise InputError(
                    f"The stored {name!r} has the shape {list(parameter.shape)}, this model needs {list(shape)}: "
                    "another number of classes, or another architecture. Load it as it was saved, or upgrade "
                    "transformers."
                )
            if parameter.dtype != dtype:
                # transformers 5.17 leaves renamed weights of quantized models in the dtype of their file.
                parameter.data = parameter.data.to(dtype)
        if self._new:
            logger.warning(
                "New and uncalibrated, because the number of classes differs: %s. SQAKDTrainer calibrates before it "
                "trains; calibrate_model does it by hand.",
                ", ".join(self._new),
            )
        if self.pre_quantized:
            record_signedness(model)

    # --- saving ---

    @contextlib.contextmanager
    def saving(self, format: str, state_dict: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Let `save_pretrained` store this format, `"packed"` (the default) or `"latent"`.

        Args:
            format (`str`): Packed codes are what others load; float latents are what training resumes from.
            state_dict (`dict`, *optional*): The whole state where it is spread over processes (FSDP);
                transformers does not hand its own `state_dict` argument to quantizers.
        """
        if format not in FORMATS:
            raise InputError(f"format must be {' or '.join(map(repr, FORMATS))}, got {format!r}.")
        before = self._format, self._gathered
        self._format, self._gathered = format, state_dict
        try:
            yield
        finally:
            self._format, self._gathered = before

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors to store; the config of `model` is brought up to date with them."""
        if not is_calibrated(model):
            raise InputError(
                "The student has no ranges yet. Call calibrate_model or trainer.train() before you save it."
            )
        require_planned_layers(model)
        from .model_preprocessing import keep_preprocessing

        keep_preprocessing(model)
        layers = quantized_layers(model)
        state_dict = dict(model.state_dict() if self._gathered is None else self._gathered)
        dropped = _never_stored(model)
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in dropped}
        record_signedness(model)
        plans = {layer.name: layer for layer in model.quantization_plan}
        shapes = {layer.name: _weight_shape(model, layer.name) for layer in model.quantization_plan}
        if self._format == "packed":
            for name, layer in layers.items():
                codes = (
                    layer.weight_codes() if self._gathered is None else _gathered_codes(plans[name], layer, state_dict)
                )
                packed = pack_bits(codes, layer.weight_quantizer.bits)
                # Flat under the weight's own name: without sqakd_hf, transformers stops at the shape.
                state_dict[f"{name}.{layer.weight_name}"] = packed.flatten()
                state_dict.update({f"{name}.{key}": value for key, value in layer.packed_state().items()})
        manifest = Manifest.describe(self._format, model.quantization_plan, shapes, state_dict, self.base_model)
        self.quantization_config = replace(
            self.quantization_config, stored=manifest.to_dict(), format_version=FORMAT_VERSION
        )
        model.config.quantization_config = self.quantization_config
        save_under_own_names(model)
        return state_dict, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    # --- back to float ---

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        dequantize_model(model)
        # The base class passes on what the config holds: a name once the model was saved.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name in ("_weight_conversions", "push_to_hub"):
            vars(model).pop(name, None)
        return model if dtype is None else model.to(dtype)


after_quantizing(SQAKDHfQuantizer.make_savable)


def _to_be_stored(config: QuantizationConfig) -> QuantizationConfig:
    """Return `config` without what another student was stored with."""
    return config if config.stored is None else replace(config, stored=None)


def _weight_shape(model: nn.Module, name: str) -> torch.Size:
    weight = weight_of(dict(model.named_modules(remove_duplicate=False)).get(name))
    if weight is None:
        raise InputError(
            f"The float layer {name!r} is no longer in the student, which could not be loaded again without it. Take "
            "it out of the float model, then quantize that."
        )
    return weight.shape


def _push_to_hub(model: "PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
    from .upload import push_to_hub  # with all that image processors need

    return push_to_hub(model, *args, **kwargs)


def _leave_the_file(model: "PreTrainedModel", but: set[torch.Tensor]) -> None:
    """Copy what was loaded on the CPU out of the mapped files, `but` for codes, which unpacking copies.

    Whoever writes the file again would change the model, and mapped tensors lie at odd addresses, where some kernels
    sum in another order.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor not in but:
            tensor.data = tensor.data.clone()


def _never_stored(model: "PreTrainedModel") -> set[str]:
    """Return the names that save_pretrained leaves out."""
    return {*(model._keys_to_ignore_on_save or ()), *getattr(model, "all_tied_weights_keys", {}), *_aliases(model)}


def _aliases(model: nn.Module) -> set[str]:
    """Return the further names that tensors have because one module stands in several places (timm's CoaT)."""
    first = {module: name for name, module in model.named_modules()}
    return {
        f"{name}.{key}"
        for name, module in model.named_modules(remove_duplicate=False)
        if first[module] != name
        for key in (*module._parameters, *module._buffers)
    }


def _refuse_offload(device_map: Any) -> None:
    """Raise `InputError` for a resolved device map that offloads."""
    places = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise InputError(
            "The device map leaves parts of the student on the CPU or the disk, but its weights are unpacked in "
            "place. Students are small: use device_map='cpu' or one with a device for all of it."
        )


def _hold_place_of_weight(layer: QuantizedLayer) -> None:
    """Put a buffer for the packed codes where the weight will be: models read `layer.weight.dtype` while they load."""
    rows, row_bytes = packed_shape(layer.stored_weight.shape, layer.channel_axis, layer.weight_quantizer.bits)
    placeholder = torch.empty(rows * row_bytes, dtype=torch.uint8, device=layer.stored_weight.device)
    del layer._parameters[layer.weight_name]
    layer.register_buffer(layer.weight_name, placeholder)


def _unpack(layer: QuantizedLayer, shape: torch.Size, dtype: torch.dtype) -> None:
    bits = layer.weight_quantizer.bits
    rows, row_bytes = packed_shape(shape, layer.channel_axis, bits)
    codes = unpack_bits(layer.stored_weight.view(rows, row_bytes), bits, shape.numel() // rows)
    layer.set_weight_codes(codes, shape, dtype)
    mark_loaded(layer.stored_weight)


def _gathered_codes(plan: LayerPlan, layer: QuantizedLayer, state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight's codes where `state_dict` has all of the layer's tensors and `layer` only a share."""
    prefix = f"{plan.name}."
    whole = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    twin = copy.copy(layer)
    twin._modules = dict(layer._modules)
    twin._parameters = {
        name: nn.Parameter(whole[name], requires_grad=False) for name in layer._parameters if name in whole
    }
    twin.weight_is_on_grid = False
    twin.weight_quantizer = create_weight_quantizer(plan, type(layer), whole[layer.weight_name].shape)
    ranges = "weight_quantizer."
    twin.weight_quantizer.load_state_dict(
        {key.removeprefix(ranges): value for key, value in whole.items() if key.startswith(ranges)}
    )
    return twin.weight_codes()
