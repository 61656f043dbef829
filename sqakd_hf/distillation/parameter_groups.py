"""What an optimizer learns by which rate: weights by the training's, ranges by their own."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..conversion.student import quantized_layers, quantizers


logger = logging.getLogger(__name__)


def ranges_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a student that learn by `quantizer_learning_rate`."""
    own = (parameter for quantizer in quantizers(model) for parameter in quantizer.parameters(recurse=False))
    return [parameter for parameter in own if parameter.requires_grad]


@contextlib.contextmanager
def set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which `parameters` do not ask for gradients: who makes an optimizer leaves them out."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def warn_of_missing(optimizer: torch.optim.Optimizer, model: nn.Module, ranges: Sequence[nn.Parameter]) -> None:
    """Say it if an optimizer that was passed leaves out what the student learns by."""
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    weights = [layer.stored_weight for layer in quantized_layers(model).values()]
    weights = [weight for weight in weights if weight.requires_grad]
    for what, own in (("ranges of its quantizers", ranges), ("quantized weights", weights)):
        if missing := sum(id(parameter) not in given for parameter in own):
            logger.warning(
                "The optimizer that was passed lacks %d of the student's %d %s: those stay as they are. Make it "
                "of the parameters of the quantized student, or let the trainer make one.",
                missing,
                len(own),
                what,
            )
