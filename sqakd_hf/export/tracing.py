"""From a module to a graph of ONNX's operators, by torch's exporter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from .._text import first_line
from ..errors import InputError
from ..outputs.forward import predict


INPUT, OUTPUTS = "pixel_values", ("logits", "pred_boxes")
OPSET = 21  # the first with 4-bit integers and blocks of scales


class Outputs(nn.Module):
    """A model from images `(B, C, H, W)` to what files put out: its class logits, and a detector's boxes."""

    def __init__(self, model: nn.Module, output_field: str | None = None) -> None:
        super().__init__()
        self.model, self.output_field = model, output_field

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        prediction = predict(self.model, {INPUT: pixel_values}, self.output_field)
        return (prediction.logits,) if prediction.boxes is None else (prediction.logits, prediction.boxes)


def trace(
    module: nn.Module, kind: str, example: torch.Tensor, dynamic_image_size: bool = False
) -> torch.onnx.ONNXProgram:
    """Return the program of a module from `pixel_values` to `logits` and `pred_boxes`, for any number of images.

    Args:
        module (`nn.Module`): In eval mode, on the CPU.
        kind (`str`): What messages call it.
        example (`torch.Tensor`): Images `(B, C, H, W)`.
        dynamic_image_size (`bool`, *optional*, defaults to `False`): Take images of any size, where the module does.

    Raises:
        `InputError`: An operator or a size that can't be exported, or a dimension that the module fixes.
    """
    dimensions = {0: torch.export.Dim("batch", min=1)}
    if dynamic_image_size:
        dimensions |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                # Two images: one would fix the size of the batch.
                (example.repeat(2, 1, 1, 1)[:2].float().cpu(),),
                dynamo=True,
                input_names=[INPUT],
                dynamic_shapes={INPUT: dimensions},
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, InputError):  # it says itself what to do
                raise cause from None
            raise InputError(
                f"{kind} can't be exported at {tuple(example.shape[2:])} pixels: {first_line(cause)}"
            ) from error
    graph = program.model.graph
    shape = graph.inputs[0].shape
    fixed = [i for i in dimensions if isinstance(shape[i], int)]
    if fixed:
        what = "the number of images" if 0 in fixed else "the size of images"
        raise InputError(
            f"{kind} fixes {what} when it is exported (by len(x), int(...) or a comparison in its forward). Use "
            "x.shape[0] there" + (", or export without dynamic_image_size." if 0 not in fixed else ".")
        )
    for value, name in zip(graph.outputs, OUTPUTS, strict=False):
        value.name = name
    return program


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
