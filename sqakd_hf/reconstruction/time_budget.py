"""How many updates of each unit fit into a time."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..conversion.student import device_of
from ..outputs.forward import run_model
from .calibration import STATISTICS_IMAGES
from .inputs import CHUNK, Store, run_unit, take_inputs
from .state import UnitState
from .training import COMPARED, train_unit
from .units import Unit
from .walk import Images, Stage


# Fewer updates leave a unit where it was; more have not been seen to help.
FEWEST_STEPS, MOST_STEPS = 10, 2000
# Images go so many times through the student's units while ranges and statistics are set, one site after the other.
_CALIBRATIONS = 3


@torch.no_grad()
def steps_within(
    seconds: float, units: Sequence[Unit], student: nn.Module, teacher: nn.Module, images: Images, batch_size: int
) -> int:
    """Return so many updates of each unit that all of them take about `seconds`, by timing a few.

    The student is as it was after that. At least `FEWEST_STEPS`, whatever the time.

    Args:
        seconds (`float`): For the whole reconstruction.
        units (list of `Unit`): See [`~sqakd_hf.reconstruction.units.find_units`].
        student, teacher (`nn.Module`): In eval mode, the student with ranges.
        images (`Images`), batch_size (`int`): As they will be reconstructed from.
    """
    inputs = images.first(CHUNK)
    by_student, by_teacher = (_seconds(lambda model=model: run_model(model, inputs)) for model in (student, teacher))
    count = len(images)
    student_runs = count + _CALIBRATIONS * min(count, STATISTICS_IMAGES) + 3 * min(count, COMPARED)
    others = (by_student * student_runs + by_teacher * (count + min(count, STATISTICS_IMAGES))) / CHUNK
    update = sum(_seconds_of_update(unit, student, teacher, images, batch_size) for unit in units if unit.layers)
    return min(max(int((seconds - others) / update), FEWEST_STEPS), MOST_STEPS)


def _seconds_of_update(unit: Unit, student: nn.Module, teacher: nn.Module, images: Images, batch_size: int) -> float:
    device = device_of(student)
    with Store() as store:
        inputs = take_inputs(unit, teacher, [images.first(batch_size)], batch_size, store)
        stage = Stage(unit, inputs, inputs, run_unit(unit, teacher, inputs, store, device_of(teacher)))
        state = UnitState(unit.of(student))

        def train(steps: int) -> None:
            train_unit(stage, student, teacher, steps=steps, batch_size=batch_size, seed=0, device=device)

        train(1)  # what is compiled or allocated only once
        seconds = _seconds(lambda: train(3)) - _seconds(lambda: train(1))
        state.restore()
    return max(seconds, 1e-6) / 2


def _seconds(run: Callable[[], object]) -> float:
    _finish()
    start = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
