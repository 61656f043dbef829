"""Windows of large feature maps: a unit of local operations is trained on a part of each map at a time."""

from dataclasses import dataclass

import torch
from torch import nn

from .inputs import UnitInputs
from .units import Unit


# Positions of the output, in each direction, that a window compares.
SIDE = 16
# How far beyond these a window may reach, so that zeros at its border, where the map goes on, change nothing inside.
_MARGINS = (1, 2, 3, 4)
# A map has to be so many times larger than the window to be worth it.
_WORTH = 1.5


@dataclass(frozen=True)
class Window:
    """How windows of a unit's maps are cut.

    Args:
        stride (`int`): Positions of the input for one of the output.
        margin (`int`): Outermost positions of an output that the window's own border reaches.
        height, width (`int`): Size of the whole output.
    """

    stride: int
    margin: int
    height: int
    width: int

    def place(self, generator: torch.Generator) -> tuple[slice, slice]:
        """Draw rows and columns of the output."""
        side = SIDE + 2 * self.margin
        top, left = (
            int(torch.randint(max(size - side, 0) + 1, (), generator=generator, device=generator.device))
            for size in (self.height, self.width)
        )
        return slice(top, min(top + side, self.height)), slice(left, min(left + side, self.width))

    def of_input(self, maps: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Return the part of the input `(B, C, H, W)` that belongs to these rows and columns of the output."""
        scaled = (slice(part.start * self.stride, part.stop * self.stride) for part in (rows, columns))
        return maps[(..., *scaled)]

    def compared(self, output: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Return the part of a window's output that is as in the whole map."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return output[(..., self._inside(rows, self.height, height), self._inside(columns, self.width, width))]

    def of_output(self, maps: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Return the same part of the whole output."""
        return self.compared(maps[..., rows, columns], rows, columns)

    def _inside(self, part: slice, size: int, length: int) -> slice:
        first = 0 if part.start == 0 else self.margin
        last = length if part.stop == size else length - self.margin
        return slice(first, last)


@torch.no_grad()
def find_window(unit: Unit, teacher: nn.Module, inputs: UnitInputs, device: torch.device) -> Window | None:
    """Return how to cut windows for a unit, `None` where its maps are small or not computed locally.

    A window in the middle of the float unit's maps has to give what the whole map gives there.
    """
    if len(inputs.columns) != 1 or inputs.main.dim() != 4:
        return None
    whole = inputs.main[:2].to(device, copy=True)
    output = unit.run(teacher, [whole.clone()])
    if output.dim() != 4:
        return None
    height, width = output.shape[2:]
    stride = whole.shape[2] // height
    if (height * stride, width * stride) != tuple(whole.shape[2:]):
        return None
    for margin in _MARGINS:
        window, side = Window(stride, margin, height, width), SIDE + 2 * margin
        if min(height, width) < side or height * width < _WORTH * side * side:
            return None
        rows, columns = (slice((size - side) // 2, (size - side) // 2 + side) for size in (height, width))
        part = window.of_input(whole, rows, columns).clone()
        found = window.compared(unit.run(teacher, [part]), rows, columns)
        expected = window.of_output(output, rows, columns)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-4 * output.abs().max()):
            return window
    return None
