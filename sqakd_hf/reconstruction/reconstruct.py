"""Block by block, each unit of a student learns to put out what the teacher's does."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..convert import device_of, quantized_layers, quantizers, record_signedness, require_planned_layers
from ..errors import InputError
from ..layers import QuantizedLayer
from ..quantizers import FakeQuantizer
from ..teacher import parameter_shapes
from ..trace import evaluating
from .calibration import calibrate_unit
from .inputs import Store, UnitInputs, run_unit
from .optimizer import RatedAdam, rated_parameters
from .units import Unit, find_units, require_units
from .walk import Images, Stage, walk
from .windows import Window, find_window


logger = logging.getLogger(__name__)

FEWEST_IMAGES = 32
# Share of elements that pass as in the teacher (a unit's input) or unquantized (activations inside), while it learns.
MIXED = 0.5
# Units are compared, before and after, on so many images.
COMPARED = 256


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Args:
        name (`str`): See [`Unit`].
        before, calibrated, after (`float`): Its error: mean squared error over the variance of the teacher's output,
            or for the head the KL divergence at temperature 1; as it came, with ranges and statistics set anew, and
            as it is left: the least of the three stages.
        seconds (`float`): Time it took.
    """

    name: str
    before: float
    calibrated: float
    after: float
    seconds: float


def reconstruct_unit(
    unit: Unit,
    student: nn.Module,
    teacher: nn.Module,
    inputs: UnitInputs,
    teacher_inputs: UnitInputs,
    target: torch.Tensor,
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
    generator = torch.Generator(device).manual_seed(seed)
    window = None if unit.is_head else find_window(unit, teacher, teacher_inputs, device)
    variance = float(target[:COMPARED].float().var())
    rated = rated_parameters(unit.of(student))
    optimizer = RatedAdam(rated)
    order: list[int] = []
    with _learning(unit.of(student), optimizer.parameters), _mixing(unit, student, generator):
        for step in range(steps):
            if len(order) < batch_size:
                order += torch.randperm(len(inputs), generator=generator, device=device).tolist()
            rows, order = order[:batch_size], order[batch_size:]
            loss = _loss(unit, student, inputs, teacher_inputs, target, rows, window, generator, device)
            if not unit.is_head:
                loss = loss / variance
            gradients = torch.autograd.grad(loss, optimizer.parameters, allow_unused=True)
            optimizer.step(gradients, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _loss(
    unit: Unit,
    student: nn.Module,
    inputs: UnitInputs,
    teacher_inputs: UnitInputs,
    target: torch.Tensor,
    rows: Sequence[int],
    window: Window | None,
    generator: torch.Generator,
    device: torch.device,
) -> torch.Tensor:
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
    drawn = torch.empty_like(x, dtype=torch.uint8).random_(256, generator=generator)
    return torch.where(drawn < round(MIXED * 256), other, x)


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


class UnitState:
    """The tensors of some modules as they are now, to come back to."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self._tensors = [
            (tensor, tensor.detach().clone())
            for module in self._modules
            for tensor in (*module.parameters(), *module.buffers())
        ]

    def restore(self) -> None:
        for tensor, value in self._tensors:
            tensor.data = value.clone()
        for module in (inner for outer in self._modules for inner in outer.modules()):
            if isinstance(module, FakeQuantizer):
                module.refresh()


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
    bar: tqdm | None = None,
) -> list[UnitResult]:
    """Calibrate and train one unit after the other; each is left in the best of its three stages."""
    device = device_of(student)
    results = []
    for number, stage in enumerate(walk(units, student, teacher, images, store)):
        unit, inputs, start = stage.unit, stage.inputs, time.perf_counter()
        modules = unit.of(student)

        def error(stage: Stage = stage) -> float:
            return _relative_error(stage, student, store, device)

        before, as_it_was = error(), UnitState(modules)
        calibrate_unit(unit, student, teacher, inputs, stage.teacher_inputs, device)
        best, state = before, as_it_was
        calibrated = error()
        if calibrated < best:
            best, state = calibrated, UnitState(modules)
        if steps and unit.layers:
            reconstruct_unit(
                unit,
                student,
                teacher,
                inputs,
                stage.teacher_inputs,
                stage.target,
                steps=steps,
                batch_size=batch_size,
                seed=seed * 1_000_003 + number,
                device=device,
            )
            if (trained := error()) < best:
                best, state = trained, None
        if state is not None and not (state is not as_it_was and not steps):
            state.restore()
        results.append(UnitResult(unit.name, before, calibrated, best, time.perf_counter() - start))
        if bar is not None:
            bar.set_postfix_str(f"{unit.name} {before:.3g} -> {best:.3g}")
            bar.update()
    return results


def _relative_error(stage: Stage, student: nn.Module, store: Store, device: torch.device) -> float:
    few = stage.inputs.first(COMPARED)
    output = run_unit(stage.unit, student, few, store, device)
    target = stage.target[: len(few)]
    error = float(unit_error(stage.unit, output, target))
    store.free(output)
    return error if stage.unit.is_head else error / float(target.float().var())
