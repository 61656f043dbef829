"""What a reconstruction takes on this machine, and how many updates of each unit fit into a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cost:
    """What a reconstruction is expected to take on this machine.

    Args:
        fixed (`float`): Seconds for all but the updates.
        update (`float`): Seconds for one update of each unit.
        memory (`int`): Bytes for what units take and put out, for all images, at the most.
    """

    fixed: float
    update: float
    memory: int

    def seconds(self, steps: int) -> float:
        """Return the time that so many updates of each unit take."""
        return self.fixed + steps * self.update

    def steps(self, seconds: float) -> int:
        """Return so many updates of each unit as fit into a time, at least `FEWEST_STEPS`."""
        return min(max(int((seconds - self.fixed) / self.update), FEWEST_STEPS), MOST_STEPS)


@torch.no_grad()
def cost_of(units: Sequence[Unit], student: nn.Module, teacher: nn.Module, images: Images, batch_size: int) -> Cost:
    """Return what a reconstruction will take, by a few updates of each unit; the student is as it was after that.

    Args:
        units (list of `Unit`): See [`~sqakd_hf.reconstruction.units.find_units`].
        student, teacher (`nn.Module`): In eval mode, the student with ranges.
        images (`Images`), batch_size (`int`): As they will be reconstructed from.
    """
    inputs, count = images.first(CHUNK), len(images)
    by_student, by_teacher = (_seconds(lambda model=model: run_model(model, inputs)) for model in (student, teacher))
    student_runs = count + _CALIBRATIONS * min(count, STATISTICS_IMAGES) + 3 * min(count, COMPARED)
    fixed = (by_student * student_runs + by_teacher * (count + min(count, STATISTICS_IMAGES))) / CHUNK
    each = [_cost_of_update(unit, student, teacher, images, batch_size) for unit in units]
    # Of student and teacher.
    memory = 2 * count * max(size for _, size in each)
    return Cost(fixed, max(sum(seconds for seconds, _ in each), 1e-6), memory)


def _cost_of_update(
    unit: Unit, student: nn.Module, teacher: nn.Module, images: Images, batch_size: int
) -> tuple[float, int]:
    """Return the seconds of an update, and the bytes that one image takes before and behind the unit."""
    device = device_of(student)
    with Store() as store:
        inputs = take_inputs(unit, teacher, [images.first(batch_size)], batch_size, store)
        target = run_unit(unit, teacher, inputs, store, device_of(teacher))
        size = sum(tensor.nbytes for tensor in (*inputs.columns, target)) // batch_size
        if not unit.layers:
            return 0.0, size
        stage, state = Stage(unit, inputs, inputs, target), UnitState(unit.of(student))

        def train(steps: int) -> None:
            train_unit(stage, student, teacher, steps=steps, batch_size=batch_size, seed=0, device=device)

        train(1)  # what is compiled or allocated only once
        seconds = _seconds(lambda: train(3)) - _seconds(lambda: train(1))
        state.restore()
    return max(seconds, 0.0) / 2, size


def _seconds(run: Callable[[], object]) -> float:
    _finish()
    start = time.perf_counter()
    run()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
