"""What models of timm, transformers and others return, and how they are called."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .errors import InputError, quote
from .losses import class_dim


@dataclass(frozen=True)
class Prediction:
    """Class logits, `(B, K)`, `(B, K, H, W)` or `(B, Q, K)`, and a detector's boxes `(B, Q, 4)` where there are."""

    logits: torch.Tensor
    boxes: torch.Tensor | None = None

    def classes(self) -> torch.Tensor:
        """Return the most likely class at each position: the shape of the logits without their class dimension."""
        return self.logits.argmax(class_dim(self.logits))

    def mask_of(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the batch's `valid_mask` `(B, H, W)` at the positions of the logits, or `None`."""
        mask = inputs.get("valid_mask")
        if mask is None:
            return None
        if self.logits.dim() == 4 and mask.dim() == 3:
            mask = F.interpolate(mask[:, None].float(), self.logits.shape[2:], mode="nearest")[:, 0].bool()
        shape = self.classes().shape
        if mask.shape != shape:
            raise InputError(f"valid_mask must be {tuple(shape)} for these logits, got {tuple(mask.shape)}.")
        return mask

    def hits(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return per image the share of positions whose class is the label's, and whether any has a label.

        `None` for labels of another kind. Maps of labels `(B, H, W)` are compared at their own size, as transformers
        does. A label below 0 is none, in maps 255 as well.
        """
        logits = self.logits
        if logits.dim() == 4 and labels.dim() == 3:
            logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear", align_corners=False)
        found = logits.argmax(class_dim(logits))
        if found.shape != labels.shape:
            return None
        found, labels = found.reshape(len(found), -1), labels.reshape(len(labels), -1)
        valid = (labels >= 0) & (labels != 255) if logits.dim() > 2 else labels >= 0
        return ((found == labels) & valid).sum(1) / valid.sum(1).clamp(min=1), valid.any(1)


def run_model(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run `model`, timm's or transformers' kind, on a batch's `pixel_values` (and `pixel_mask` if it takes one)."""
    if "pixel_values" not in inputs:
        raise InputError(
            f"The batch has no pixel_values, only {quote(sorted(inputs)) or 'nothing'}. Let the dataset or the "
            "data_collator give the images by that name."
        )
    accepted = _keywords(model)
    if "pixel_values" not in accepted:
        return model(inputs["pixel_values"])
    return model(**{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs.keys() & accepted})


def predict(model: nn.Module, inputs: Mapping[str, torch.Tensor], field: str | None = None) -> Prediction:
    """Run `model` on a batch and return its prediction.

    Args:
        model (`nn.Module`): The model.
        inputs (`dict`): The batch, see [`run_model`].
        field (`str`, *optional*): The name (or, for tuples, the number) of the logits among several outputs; a model
            with one output is not asked.

    Raises:
        `InputError`: No such output, several that could be meant, or a detector whose classes are no distribution.
    """
    outputs = run_model(model, inputs)
    if isinstance(outputs, torch.Tensor):
        return Prediction(outputs)
    elif not isinstance(outputs, Mapping):
        outputs = {str(i): value for i, value in enumerate(outputs)}
    tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and value.dim() > 1}
    if field is None:
        field = _only_logits(type(model).__name__, tensors)
    elif field not in tensors:
        raise InputError(f"output_field={field!r}: {type(model).__name__} returns {', '.join(tensors)}.")
    prediction = Prediction(tensors[field], tensors.get("pred_boxes"))
    labels = getattr(getattr(_unwrapped(model), "config", None), "num_labels", None)
    if prediction.boxes is not None and prediction.logits.shape[-1] == labels:
        raise InputError(
            f"{type(_unwrapped(model)).__name__} predicts each class by a sigmoid of its own: without a class for 'no "
            "object' its logits are no distribution to distil. Use a detector that has one, such as DETR or YOLOS."
        )
    return prediction


def _only_logits(kind: str, tensors: dict[str, torch.Tensor]) -> str:
    if "logits" in tensors:
        return "logits"
    named = [name for name in tensors if "logits" in name]
    heads = named or [name for name in tensors if name.isdigit() and tensors[name].shape == tensors["0"].shape]
    if len(heads) == 1:
        return heads[0]
    if heads:
        raise InputError(f"{kind} has several heads: {', '.join(heads)}. Choose one with output_field={heads[0]!r}.")
    raise InputError(
        f"{kind} returns no class logits, only {', '.join(tensors) or 'no tensor'}. Use a model with a head, or name "
        "an output with output_field."
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return what wrappers (DDP, a compiled model) wrap: those pass on whatever they get."""
    parameters = inspect.signature(type(model).forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    passes_on = kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    is_wrapper = passes_on and "pixel_values" not in parameters and isinstance(inner, nn.Module)
    return _unwrapped(inner) if is_wrapper else model


def _keywords(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(_unwrapped(model)).forward).parameters)
