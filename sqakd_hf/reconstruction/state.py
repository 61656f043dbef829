"""What a student is at one moment: to come back to, and to go on from in another process."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import InputError
from ..quantization.quantizers import FakeQuantizer
from .units import Unit


@dataclass(frozen=True)
class UnitResult:
    """What became of one unit.

    Args:
        name (`str`): See [`Unit`].
        before, calibrated, after (`float`): Its error: mean squared error over the variance of the teacher's output,
            or for the head the KL divergence at temperature 1. As it came; with ranges, statistics and biases set
            anew; as it was left, which is the least of these two and the trained one.
        seconds (`float`): Time it took.
    """

    name: str
    before: float
    calibrated: float
    after: float
    seconds: float


class UnitState:
    """The tensors of some modules as they are now, to come back to."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self._tensors = [
            (tensor, tensor.detach().clone())
            for module in self._modules
            for tensor in (*module.parameters(), *module.buffers())
        ]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors themselves, in a fixed order."""
        return [tensor for tensor, _ in self._tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self._tensors:
            tensor.data = value.clone()
        refresh_quantizers(self._modules)


def refresh_quantizers(modules: Iterable[nn.Module]) -> None:
    """Bring quantizers inside up to date after their tensors were changed."""
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, FakeQuantizer):
            module.refresh()


class Progress:
    """Finished units in a folder: an interrupted reconstruction goes on behind the last of them.

    Args:
        folder (`str` or `Path`): Made where there is none.
        run (`dict`): What the result depends on, as plain data; a folder of another run is refused.

    Raises:
        `InputError`: The folder holds the progress of another run.
    """

    _RUN = "reconstruction.json"
    _STEPS = "steps.json"

    def __init__(self, folder: str | Path, run: dict[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self._RUN
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                stored = {}
            differing = sorted(key for key in {*stored, *run} if stored.get(key) != run.get(key))
            if differing:
                raise InputError(
                    f"{str(self.folder)!r} holds the progress of another reconstruction, with other "
                    f"{', '.join(differing)}. Pass another checkpoint folder, or delete that one to begin anew."
                )
        else:
            write_whole(path, json.dumps(run, indent=1).encode())

    @property
    def steps(self) -> int | None:
        """The number of updates that was found by timing, `None` before that."""
        path = self.folder / self._STEPS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @steps.setter
    def steps(self, steps: int) -> None:
        write_whole(self.folder / self._STEPS, json.dumps(steps).encode())

    def save(self, number: int, unit: Unit, student: nn.Module, result: UnitResult) -> None:
        """Keep a finished unit."""
        tensors = {name: tensor.contiguous() for name, tensor in _tensors(unit, student).items()}
        path = self._path(number)
        half_written = path.with_suffix(".part")
        save_file(tensors, half_written, metadata={"result": json.dumps(asdict(result))})
        os.replace(half_written, path)

    @torch.no_grad()
    def load(self, number: int, unit: Unit, student: nn.Module) -> UnitResult | None:
        """Make the student's unit the one that was kept and return its result; `None` where none was."""
        path = self._path(number)
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            for name, tensor in _tensors(unit, student).items():
                value = file.get_tensor(name).to(tensor.device)
                if value.shape == tensor.shape:
                    tensor.copy_(value)
                else:  # a range that is not set yet
                    tensor.data = value
            refresh_quantizers(unit.of(student))
            return UnitResult(**json.loads(file.metadata()["result"]))

    def _path(self, number: int) -> Path:
        return self.folder / f"unit_{number:04d}.safetensors"


def _tensors(unit: Unit, student: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a unit by their names in the student."""
    found = {}
    for name, module in zip(unit.modules, unit.of(student), strict=True):
        for inner, tensor in (*module.named_parameters(name), *module.named_buffers(name)):
            found[inner] = tensor
    return found


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, whenever the program is killed."""
    half_written = path.with_suffix(".part")
    half_written.write_bytes(content)
    os.replace(half_written, path)


def digest_of(tensors: Sequence[torch.Tensor]) -> str:
    """Return a hash of the values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
