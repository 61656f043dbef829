"""Widths that come down in the course of a training: many bits first, the model's own at the end."""

from collections.abc import Sequence

from torch import nn

from ..conversion.student import quantizers
from ..errors import InputError


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return the widths as a tuple if they are a falling sequence of numbers of bits, else raise an `InputError`."""
    widths = tuple(widths)
    whole = all(isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8 for bits in widths)
    if not whole or list(widths) != sorted(set(widths), reverse=True):
        raise InputError(f"progressive_bits must be numbers of bits from 8 to 2, falling, got {list(widths)!r}.")
    return widths


class ProgressiveBits:
    """The stages of a training: equal shares of its steps, each with a width, the last with the model's own.

    A quantizer has the stage's width or its own, whichever is larger.

    Args:
        model (`nn.Module`): The student.
        widths (`Sequence[int]`): Bits of the stages before the last.
    """

    def __init__(self, model: nn.Module, widths: Sequence[int]) -> None:
        self.widths = check_widths(widths)
        self._own = {quantizer: quantizer.bits for quantizer in quantizers(model)}
        if useless := [bits for bits in self.widths if bits <= min(self._own.values())]:
            raise InputError(
                f"progressive_bits {useless}: no quantizer of the student has fewer bits. Pass widths above the "
                f"student's own, which begin at {min(self._own.values())}."
            )

    def stage(self, step: int, steps: int) -> int:
        """Return which stage a step of the training belongs to, from 0."""
        return min(step * (len(self.widths) + 1) // max(steps, 1), len(self.widths))

    def enter(self, stage: int) -> None:
        """Give every quantizer its width in this stage; its range is to be set anew."""
        at_least = (*self.widths, 1)[stage]
        for quantizer, bits in self._own.items():
            quantizer.bits = max(bits, at_least)

    def forget_ranges(self) -> None:
        """Leave the quantizers without ranges: those of another width are none."""
        for quantizer in self._own:
            quantizer.reset()

    def leave(self) -> bool:
        """Give every quantizer its own width; tell whether one had another. Ranges end with it."""
        changed = any(quantizer.bits != bits for quantizer, bits in self._own.items())
        self.enter(len(self.widths))
        if changed:
            self.forget_ranges()
        return changed
