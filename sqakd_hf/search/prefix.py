"""A network's forward that begins in its middle: what is in front is not computed again."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..conversion.watcher import tensors_in
from ..outputs.forward import run_model
from ..reconstruction.inputs import Reached
from ..reconstruction.units import Unit
from ..reconstruction.walk import Images


class Prefix:
    """The units in front of one, whose outputs stand in for them on the same images.

    Only the last of them puts out what it computed, the others NaN: nothing behind may read them, and whether that is
    so is tried on the first images. Where it is not (dense connections), or where nothing is in front, the whole
    network runs.

    Args:
        units (list of `Unit`): Those in front, in order.
        model (`nn.Module`): The float model, in eval mode.
        images (`Images`): As they will be run.
    """

    def __init__(self, units: Sequence[Unit], model: nn.Module, images: Images):
        self._names = [name for unit in units for name in unit.modules]
        self._kept: list[dict[str, Any]] = []  # of each chunk of images: module → what it puts out
        for number, chunk in enumerate(images.chunks() if self._names else []):
            outputs, expected = self._watch(model, chunk, to_the_end=number == 0)
            self._kept.append(outputs)
            if number == 0 and not self._stands_in(model, chunk, expected):
                self._names = []
                break

    def _watch(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], to_the_end: bool
    ) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Return what the modules in front put out on these images and, where it runs to the end, the whole model."""
        seen: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for name in self._names:

                def keep(_module: nn.Module, _args: tuple, output: Any, name: str = name) -> None:
                    is_last = name == self._names[-1]
                    seen[name] = pytree.tree_map_only(torch.Tensor, torch.clone if is_last else _nothing, output)
                    if is_last and not to_the_end:
                        raise Reached

                stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)
            with contextlib.suppress(Reached):
                return seen, tensors_in(run_model(model, inputs))
        return seen, []

    def _stands_in(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], expected: Sequence[torch.Tensor]
    ) -> bool:
        try:
            with self.skipped(model, 0):
                found = tensors_in(run_model(model, inputs))
        except Exception:  # whatever a model makes of tensors that it may not change
            return False
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    @contextlib.contextmanager
    def skipped(self, model: nn.Module, chunk: int) -> Iterator[None]:
        """Context in which a copy of the model, changed behind the prefix alone, does not compute the prefix."""
        with contextlib.ExitStack() as stack:
            for name in self._names:
                module = model.get_submodule(name)
                module.forward = _Puts(self._kept[chunk][name])
                stack.callback(vars(module).pop, "forward")
            yield


class _Puts:
    """A forward that puts out what is kept; what is behind may change it in place."""

    def __init__(self, outputs: Any):
        self.outputs = outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, _fresh, self.outputs)


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    """Return NaN of this shape, in no memory; what is not floating-point is kept."""
    if not tensor.is_floating_point():
        return tensor
    return torch.full((1,), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if 0 in tensor.stride() and tensor.numel() > 1 else tensor.clone()
