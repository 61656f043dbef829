"""The ranges of a student, set from images; and the statistics of its BatchNorm layers."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .._text import first_line
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer
from ..outputs.forward import run_model
from ..quantization.quantizers import FEW_BITS, FakeQuantizer
from .rollback import unchanged_on_error
from .student import (
    batch_norms,
    quantized_layers,
    quantizers,
    record_signedness,
    require_planned_layers,
)
from .trace import evaluating


logger = logging.getLogger(__name__)


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
    require_planned_layers(model)
    layers = quantized_layers(model)
    if not layers:
        raise InputError("The model has no quantized layer. Call quantize_model(model, config) first.")
    if isinstance(batches, torch.Tensor):
        raise InputError(f"batches must be an iterable of image batches, got one tensor {tuple(batches.shape)}.")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    norms = batch_norms(model)
    by_batch = norms if any(quantizer.bits <= FEW_BITS for quantizer in quantizers(model)) else []
    needs_two = bool(by_batch or (reestimate_batch_norm and norms))
    with unchanged_on_error(model, _what_calibration_sets(model)):
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


def _what_calibration_sets(model: nn.Module) -> list[torch.Tensor]:
    """Return the ranges, and the codes that give way to latent weights."""
    ranges = [tensor for quantizer in quantizers(model) for tensor in quantizer.state_dict(keep_vars=True).values()]
    return ranges + [layer.stored_weight for layer in quantized_layers(model).values() if layer.weight_is_on_grid]


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
    # Not the buffers of a quantizer of its output, whose range is set meanwhile.
    running = [
        {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)} for module in batch_norms
    ]
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
                for name, buffer in module.named_buffers(recurse=False):
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
