"""From unit to unit: what each takes in the student and in the teacher, computed from what the one before put out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.student import device_of
from ..errors import InputError
from .inputs import CHUNK, Store, UnitInputs, run_unit, take_inputs
from .state import digest_of
from .units import TRACED_IMAGES, Unit


class Images:
    """The images of all batches, in chunks as models take them.

    Args:
        batches (`torch.Tensor` or `Iterable`): Images `(B, C, H, W)`, an iterable of such batches, or of dicts with
            `pixel_values` (and `pixel_mask`, where the model takes one).
        model (`nn.Module`): The chunks come on its device and in its dtype.
        most (`int`, *optional*): So many of them, from the first on; all by default.

    Raises:
        `InputError`: No images, or something else.
    """

    def __init__(
        self,
        batches: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]],
        model: nn.Module,
        most: int | None = None,
    ):
        batches = [batches] if isinstance(batches, torch.Tensor | Mapping) else list(batches)
        tensors: dict[str, list[torch.Tensor]] = {}
        for batch in batches:
            inputs = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
            if not isinstance(inputs.get("pixel_values"), torch.Tensor):
                keys = f" with the keys {sorted(inputs)}" if isinstance(batch, Mapping) else ""
                raise InputError(
                    f"A batch of images is a tensor (B, C, H, W), or a dict that holds it as pixel_values; got "
                    f"{type(batch).__name__}{keys}."
                )
            for name in ("pixel_values", "pixel_mask"):
                if isinstance(inputs.get(name), torch.Tensor):
                    tensors.setdefault(name, []).append(inputs[name])
        if not tensors or not sum(len(rows) for rows in tensors["pixel_values"]):
            raise InputError("There are no images: pass a tensor (B, C, H, W) or an iterable of such batches.")
        try:
            self._tensors = {name: torch.cat(rows)[:most] for name, rows in tensors.items()}
        except RuntimeError as error:
            shapes = sorted({tuple(rows.shape[1:]) for rows in tensors["pixel_values"]})
            raise InputError(f"All images must have one size, got {shapes}.") from error
        if not all(bool(rows.isfinite().all()) for rows in tensors["pixel_values"]):
            raise InputError("The images hold values that are NaN or infinite.")
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self._device, self._dtype = like.device, like.dtype

    def __len__(self) -> int:
        return len(self._tensors["pixel_values"])

    def first(self, count: int = TRACED_IMAGES) -> dict[str, torch.Tensor]:
        """Return the first few images, which repeat where there are less."""
        chosen = [i % len(self) for i in range(count)]
        return self._on_device({name: rows[chosen] for name, rows in self._tensors.items()})

    def chunks(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield `CHUNK` images at a time."""
        for start in range(0, len(self), CHUNK):
            yield self._on_device({name: rows[start : start + CHUNK] for name, rows in self._tensors.items()})

    def digest(self) -> str:
        """Return a hash of all images."""
        return digest_of([self._tensors[name] for name in sorted(self._tensors)])

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {name: rows.to(self._device) for name, rows in inputs.items()}
        if inputs["pixel_values"].is_floating_point():
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        return inputs


@dataclass
class Stage:
    """One unit on the way: what it takes in both models, and what the teacher's puts out."""

    unit: Unit
    inputs: UnitInputs
    teacher_inputs: UnitInputs
    target: torch.Tensor


def walk(
    units: Sequence[Unit], student: nn.Module, teacher: nn.Module, images: Images, store: Store
) -> Iterator[Stage]:
    """Yield the units in order; between two, the student's unit is what the caller made of it.

    Args:
        units (list of `Unit`): See [`find_units`].
        student, teacher (`nn.Module`): Both in eval mode.
        images (`Images`): In the order that counts.
        store (`Store`): Where tensors are kept; those that are no longer needed are freed.
    """
    device, teacher_device = device_of(student), device_of(teacher)
    stage: Stage | None = None
    for unit in units:
        if stage is not None and unit.follows:
            output = run_unit(stage.unit, student, stage.inputs, store, device)
            inputs, teacher_inputs = UnitInputs([output]), UnitInputs([stage.target])
            _free(store, stage, kept=stage.target)
        else:
            if stage is not None:
                _free(store, stage)
            inputs = take_inputs(unit, student, images.chunks(), len(images), store)
            teacher_inputs = take_inputs(unit, teacher, images.chunks(), len(images), store)
            if all(torch.equal(*pair) for pair in zip(inputs.columns, teacher_inputs.columns, strict=True)):
                for column in teacher_inputs.columns:
                    store.free(column)
                teacher_inputs = inputs
        target = run_unit(unit, teacher, teacher_inputs, store, teacher_device)
        stage = Stage(unit, inputs, teacher_inputs, target)
        yield stage
    if stage is not None:
        _free(store, stage)


def _free(store: Store, stage: Stage, kept: torch.Tensor | None = None) -> None:
    """Let go of a stage's tensors but one, whoever still holds the stage."""
    for tensor in (*stage.inputs.columns, *stage.teacher_inputs.columns, stage.target):
        if tensor is not kept:
            store.free(tensor)
    stage.inputs = stage.teacher_inputs = UnitInputs([])
    stage.target = torch.empty(0)
