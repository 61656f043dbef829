"""A model as it was, where changing its modules fails."""

import contextlib
from collections.abc import Iterator

from torch import nn


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
