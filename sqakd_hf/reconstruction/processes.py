"""Several processes, each with images of its own, that make one student: what they have to agree on."""

from collections.abc import Iterable

import torch
from torch import distributed


def count() -> int:
    """Return the number of processes, 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 without `torch.distributed`."""
    return distributed.get_rank() if count() > 1 else 0


def sum_up(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over the processes."""
    if count() == 1:
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def average(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return the mean of each tensor over the processes."""
    tensors = list(tensors)
    if count() == 1:
        return tensors
    found = [tensor for tensor in tensors if tensor is not None]
    flat = sum_up(torch.cat([tensor.reshape(-1) for tensor in found])) / count()
    means = iter(
        part.view_as(tensor)
        for part, tensor in zip(flat.split([tensor.numel() for tensor in found]), found, strict=True)
    )
    return [None if tensor is None else next(means) for tensor in tensors]


@torch.no_grad()
def take_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors, in place, the values that they have in the first process."""
    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.data, 0)
