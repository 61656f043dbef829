"""Ranges, BatchNorm statistics and biases of one unit, from what it takes in the student and in the teacher."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..conversion.calibration import RangeAverage, range_site
from ..errors import InputError
from ..quantization.quantizers import FakeQuantizer
from . import processes
from .batch_norm import ChannelStatistics, match_statistics, tracks_statistics
from .bias import correct_bias
from .inputs import Reached, UnitInputs, run_for_hooks
from .state import UnitState, refresh_quantizers
from .units import Unit


# Ranges are set on so many images, of which each has thousands of positions; statistics on more of them.
RANGE_IMAGES = 32
STATISTICS_IMAGES = 256


def named_modules(unit: Unit, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules of a unit by their names in the model."""
    for name in unit.modules:
        for inner, module in model.get_submodule(name).named_modules():
            yield f"{name}.{inner}" if inner else name, module


@torch.no_grad()
def calibrate_unit(
    unit: Unit,
    student: nn.Module,
    teacher: nn.Module,
    inputs: UnitInputs,
    teacher_inputs: UnitInputs,
    device: torch.device,
) -> None:
    """Set the ranges of a unit, match its BatchNorm statistics and correct its biases, in place.

    All in the order of execution, each on inputs that passed everything in front of it as it is in the end: first
    ranges (and, by the way, the rest) on `RANGE_IMAGES` images, then statistics and biases on `STATISTICS_IMAGES`.

    Args:
        unit (`Unit`): The unit.
        student, teacher (`nn.Module`): Both in eval mode.
        inputs, teacher_inputs (`UnitInputs`): What the unit takes in each of them, on the same images.
        device (`torch.device`): Where both models are.

    Of several processes the first sets ranges, and all share their statistics.
    """
    for name in unit.layers:
        layer = student.get_submodule(name)
        with least_error(layer.weight_quantizer):
            layer.weight_quantizer.init_range(layer.float_weight())
    sites = _sites(unit, teacher, teacher_inputs, device)
    first, teacher_first = (x.first(RANGE_IMAGES).copies(device) for x in (inputs, teacher_inputs))
    expected = _teacher_statistics(unit, teacher, [teacher_first], sites)
    with contextlib.ExitStack() as stack:
        for name, module in named_modules(unit, student):
            if isinstance(module, FakeQuantizer) and module.role == "activation":
                stack.enter_context(least_error(module))
                stack.enter_context(RangeAverage(range_site(name), module))
        for name in sites:
            stack.enter_context(_corrected_at_once(student, teacher, name, expected[name]))
        unit.run(student, first)
    if processes.count() > 1:
        tensors = UnitState(unit.of(student)).tensors
        processes.take_from_first(tensors)
        refresh_quantizers(unit.of(student))
    elif len(inputs) <= RANGE_IMAGES:
        return
    inputs, teacher_inputs = (x.first(STATISTICS_IMAGES) for x in (inputs, teacher_inputs))
    expected = _teacher_statistics(unit, teacher, teacher_inputs.chunks(device), sites)
    for name in sites:
        found = ChannelStatistics()
        with _observed(student, name, found, stop=True):
            run_for_hooks(unit, student, inputs.chunks(device))
        _correct(student, teacher, name, expected[name].of_all_processes(), found.of_all_processes())


@contextlib.contextmanager
def least_error(quantizer: FakeQuantizer) -> Iterator[None]:
    """Set first ranges by least squared error at every width, unless the caller chose another way.

    The methods' own ways for few codes are made for networks that train long from there. One that was trained before,
    and sees a few hundred images, needs the nearest values.
    """
    asked = quantizer.first_range
    quantizer.first_range = "error" if asked == "auto" else asked
    try:
        yield
    finally:
        quantizer.first_range = asked


def _correct(
    student: nn.Module, teacher: nn.Module, name: str, expected: ChannelStatistics, found: ChannelStatistics
) -> None:
    module = student.get_submodule(name)
    if tracks_statistics(module):
        match_statistics(module, teacher.get_submodule(name), expected, found)
    else:
        correct_bias(module, expected, found)


def _sites(unit: Unit, teacher: nn.Module, teacher_inputs: UnitInputs, device: torch.device) -> list[str]:
    """Return BatchNorm layers, and quantized layers with a bias and no BatchNorm behind, in the order of execution."""
    order: list[str] = []
    outputs: dict[str, torch.Tensor] = {}
    normed: list[torch.Tensor] = []
    layers = set(unit.layers)
    with contextlib.ExitStack() as stack:
        for name, module in named_modules(unit, teacher):
            if tracks_statistics(module):

                def meet_norm(_module: nn.Module, args: tuple, name: str = name) -> None:
                    order.append(name)
                    normed.append(args[0])

                stack.callback(module.register_forward_pre_hook(meet_norm).remove)
            elif name in layers and isinstance(getattr(module, "bias", None), nn.Parameter):

                def meet_layer(_module: nn.Module, _args: tuple, output: Any, name: str = name) -> None:
                    if isinstance(output, torch.Tensor):
                        order.append(name)
                        outputs[name] = output

                stack.callback(module.register_forward_hook(meet_layer).remove)
        unit.run(teacher, teacher_inputs.first(2).copies(device))
    before_norm = {name for name, output in outputs.items() if any(output is x for x in normed)}
    return [name for name in dict.fromkeys(order) if name not in before_norm]


def _channel_axis(module: nn.Module) -> int:
    """Return the axis of channels of what is observed: a norm's input, a layer's output."""
    return -1 if isinstance(module, nn.Linear) else 1


@contextlib.contextmanager
def _observed(model: nn.Module, name: str, statistics: ChannelStatistics, stop: bool = False) -> Iterator[None]:
    """Add what a norm of that name takes, or a layer puts out, to `statistics`."""
    module = model.get_submodule(name)

    def observe(x: torch.Tensor) -> None:
        statistics.add(x, _channel_axis(module))
        if not bool(statistics.mean.isfinite().all()):
            raise InputError(
                f"Calibration met {'NaN' if bool(x.isnan().any()) else 'infinite'} values in {name!r} of "
                f"{type(model).__name__}. Check the images and the float model's own output."
            )
        if stop:
            raise Reached

    with _hooked(module, observe):
        yield


@contextlib.contextmanager
def _hooked(module: nn.Module, observe: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    if tracks_statistics(module):
        handle = module.register_forward_pre_hook(lambda _, args: observe(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: observe(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _corrected_at_once(
    student: nn.Module, teacher: nn.Module, name: str, expected: ChannelStatistics
) -> Iterator[None]:
    """Correct a site from one batch while that passes."""
    module = student.get_submodule(name)

    def observe(x: torch.Tensor) -> torch.Tensor | None:
        found = ChannelStatistics()
        found.add(x, _channel_axis(module))
        if tracks_statistics(module):
            match_statistics(module, teacher.get_submodule(name), expected, found)
            return None
        before = module.bias.detach().clone()
        correct_bias(module, expected, found)
        change = module.bias - before
        return x + (change if _channel_axis(module) == -1 else change.view(-1, *[1] * (x.dim() - 2)))

    with _hooked(module, observe):
        yield


def _teacher_statistics(
    unit: Unit, teacher: nn.Module, batches: Iterable[list[torch.Tensor]], sites: list[str]
) -> dict[str, ChannelStatistics]:
    statistics = {name: ChannelStatistics() for name in sites}
    with contextlib.ExitStack() as stack:
        for name in sites:
            stack.enter_context(_observed(teacher, name, statistics[name]))
        run_for_hooks(unit, teacher, batches)
    return statistics
