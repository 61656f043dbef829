"""Block by block, each unit of a student learns to put out what the teacher's does."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..conversion.student import device_of
from ..layers.quantized_layer import QuantizedLayer
from ..quantization.quantizers import FakeQuantizer
from . import processes
from .calibration import calibrate_unit
from .inputs import Store, run_unit
from .optimizer import RatedAdam, rated_parameters
from .state import Progress, UnitResult, UnitState
from .units import Unit
from .walk import Images, Stage, walk
from .windows import Window, find_window


# Share of elements that pass as in the teacher (a unit's input) or unquantized (activations inside), while it learns.
MIXED = 0.5
# Units are compared, before and after, on so many images.
COMPARED = 128


def train_unit(
    stage: Stage,
    student: nn.Module,
    teacher: nn.Module,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> None:
    """Train one unit of the student, in place: `steps` updates towards the teacher's output.

    See [QDrop](https://huggingface.co/papers/2203.05740) for the mixing of quantized and float activations. The
    rounding of weights is straight-through.
    """
    unit = stage.unit
    generator = torch.Generator(device).manual_seed(seed + processes.rank())
    window = None if unit.is_head else find_window(unit, teacher, stage.teacher_inputs, device)
    variance = _variance(stage)
    rated = rated_parameters(unit.of(student))
    optimizer = RatedAdam(rated)
    order: list[int] = []
    with _learning(unit.of(student), optimizer.parameters), _mixing(unit, student, generator):
        for step in range(steps):
            if len(order) < batch_size:
                order += torch.randperm(len(stage.inputs), generator=generator, device=device).tolist()
            rows, order = order[:batch_size], order[batch_size:]
            loss = _loss(stage, student, rows, window, generator, device)
            if not unit.is_head:
                loss = loss / variance
            gradients = torch.autograd.grad(loss, optimizer.parameters, allow_unused=True)
            optimizer.step(processes.average(gradients), 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(
    stage: Stage,
    student: nn.Module,
    rows: Sequence[int],
    window: Window | None,
    generator: torch.Generator,
    device: torch.device,
) -> torch.Tensor:
    unit, inputs, teacher_inputs, target = stage.unit, stage.inputs, stage.teacher_inputs, stage.target
    place = None if window is None else window.place(generator)

    def take(column: torch.Tensor) -> torch.Tensor:
        if place is not None:
            column = window.of_input(column, *place)
        return column[rows].to(device)

    columns = [take(column) for column in inputs.columns]
    if inputs.main is not teacher_inputs.main:
        main = unit.arguments.main
        columns[main] = _mixed(columns[main], take(teacher_inputs.main), generator)
    output = unit.run(student, columns)
    if place is None:
        expected = target[rows].to(device)
    else:
        output = window.compared(output, *place)
        expected = window.of_output(target, *place)[rows].to(device)
    return unit_error(unit, output, expected)


def unit_error(unit: Unit, output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error, or for the head the KL divergence at temperature 1."""
    if unit.is_head:
        return F.kl_div(output.log_softmax(-1), expected.log_softmax(-1), reduction="batchmean", log_target=True)
    return F.mse_loss(output, expected)


def _mixed(x: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return `x` with a random share of its elements taken from `other`."""
    # Eight elements for each number that is drawn, by their lower seven bits.
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(generator=generator)
    chosen = drawn.view(torch.uint8)[: x.numel()].bitwise_and_(127) < round(MIXED * 128)
    return torch.where(_like(chosen, x), other, x)


def _like(flat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View a flat tensor in the shape and memory order of `x`, where that is dense."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = x.shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(x.shape)


@contextlib.contextmanager
def _mixing(unit: Unit, student: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Let a random share of the activations inside a unit pass unquantized."""

    def mix(_quantizer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return _mixed(output, args[0], generator)

    with contextlib.ExitStack() as stack:
        for module in (inner for outer in unit.of(student) for inner in outer.modules()):
            if isinstance(module, FakeQuantizer) and module.role == "activation":
                stack.callback(module.register_forward_hook(mix).remove)
        yield


@contextlib.contextmanager
def _learning(modules: Sequence[nn.Module], parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let gradients reach these parameters of the modules and no others, whatever was frozen."""
    everything = [parameter for module in modules for parameter in module.parameters()]
    before = [parameter.requires_grad for parameter in everything]
    try:
        for parameter in everything:
            parameter.requires_grad_(any(parameter is learned for learned in parameters))
        with torch.enable_grad():
            yield
    finally:
        for parameter, trains in zip(everything, before, strict=True):
            parameter.requires_grad_(trains)


@torch.no_grad()
def reconstruct_units(
    units: Sequence[Unit],
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    store: Store,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
    on_unit: Callable[[UnitResult], None] | None = None,
) -> list[UnitResult]:
    """Calibrate and train one unit after the other; each is left in the best of its states.

    Args:
        units (list of `Unit`): See [`find_units`].
        student, teacher (`nn.Module`): Both in eval mode; the student is changed in place.
        images (`Images`), store (`Store`): See [`walk`].
        steps (`int`), batch_size (`int`), seed (`int`): Of the training of each unit.
        progress (`Progress`, *optional*): Where finished units are kept, and taken from.
        on_unit (`Callable`, *optional*): Is told the result of each unit.
    """
    results = []
    for number, stage in enumerate(walk(units, student, teacher, images, store)):
        result = None if progress is None else progress.load(number, stage.unit, student)
        if result is None:
            result = _improve(stage, student, teacher, store, steps, batch_size, seed * 1_000_003 + number)
            if progress is not None:
                progress.save(number, stage.unit, student, result)
        results.append(result)
        if on_unit is not None:
            on_unit(result)
    return results


def _improve(
    stage: Stage, student: nn.Module, teacher: nn.Module, store: Store, steps: int, batch_size: int, seed: int
) -> UnitResult:
    """Calibrate and train one unit, and leave it in the state of the least error."""
    unit, device, start = stage.unit, device_of(student), time.perf_counter()
    modules = unit.of(student)
    errors = [_relative_error(stage, student, store, device)]
    states = [UnitState(modules)]
    calibrate_unit(unit, student, teacher, stage.inputs, stage.teacher_inputs, device)
    errors.append(_relative_error(stage, student, store, device))
    states.append(UnitState(modules))
    if unit.layers and steps:
        train_unit(stage, student, teacher, steps=steps, batch_size=batch_size, seed=seed, device=device)
        settle_weights([student.get_submodule(name) for name in unit.layers])
        errors.append(_relative_error(stage, student, store, device))
        states.append(UnitState(modules))
    least = min(range(len(errors)), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)
    states[least].restore()
    return UnitResult(unit.name, errors[0], errors[1], errors[least], time.perf_counter() - start)


@torch.no_grad()
def settle_weights(layers: Iterable[QuantizedLayer]) -> None:
    """Put latent weights on the values that they are quantized to, in place, where that keeps the codes.

    A straight-through training leaves many at the threshold between two codes, where the first update of any later
    training would change them together.
    """
    for layer in layers:
        codes, latent = layer.weight_codes(), layer.stored_weight.detach().clone()
        layer.stored_weight.copy_(layer.weight_quantizer.latent(layer.quantized_weight()))
        if not torch.equal(layer.weight_codes(), codes):
            layer.stored_weight.copy_(latent)


def _relative_error(stage: Stage, student: nn.Module, store: Store, device: torch.device) -> float:
    few = stage.inputs.first(COMPARED)
    output = run_unit(stage.unit, student, few, store, device)
    target = stage.target[: len(few)]
    error = float(unit_error(stage.unit, output, target))
    store.free(output)
    error = error if stage.unit.is_head else error / _variance(stage)
    # All processes have to make the same choice.
    return float(processes.average([torch.tensor(error, dtype=torch.float64)])[0])


def _variance(stage: Stage) -> float:
    """Return the variance of what the teacher's unit puts out; errors are in units of it."""
    return max(float(stage.target[:COMPARED].float().var()), torch.finfo(torch.float32).tiny)
