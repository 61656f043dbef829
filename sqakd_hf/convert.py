"""From a float model to a calibrated student, in place: `quantize_model`, then `calibrate_model`."""

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .configuration import QuantizationConfig
from .errors import InputError
from .layers import QuantizedLayer, quantized_class
from .plan import FIRST_OR_LAST, NOT_CONVERTED, LayerPlan, QuantizationPlan, plan_quantization
from .quantizers import FakeQuantizer, create_quantizer


logger = logging.getLogger(__name__)


def quantize_model(model: nn.Module, config: QuantizationConfig | None = None) -> QuantizationPlan:
    """Replace the convolutions and linear layers of `model` by fake-quantized ones, in place.

    Parameters are shared, state-dict keys such as `layer1.0.conv1.weight` stay, and a float state dict still loads.
    The student has no ranges until [`calibrate_model`] sets them. On any error the model is left as it was.

    Args:
        model (`nn.Module`): Any eager model, from timm, transformers or your own.
        config (`QuantizationConfig`, *optional*): Defaults to `QuantizationConfig()`.

    Returns:
        `QuantizationPlan`: What was done to each layer; `print` it. Also kept as `model.quantization_plan`.

    Raises:
        `InputError`: A model without a layer to quantize or quantized already, a pattern that matches nothing, an
            option that a quantizer does not take.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> print(quantize_model(model, QuantizationConfig(weight_bits=2, activation_bits=4)).summary())
        3 layers: 2 at W8A8, 1 at W2A4
    """
    config = QuantizationConfig() if config is None else config
    if not isinstance(config, QuantizationConfig):
        raise InputError(f"config must be a QuantizationConfig, got {type(config).__name__}.")
    plan = plan_quantization(model, config)
    apply_plan(model, plan)
    config.record(model)
    asked_for = (NOT_CONVERTED, FIRST_OR_LAST)
    left = [f"{layer.name} ({layer.skipped})" for layer in plan.skipped if layer.skipped not in asked_for]
    if left:
        logger.warning("Left in float: %s.", ", ".join(left))
    logger.info("Quantized %s.", plan.summary())
    return plan


def apply_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Replace the layers of `model` as `plan` says, in place, and keep it as `model.quantization_plan`."""
    modules = dict(model.named_modules())
    # Build every layer before the first is put in place: an error leaves the model as it was.
    twins = {modules[layer.name]: _quantize_layer(modules[layer.name], layer) for layer in plan.quantized}
    for parent in [*model.modules(), *twins.values()]:
        # Not named_children(), which names a shared child once.
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    model.quantization_plan = plan


def _quantize_layer(layer: nn.Module, plan: LayerPlan) -> QuantizedLayer:
    cls = quantized_class(layer)
    device = layer.weight.device
    weight_quantizer = create_weight_quantizer(plan, cls, layer.weight.shape).to(device)
    input_quantizer = None
    if plan.activation_bits is not None:
        input_quantizer = create_quantizer(
            plan.quantizer, bits=plan.activation_bits, role="activation", signed=None, **_options(plan)
        ).to(device)
    return cls.from_float(layer, weight_quantizer, input_quantizer)


def create_weight_quantizer(plan: LayerPlan, cls: type[QuantizedLayer], shape: torch.Size) -> FakeQuantizer:
    """Create the quantizer that `plan` wants for a weight of this shape, without a range."""
    per_channel = {"channel_axis": cls.channel_axis, "num_channels": shape[cls.channel_axis]}
    return create_quantizer(
        plan.quantizer,
        bits=plan.weight_bits,
        role="weight",
        **(per_channel if plan.per_channel else {}),
        **_options(plan),
    )


def _options(plan: LayerPlan) -> dict[str, Any]:
    return {"integer_zero_point": plan.integer_zero_point, **plan.quantizer_kwargs}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantizers(model: nn.Module) -> list[FakeQuantizer]:
    """Return the quantizers of `model`, of weights and of activations."""
    return [module for module in model.modules() if isinstance(module, FakeQuantizer)]


def layer_quantizers(layer: QuantizedLayer) -> list[FakeQuantizer]:
    """Return the quantizers of one layer: of its weight and, where activations are quantized, of its input."""
    return [quantizer for quantizer in (layer.weight_quantizer, layer.input_quantizer) if quantizer is not None]


def record_signedness(model: nn.Module) -> None:
    """Bring the plan of `model` up to date with what its input quantizers found or were loaded with."""
    # The plan lives where quantize_model was called, which a wrapper (DDP, a compiled model) holds as a child.
    owner = next((module for module in model.modules() if "quantization_plan" in vars(module)), None)
    if owner is None:
        return  # layers that were put in by hand
    found = {
        name: layer.input_quantizer.signed
        for name, layer in quantized_layers(owner).items()
        if layer.input_quantizer is not None
    }
    owner.quantization_plan = owner.quantization_plan.with_signedness(found)


def dequantize_model(model: nn.Module) -> None:
    """Put the plain float layers back, in place: their weights are the quantized values, activations stay in float."""
    twins = {}
    for layer in quantized_layers(model).values():
        with torch.no_grad():
            values = layer.quantized_weight().detach()
        plain = layer.to_float()
        plain.weight = nn.Parameter(values, requires_grad=layer.weight.requires_grad)
        twins[layer] = plain
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in twins:
                parent._modules[name] = twins[child]
    vars(model).pop("quantization_plan", None)


def is_calibrated(model: nn.Module) -> bool:
    """Tell whether every quantizer of `model` has its range."""
    return all(quantizer.calibrated for quantizer in quantizers(model))


@torch.no_grad()
def calibrate_model(
    model: nn.Module,
    batches: Iterable[torch.Tensor | Mapping[str, Any]],
    *,
    reestimate_batch_norm: bool = False,
    disable_progress: bool = False,
) -> None:
    """Set all ranges of a quantized `model` from data, in place.

    Weights: each quantizer's `init_range`. Activations: layer by layer in the order of execution, each on inputs that
    passed the quantized layers before it, and averaged over the batches; an input that is never negative gets
    unsigned codes.

    BatchNorm: while ranges are set, it normalises by the batch, as it will in training. Its running statistics stay
    those of the float network, which is what "calibrated only" usually means; training updates them.
    `reestimate_batch_norm=True` replaces them, in a second pass, by the average over the batches: often a stronger
    student without any training.

    All else (dropout, stochastic depth) is in eval mode. The model's own train/eval mode is restored.

    Args:
        model (`nn.Module`): A model after [`quantize_model`].
        batches (`Iterable`): Images as tensors `(B, C, H, W)`, or dicts with `pixel_values`; without labels. A few
            hundred images are enough. An iterator is kept in memory.
        reestimate_batch_norm (`bool`, *optional*, defaults to `False`): See above.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: No batch, a batch of one image where BatchNorm needs more, a layer whose input is not finite, or
            a planned layer that the data never reached. The message names the layers; no range is set.
    """
    layers = quantized_layers(model)
    if not layers:
        raise InputError("The model has no quantized layer. Call quantize_model(model, config) first.")
    if isinstance(batches, torch.Tensor):
        raise InputError(f"batches must be an iterable of image batches, got one tensor {tuple(batches.shape)}.")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    batch_norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    was_training = {module: module.training for module in model.modules()}
    bar = tqdm(desc="Calibrating", unit="batch", disable=disable_progress, leave=False)
    try:
        model.eval()
        for name, layer in layers.items():
            _require_finite(layer.weight, f"the weight of layer {name!r}")
            layer.restore_latent()
            layer.weight_quantizer.init_range(layer.weight)
        calibrators = {name: _RangeAverage(name, layer) for name, layer in layers.items()}
        with contextlib.ExitStack() as stack:
            for calibrator in calibrators.values():
                stack.enter_context(calibrator)
            stack.enter_context(_batch_statistics(batch_norms, keep_running=True))
            _feed(model, batches, bar)
        missed = [name for name, calibrator in calibrators.items() if not calibrator.calls]
        if missed:
            raise InputError(
                f"Calibration never reached {', '.join(missed)}: the model computes without calling these layers, or "
                "only uses them in training. List them in modules_to_not_convert."
            )
        if reestimate_batch_norm:
            with _batch_statistics(batch_norms, keep_running=False):
                _feed(model, batches, bar)
    except BaseException:
        for module in quantizers(model):
            module.reset()
        raise
    finally:
        bar.close()
        for module, training in was_training.items():
            module.training = training
    record_signedness(model)
    constant = [name for name, calibrator in calibrators.items() if calibrator.constant]
    if constant:
        logger.warning(
            "The input of %s was constant during calibration: dead units, or data unlike the training data.",
            ", ".join(constant),
        )


class _RangeAverage:
    """Set the ranges of one layer's input while the model runs: the mean of `init_range` over the batches."""

    def __init__(self, name: str, layer: QuantizedLayer):
        self.name, self.layer = name, layer
        self.calls = 0
        self.constant = True
        self.averaged = 0

    def __enter__(self) -> "_RangeAverage":
        self.handle = self.layer.register_forward_pre_hook(self.observe, with_kwargs=True)
        if self.layer.input_quantizer is not None and self.layer.input_quantizer.signed_is_open:
            self.layer.input_quantizer.signed = False
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def observe(self, _: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self.calls += 1
        _require_finite(x, f"the input of layer {self.name!r}")
        self.constant &= bool(x.amin() == x.amax())
        quantizer = self.layer.input_quantizer
        if quantizer is None:
            return
        if quantizer.signed_is_open and not quantizer.signed and bool(x.amin() < 0):
            quantizer.signed = True
            self.averaged = 0
        before = {name: tensor.detach().clone() for name, tensor in quantizer.range_tensors().items()}
        quantizer.init_range(x)
        for name, tensor in quantizer.range_tensors().items():
            if self.averaged:
                tensor.copy_(before[name].lerp(tensor, 1 / (self.averaged + 1)))
        self.averaged += 1


def _require_finite(x: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        kind = "NaN" if bool(torch.isnan(x).any()) else "infinite"
        raise InputError(
            f"Calibration met {kind} values in {what}. Check the images and the float model's own output."
        )


@contextlib.contextmanager
def _batch_statistics(batch_norms: list[nn.Module], keep_running: bool) -> Iterator[None]:
    """Let BatchNorm layers normalise by the batch; their running statistics stay, or become the plain average."""
    momenta = [module.momentum for module in batch_norms]
    running = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in batch_norms]
    for module in batch_norms:
        module.training = True  # not train(), which reaches children of subclasses
        if not keep_running and module.track_running_stats:
            module.reset_running_stats()
            module.momentum = None
    try:
        yield
    except BaseException:
        keep_running = True
        raise
    finally:
        for module, momentum, buffers in zip(batch_norms, momenta, running, strict=True):
            module.training = False
            module.momentum = momentum
            if keep_running:
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])


def _feed(model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, Any]], bar: tqdm) -> None:
    empty = True
    device = next(model.parameters()).device
    for batch in batches:
        pixel_values = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
        if not isinstance(pixel_values, torch.Tensor):
            keys = f" with the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
            raise InputError(
                f"Calibration got a batch of type {type(batch).__name__}{keys}. "
                "Pass image tensors (B, C, H, W), or dicts that hold them as pixel_values."
            )
        if len(pixel_values) < 2 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            raise InputError(
                "Calibration got a batch of one image, but BatchNorm needs two or more. Use larger batches."
            )
        forward_logits(model, pixel_values.to(device))
        bar.update()
        empty = False
    if empty:
        raise InputError("Calibration got no batch. Pass an iterable of image batches, (B, C, H, W) each.")


def forward_logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run `model`, timm's or transformers' kind, on images `(B, C, H, W)` and return its logits `(B, K)`."""
    outputs = model(pixel_values=pixel_values) if _takes_keyword(model) else model(pixel_values)
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs[0]


def _takes_keyword(model: nn.Module) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    # Wrappers (DDP, a compiled model) pass on whatever they get: look at what they wrap.
    passes_on = any(
        parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()
    )
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if "pixel_values" not in parameters and passes_on and isinstance(inner, nn.Module):
        return _takes_keyword(inner)
    return "pixel_values" in parameters
