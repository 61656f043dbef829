"""What several processes hold alike."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..conversion.student import quantizers, record_signedness


@torch.no_grad()
def follow_first_process(model: nn.Module, world_size: int) -> None:
    """Give every process the first one's ranges and buffers: DDP evens them only as a training forward begins."""
    if world_size == 1:
        return
    own = [tensor for quantizer in quantizers(model) for tensor in quantizer.range_tensors().values()]
    for tensor in {id(tensor): tensor for tensor in (*own, *model.buffers())}.values():
        if not isinstance(tensor, DTensor):  # sharded: the processes hold parts of one tensor
            torch.distributed.broadcast(tensor.data, src=0)
    for quantizer in quantizers(model):
        quantizer.refresh()
    record_signedness(model)
