"""What units take and put out, kept for all images: in memory, or in a temporary file where that is too small."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import nn

from ..errors import InputError
from ..outputs.forward import run_model
from .units import Unit


# Images that run together where nothing is trained. Results do not depend on how many there are in all, and a resumed
# run computes the same bits.
CHUNK = 32


class Store:
    """Gives tensors that hold something for each image, in memory up to a budget and in temporary files beyond it.

    Args:
        memory_budget (`int`, *optional*): Bytes; `None` takes half of what is free now.

    Use it as a context: at its end the files are gone.
    """

    def __init__(self, memory_budget: int | None = None):
        self.budget = psutil.virtual_memory().available // 2 if memory_budget is None else memory_budget
        self.used = 0
        self._folder: tempfile.TemporaryDirectory | None = None
        self._files: dict[int, tuple[str, int]] = {}
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def allocate(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor `(count, ...)` for rows of the shape of those of `like`.

        Maps `(B, C, H, W)` lie in memory with their channels last, in which convolutions are quicker on a CPU.

        Raises:
            `InputError`: Neither the budget nor the disk has room.
        """
        shape = (count, *like.shape[1:])
        size = math.prod(shape) * like.element_size()
        if self.used + size <= self.budget:
            flat = torch.empty(math.prod(shape), dtype=like.dtype)
            self.used += size
            self._sizes[flat.data_ptr()] = size
        else:
            flat = self._in_file(math.prod(shape), size, like.dtype)
        if len(shape) != 4:
            return flat.view(shape)
        batch, channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def _in_file(self, count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="reconstruction-", ignore_cleanup_errors=True)
        free = shutil.disk_usage(self._folder.name).free
        if size > free - free // 20:
            raise InputError(
                f"There is no room for what a unit takes: {size / 1e9:.1f} GB are needed, memory_budget leaves "
                f"{max(self.budget - self.used, 0) / 1e9:.1f} GB and {tempfile.gettempdir()!r} {free / 1e9:.1f} GB. "
                "Pass fewer images, or a larger memory_budget."
            )
        handle, path = tempfile.mkstemp(dir=self._folder.name)
        os.close(handle)
        flat = torch.from_file(path, shared=True, size=count, dtype=dtype)
        self._files[flat.data_ptr()] = (path, size)
        return flat

    def free(self, tensor: torch.Tensor) -> None:
        """Let go of a tensor that [`allocate`] gave; its file goes with it."""
        self.used -= self._sizes.pop(tensor.data_ptr(), 0)
        path, _ = self._files.pop(tensor.data_ptr(), (None, 0))
        if path is not None:
            with contextlib.suppress(OSError):  # Windows keeps a file that is still mapped
                os.unlink(path)


class UnitInputs:
    """What a unit takes, for all images.

    Args:
        columns (`list[torch.Tensor]`): The tensors among its arguments that differ by image, `(images, ...)`.
        main (`int`): The number of the one that earlier units computed.
    """

    def __init__(self, columns: Sequence[torch.Tensor], main: int = 0):
        self.columns, self._main = list(columns), main

    @property
    def main(self) -> torch.Tensor:
        return self.columns[self._main]

    def __len__(self) -> int:
        return len(self.columns[0])

    def first(self, count: int) -> "UnitInputs":
        """Return the same of the first `count` images, without a copy."""
        return UnitInputs([column[:count] for column in self.columns], self._main)

    def copies(self, device: torch.device) -> list[torch.Tensor]:
        """Return copies of all tensors, which a unit may change in place."""
        return [column.to(device, copy=True) for column in self.columns]

    def chunks(self, device: torch.device) -> Iterator[list[torch.Tensor]]:
        """Yield copies of `CHUNK` images each."""
        for start in range(0, len(self), CHUNK):
            yield [column[start : start + CHUNK].to(device, copy=True) for column in self.columns]


class Reached(Exception):  # noqa: N818 - no error
    """A hook has what it wants: the rest of the model or unit need not run."""


def take_inputs(
    unit: Unit, model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], count: int, store: Store
) -> UnitInputs:
    """Run `model` up to `unit` and return what that takes.

    Args:
        unit (`Unit`): The unit.
        model (`nn.Module`): Student or teacher, in eval mode.
        batches (list of `dict`): `CHUNK` images each, on the model's device.
        count (`int`): Images in all.
        store (`Store`): Where the tensors go.
    """
    columns: list[torch.Tensor] = []
    start = 0

    def take(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found = unit.arguments.columns_of(args, kwargs, len(batch["pixel_values"]))
        if not columns:
            columns.extend(store.allocate(count, rows) for rows in found)
        for column, rows in zip(columns, found, strict=True):
            column[start : start + len(rows)] = rows
        raise Reached

    handle = unit.of(model)[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(Reached):
                run_model(model, batch)
            start += len(batch["pixel_values"])
    finally:
        handle.remove()
    return UnitInputs(columns, unit.arguments.main)


def run_unit(unit: Unit, model: nn.Module, inputs: UnitInputs, store: Store, device: torch.device) -> torch.Tensor:
    """Run a unit on all images and return what it puts out, `(images, ...)`."""
    output, start = None, 0
    for columns in inputs.chunks(device):
        rows = unit.run(model, columns)
        output = store.allocate(len(inputs), rows) if output is None else output
        output[start : start + len(rows)] = rows
        start += len(rows)
    return output


def run_for_hooks(unit: Unit, model: nn.Module, batches: Iterable[list[torch.Tensor]]) -> None:
    """Run a unit for what hooks see; a hook that raises [`Reached`] ends its batch early."""
    for columns in batches:
        with contextlib.suppress(Reached):
            unit.run(model, columns)
