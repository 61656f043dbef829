"""From a float model to a calibrated student, in place: `quantize_model`, then `calibrate_model`."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .configuration import QuantizationConfig
from .errors import InputError, first_line
from .interception import AttentionQuantizers, InterceptedModule, intercept, release
from .layers import QuantizedLayer, quantized_class
from .outputs import run_model
from .plan import ASKED_FOR, LayerPlan, QuantizationPlan, plan_quantization
from .quantizers import FEW_BITS, FakeQuantizer, create_quantizer
from .trace import evaluating


logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def quantize_model(
    model: nn.Module, config: QuantizationConfig | None = None, images: torch.Tensor | None = None
) -> QuantizationPlan:
    """Replace the convolutions, linear layers and embeddings of `model` by fake-quantized ones, in place.

    Parameters are shared, state-dict keys such as `layer1.0.conv1.weight` stay, and a float state dict still loads.
    Half-precision parameters and buffers become float32, with a warning. The student has no ranges until
    [`calibrate_model`] sets them. On any error the model is left as it was.

    Args:
        model (`nn.Module`): Any eager model, from timm, transformers or your own.
        config (`QuantizationConfig`, *optional*): Defaults to `QuantizationConfig()`.
        images (`torch.Tensor`, *optional*): Example images `(B, C, H, W)`, see [`plan_quantization`].

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
    with _undone_on_error(model):
        narrow = _make_float32(model)
        plan = plan_quantization(model, config, images)
        apply_plan(model, plan)
        config.record(model)
    lines = (*plan.layers, *plan.others, *plan.attention, *plan.residuals)
    if narrow:
        warn_of_float32(narrow)
    left = [f"{line.name} ({line.skipped})" for line in lines if line.skipped not in (None, *ASKED_FOR)]
    if left:
        logger.warning("Left in float: %s.", ", ".join(left))
    logger.info("Quantized %s.", plan.summary())
    return plan


def require_float32_latents(model: nn.Module) -> None:
    """Make half-precision parameters and buffers of `model` float32, in place, with a warning: a training begins.

    Weights that were loaded from codes become the values of these, to the last bit of float32.
    """
    if narrow := _make_float32(model):
        warn_of_float32(narrow)


def warn_of_float32(narrow: Iterable[torch.dtype]) -> None:
    """Say that what had these dtypes is float32 now."""
    logger.warning(
        "Parameters or buffers of the model were %s; a student trains float32 latents, so they are float32 now.",
        " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow)),
    )


def _make_float32(model: nn.Module) -> set[torch.dtype]:
    """Make half-precision tensors of `model` float32, in place; return the dtypes that they had."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALF]
    found = {tensor.dtype for tensor in tensors}
    exact = {
        layer.stored_weight: layer.values_of(layer.weight_codes(), layer.stored_weight.shape)
        for layer in quantized_layers(model).values()
        if layer.weight_is_on_grid and layer.stored_weight.dtype in HALF
    }
    for tensor in tensors:
        grad, tensor.grad = tensor.grad, None
        tensor.data = exact[tensor] if tensor in exact else tensor.data.float()
        tensor.grad = None if grad is None else grad.float()
    return found


def apply_plan(model: nn.Module, plan: QuantizationPlan) -> None:
    """Replace the layers of `model` as `plan` says, in place, and keep it as `model.quantization_plan`."""
    modules = dict(model.named_modules())
    twins = {modules[layer.name]: _quantize_layer(modules[layer.name], layer) for layer in plan.quantized}
    attention = {
        line.name: AttentionQuantizers(*(_activation_quantizer(line) for _ in range(4))).to(device_of(model))
        for line in plan.attention
        if line.skipped is None
    }
    outputs = {
        line.name: _activation_quantizer(line).to(device_of(model)) for line in plan.residuals if line.skipped is None
    }
    _replace([*model.modules(), *twins.values()], twins)
    fused = {line.name: line.fused for line in plan.attention}
    for name, module_quantizers in attention.items():
        intercept(model.get_submodule(name), attention_quantizers=module_quantizers, fused=fused[name])
    for name, quantizer in outputs.items():
        intercept(model.get_submodule(name), output_quantizer=quantizer)
    for layer in plan.quantized:
        if layer.bypassed:
            parent, _, child = layer.name.rpartition(".")
            intercept(model.get_submodule(parent), bypassed=[child])
    norms = set(batch_norms(model))
    model.quantization_plan = plan
    model.norms_of_plan = tuple(name for name, module in model.named_modules() if module in norms)
    model.register_load_state_dict_pre_hook(_report_missing_ranges)
    fix_image_ranges(model)


def fix_image_ranges(model: nn.Module) -> None:
    """Take the ranges that the plan does not want learned out of the training; loading makes parameters anew."""
    for layer in model.quantization_plan.quantized:
        if not layer.learns_input_range:
            model.get_submodule(layer.name).input_quantizer.requires_grad_(False)


def _report_missing_ranges(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    missing_keys: list[str],
    *_: list[str],
) -> None:
    """Before `load_state_dict`: report the quantizers that a student's state lacks altogether.

    A quantizer, which sees its own keys alone, takes that for a float network's state, which has no range at all.
    """
    keys = [
        [f"{prefix}{name}.{key}" for key in module.state_dict()]
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer)
    ]
    lacking = [own for own in keys if not any(key in state_dict for key in own)]
    if len(lacking) < len(keys):
        missing_keys += [key for own in lacking for key in own]


_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


@contextlib.contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the modules of `model` their classes, attributes, children, hooks and dtypes back where something raises.

    What tensors hold is not: nothing in between may change them in place.
    """
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in (*model.parameters(), *model.buffers())]
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    tables = [vars(module).get(name) for module in model.modules() for name in _TABLES]
    tables = [table for table in tables if isinstance(table, dict)]  # a scripted module, which is refused, has others
    held = [(value, value.copy()) for value in (*tables, *(v for m in model.modules() for v in _holders(m)))]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for holder, content in held:
            holder.clear()
            holder.update(content) if isinstance(holder, dict) else holder.extend(content)
        for tensor, data, grad in tensors:
            if tensor.dtype != data.dtype:
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad
        raise


def _holders(module: nn.Module) -> list[list | dict]:
    """Return the lists and dicts in which `module` holds others: some models call their layers from those."""
    values = (value for value in vars(module).values() if isinstance(value, list | dict))
    return [
        held
        for held in values
        if any(isinstance(child, nn.Module) for child in (held.values() if isinstance(held, dict) else held))
    ]


def _replace(parents: Iterable[nn.Module], twins: Mapping[nn.Module, nn.Module]) -> None:
    """Put the twins in the place of their modules, wherever the parents hold them."""
    for parent in parents:
        for held in _holders(parent):  # not named_children(), which names a shared child once
            for key, child in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(child, nn.Module) and child in twins:
                    held[key] = twins[child]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of `model`."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _activation_quantizer(plan: LayerPlan) -> FakeQuantizer:
    bits = plan.activation_bits
    name = plan.activation_quantizer or plan.quantizer
    quantizer = create_quantizer(name, bits=bits, role="activation", signed=None, **_options(plan))
    if plan.reads_images:
        # The methods' own ways are made for what layers put out; pixels end where they end.
        quantizer.searched_bits = (*range(1, FEW_BITS + 1), *quantizer.searched_bits)
    return quantizer


def _quantize_layer(layer: nn.Module, plan: LayerPlan) -> QuantizedLayer:
    cls = quantized_class(layer)
    weight = getattr(layer, cls.weight_name)
    device = weight.device
    weight_quantizer = create_weight_quantizer(plan, cls, weight.shape).to(device)
    input_quantizer = None
    if plan.activation_bits is not None:
        input_quantizer = _activation_quantizer(plan).to(device)
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


def _planned(model: nn.Module) -> nn.Module | None:
    """Return the module whose plan it is, `None` for layers that were put in by hand."""
    # The plan lives where quantize_model was called, which a wrapper (DDP, a compiled model) holds as a child.
    return next((module for module in model.modules() if "quantization_plan" in vars(module)), None)


def require_planned_layers(model: nn.Module, widths: bool = True) -> None:
    """Raise `InputError` unless what the plan of `model` quantizes is still there, with the bits of the plan.

    Args:
        model (`nn.Module`): A student. Layers that were put in by hand have no plan and are not looked at, nor are
            layers that the plan leaves in float.
        widths (`bool`, *optional*, defaults to `True`): `False` lets bits differ, as they do in the stages of
            `progressive_bits`.
    """
    owner = _planned(model)
    if owner is None:
        return
    plan, modules = owner.quantization_plan, dict(owner.named_modules(remove_duplicate=False))
    changed = {
        line.name: what
        for lines, quantizers_of in (
            (plan.quantized, _quantizers_of_layer),
            (plan.attention, _quantizers_of_attention),
            (plan.residuals, _quantizers_of_output),
        )
        for line in lines
        if line.skipped is None and (what := _changed(modules, line, quantizers_of, widths)) is not None
    }
    if not changed:
        # Folded into the layer in front, a BatchNorm changes the weight that a range was set for.
        gone = (name for name in owner.norms_of_plan if isinstance(modules.get(name, nn.Identity()), nn.Identity))
        changed = dict.fromkeys(gone, "a BatchNorm, gone")
    if changed:
        listed = [f"{name!r} ({changed[name]})" for name in sorted(changed)]
        raise InputError(
            f"{len(listed)} of the student's quantized layers and operations are not as quantize_model left them: "
            f"{', '.join(listed[:8])}{', ...' * (len(listed) > 8)}. What replaces or changes layers, such as timm's "
            "reparameterize_model, reset_classifier, fuse_conv_bn_eval or SyncBatchNorm's conversion, is done to the "
            "float model: do it there, then quantize that."
        )


Found = list[tuple[FakeQuantizer | None, int | None]]  # quantizers, each with its bits in the plan


def _changed(
    modules: Mapping[str, nn.Module], line: LayerPlan, quantizers_of: Callable[..., Found | None], widths: bool
) -> str | None:
    """Say what became of a line of the plan, `None` where it is as it was."""
    if line.name not in modules:
        return "gone"
    module = modules[line.name]
    found = quantizers_of(module, line)
    if found is None or any((quantizer is None) != (bits is None) for quantizer, bits in found):
        return f"now {type(module).__name__}, not quantized as planned"
    parent, _, child = line.name.rpartition(".")
    if line.bypassed and child not in getattr(modules[parent], "bypassed_layers", ()):
        return f"not quantized by {parent!r}, now {type(modules[parent]).__name__}"
    other = [(quantizer.bits, bits) for quantizer, bits in found if quantizer is not None and quantizer.bits != bits]
    return f"{other[0][0]} bits instead of {other[0][1]}" if widths and other else None


def _quantizers_of_layer(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, QuantizedLayer):
        return None
    return [(module.weight_quantizer, line.weight_bits), (module.input_quantizer, line.activation_bits)]


def _quantizers_of_attention(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, InterceptedModule) or "attention_quantizers" not in module._modules:
        return None
    return [(quantizer, line.activation_bits) for quantizer in module.attention_quantizers.children()]


def _quantizers_of_output(module: nn.Module, line: LayerPlan) -> Found | None:
    if not isinstance(module, InterceptedModule) or "output_quantizer" not in module._modules:
        return None
    return [(module.output_quantizer, line.activation_bits)]


def record_signedness(model: nn.Module) -> None:
    """Bring the plan of `model` up to date with what its input quantizers found or were loaded with."""
    owner = _planned(model)
    if owner is None:
        return
    found = {
        name: layer.input_quantizer.signed
        for name, layer in quantized_layers(owner).items()
        if layer.input_quantizer is not None
    }
    owner.quantization_plan = owner.quantization_plan.with_signedness(found)


def dequantize_model(model: nn.Module) -> None:
    """Put the plain float layers back, in place: their weights are the quantized values, activations stay in float."""
    with _undone_on_error(model):
        for module in list(model.modules()):
            if isinstance(module, InterceptedModule):
                release(module)
        twins = {layer: layer.dequantized() for layer in quantized_layers(model).values()}
        _replace([*model.modules(), *twins.values()], twins)
        for name in ("quantization_plan", "norms_of_plan"):
            vars(model).pop(name, None)
        for key, wrapped in list(model._load_state_dict_pre_hooks.items()):
            if wrapped.hook is _report_missing_ranges:
                del model._load_state_dict_pre_hooks[key]


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

    BatchNorm: with codes of up to 4 bits anywhere, it normalises by the batch while ranges are set, as it will in
    training; quantization changes activations too much for the float network's statistics. With more bits those hold
    and are used. Running statistics stay those of the float network, which is what "calibrated only" usually means;
    training updates them. `reestimate_batch_norm=True` replaces them, in a second pass, by the average over the
    batches: often a stronger student without any training.

    All else (dropout, stochastic depth) is in eval mode. The model's own train/eval mode is restored.

    Args:
        model (`nn.Module`): A model after [`quantize_model`].
        batches (`Iterable`): Images as tensors `(B, C, H, W)`, or dicts with `pixel_values` (and `pixel_mask`, where
            the model takes one); without labels. A few hundred images are enough. An iterator is kept in memory.
        reestimate_batch_norm (`bool`, *optional*, defaults to `False`): See above.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: No batch, a batch of one image where BatchNorm needs more, a layer whose input is not finite, or
            a planned layer that the data never reached. The message names the layers.

    On any error the student is left as it was.
    """
    require_planned_layers(model, widths=False)
    layers = quantized_layers(model)
    if not layers:
        raise InputError("The model has no quantized layer. Call quantize_model(model, config) first.")
    if isinstance(batches, torch.Tensor):
        raise InputError(f"batches must be an iterable of image batches, got one tensor {tuple(batches.shape)}.")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    norms = batch_norms(model)
    by_batch = norms if any(quantizer.bits <= FEW_BITS for quantizer in quantizers(model)) else []
    needs_two = bool(by_batch or (reestimate_batch_norm and norms))
    with _restored_on_error(model):
        with evaluating(model):
            for name, layer in tqdm(layers.items(), "Weights", unit="layer", disable=disable_progress, leave=False):
                layer.restore_latent()
                weight = layer.float_weight()
                _require_finite(weight, f"the weight of layer {name!r}")
                layer.weight_quantizer.init_range(weight)
            with tqdm(desc="Calibrating", unit="batch", disable=disable_progress, leave=False) as bar:
                with _batch_statistics(by_batch, keep_running=True):
                    constant = _set_activation_ranges(model, layers, lambda: _feed(model, batches, bar, needs_two))
                if reestimate_batch_norm:
                    with _batch_statistics(norms, keep_running=False):
                        _feed(model, batches, bar, needs_two)
        record_signedness(model)
    if constant:
        logger.warning(
            "Constant during calibration, from dead units or data unlike the training data: %s.",
            ", ".join(constant),
        )


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give quantizers their ranges and signs, and layers their codes, back where something raises."""
    layers = quantized_layers(model).values()
    attributes = [(module, dict(vars(module))) for module in (*layers, *quantizers(model))]
    ranges = [tensor for quantizer in quantizers(model) for tensor in quantizer.state_dict(keep_vars=True).values()]
    codes = [layer.stored_weight for layer in layers if layer.weight_is_on_grid]
    values = [(tensor, tensor.detach().clone()) for tensor in (*ranges, *codes)]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for tensor, value in values:
            tensor.data = value
        raise


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, Any]], disable_progress: bool = False
) -> None:
    """Replace BatchNorm's running statistics by the average over `batches`, in place.

    Weights and ranges move until the last step of training, and running statistics are behind them.

    Args:
        model (`nn.Module`): Calibrated; all but BatchNorm is in eval mode meanwhile.
        batches (`Iterable`): As for [`calibrate_model`].
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.
    """
    norms = batch_norms(model)
    with evaluating(model), tqdm(desc="BatchNorm", unit="batch", disable=disable_progress, leave=False) as bar:
        with _batch_statistics(norms, keep_running=False):
            _feed(model, batches, bar, needs_two=bool(norms))


def batch_statistics(model: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which BatchNorm of a model in eval mode normalises by the batch; its running statistics stay."""
    return _batch_statistics(batch_norms(model), keep_running=True)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of `model`."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _set_activation_ranges(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], feed: Callable[[], None]
) -> list[str]:
    """Set the range of each activation quantizer while `feed` runs the model; return what never changed."""
    calibrators = [
        RangeAverage(range_site(name), module)
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer) and module.role == "activation"
    ]
    reached: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for calibrator in calibrators:
            stack.enter_context(calibrator)
        for layer in layers.values():
            # Not the layer itself: its parent may compute with its weight, see interception.py.
            handle = layer.weight_quantizer.register_forward_pre_hook(lambda module, _: reached.add(module))
            stack.callback(handle.remove)
        for name, layer in layers.items():
            if layer.input_quantizer is None and layer.takes_activations:
                handle = layer.register_forward_pre_hook(_FiniteInput(name), with_kwargs=True)
                stack.callback(handle.remove)
        feed()
    missed = [name for name, layer in layers.items() if layer.weight_quantizer not in reached]
    missed += [calibrator.what for calibrator in calibrators if not calibrator.averaged and not missed]
    if missed:
        raise InputError(
            f"Calibration never reached {', '.join(missed[:8])}{', ...' * (len(missed) > 8)}: the model computes "
            "without calling these layers, or only uses them in training. List them in modules_to_not_convert."
        )
    return [calibrator.what for calibrator in calibrators if calibrator.constant]


def range_site(quantizer: str) -> str:
    """Name, for a message, what the quantizer of that name quantizes."""
    owner, _, kind = quantizer.rpartition(".")
    if kind == "input_quantizer":
        return f"the input of layer {owner!r}"
    if kind == "output_quantizer":
        return f"the output of {owner!r}"
    return f"the {kind.removesuffix('_quantizer')} of attention {owner.rpartition('.')[0]!r}"


class RangeAverage:
    """Set the range of one activation quantizer while the model runs: the mean of `init_range` over the calls."""

    def __init__(self, what: str, quantizer: FakeQuantizer):
        self.what, self.quantizer = what, quantizer
        self.constant = True
        self.averaged = 0

    def __enter__(self) -> "RangeAverage":
        self.handle = self.quantizer.register_forward_pre_hook(self.observe)
        if self.quantizer.signed_is_open:
            self.quantizer.signed = False
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def observe(self, quantizer: FakeQuantizer, args: tuple[torch.Tensor]) -> None:
        (x,) = args
        _require_finite(x, self.what)
        self.constant &= bool(x.amin() == x.amax())
        if quantizer.signed_is_open and not quantizer.signed and bool(x.amin() < 0):
            quantizer.signed = True
            self.averaged = 0
        before = {name: tensor.detach().clone() for name, tensor in quantizer.range_tensors().items()}
        quantizer.init_range(x)
        for name, tensor in quantizer.range_tensors().items():
            if self.averaged:
                tensor.copy_(before[name].lerp(tensor, 1 / (self.averaged + 1)))
        self.averaged += 1


class _FiniteInput:
    """Stop calibration at a layer whose float input is not finite."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, layer: QuantizedLayer, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        _require_finite(args[0] if args else next(iter(kwargs.values())), f"the input of layer {self.name!r}")


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
    try:
        for module in batch_norms:
            module.training = True  # not train(), which reaches children of subclasses
            if not keep_running and module.track_running_stats:
                module.reset_running_stats()
                module.momentum = None
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


def _feed(model: nn.Module, batches: Iterable[torch.Tensor | Mapping[str, Any]], bar: tqdm, needs_two: bool) -> None:
    empty = True
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    for batch in batches:
        pixel_values = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
        if not isinstance(pixel_values, torch.Tensor):
            keys = f" with the keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
            raise InputError(
                f"Calibration got a batch of type {type(batch).__name__}{keys}. "
                "Pass image tensors (B, C, H, W), or dicts that hold them as pixel_values."
            )
        if len(pixel_values) < 2 and needs_two:
            raise InputError(
                "Calibration got a batch of one image, but BatchNorm needs two or more. Use larger batches."
            )
        inputs = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
        inputs = {key: value.to(like.device) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        if pixel_values.is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(like.dtype)
        try:
            run_model(model, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's way to say that shapes or dtypes do not fit
            raise InputError(
                f"{type(model).__name__} does not run on images {tuple(pixel_values.shape)} in {pixel_values.dtype}: "
                f"{first_line(error)} Calibrate with images as the model takes them."
            ) from error
        bar.update()
        empty = False
    if empty:
        raise InputError("Calibration got no batch. Pass an iterable of image batches, (B, C, H, W) each.")
