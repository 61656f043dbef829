"""A model as it was, where changing it fails or did not help."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .student import quantized_layers, quantizers


_TABLES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the modules of `model` their classes, attributes, children, hooks and dtypes back where something raises.

    What tensors hold is not: nothing in between may change them in place.
    """
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in (*model.parameters(), *model.buffers())]
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    tables = [vars(module).get(name) for module in model.modules() for name in _TABLES]
    tables = [table for table in tables if isinstance(table, dict)]  # a scripted module, which is refused, has others
    held = [(value, value.copy()) for value in (*tables, *(v for m in model.modules() for v in holders(m)))]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for holder, content in held:
            holder.clear()
            holder.update(content) if isinstance(holder, dict) else holder.extend(content)
        for tensor, data, grad in tensors:
            if tensor.dtype != data.dtype:
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad
        raise


def holders(module: nn.Module) -> list[list | dict]:
    """Return the lists and dicts in which `module` holds others: some models call their layers from those."""
    values = (value for value in vars(module).values() if isinstance(value, list | dict))
    return [
        held
        for held in values
        if any(isinstance(child, nn.Module) for child in (held.values() if isinstance(held, dict) else held))
    ]


class StudentState:
    """A student as it is now, to come back to: values of its tensors, attributes of layers and quantizers, its plan.

    Args:
        student (`nn.Module`): After [`quantize_model`].
        tensors (`Iterable[torch.Tensor]`, *optional*): Those of its tensors that can change; all by default.
    """

    def __init__(self, student: nn.Module, tensors: Iterable[torch.Tensor] | None = None):
        self._attributes = [(m, dict(vars(m))) for m in (*quantized_layers(student).values(), *quantizers(student))]
        self._owner = next((module for module in student.modules() if "quantization_plan" in vars(module)), None)
        self._plan = None if self._owner is None else self._owner.quantization_plan
        tensors = (*student.parameters(), *student.buffers()) if tensors is None else tensors
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Make the student what it was; once."""
        for module, before in self._attributes:
            vars(module).clear()
            vars(module).update(before)
        for tensor, value in self._tensors:
            tensor.data = value
        if self._owner is not None:
            self._owner.quantization_plan = self._plan


@contextlib.contextmanager
def unchanged_on_error(student: nn.Module, tensors: Iterable[torch.Tensor] | None = None) -> Iterator[None]:
    """Make a student what it was where something raises; the arguments are those of [`StudentState`]."""
    state = StudentState(student, tensors)
    try:
        yield
    except BaseException:
        state.restore()
        raise
