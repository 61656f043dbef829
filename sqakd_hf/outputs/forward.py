"""What models of timm, transformers and others return, and how they are called."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .._text import quote
from ..errors import InputError
from .distributions import check_distribution, class_dim, no_distribution


@dataclass(frozen=True)
class Prediction:
    """Class logits, `(B, K)`, `(B, K, H, W)` or `(B, Q, K)`, and a detector's boxes `(B, Q, 4)` where there are.

    Raises:
        `InputError`: Logits of less than two classes, with which any two models would agree.
    """

    logits: torch.Tensor
    boxes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_distribution(self.logits)

    @property
    def by_query(self) -> bool:
        """Whether the model answers by queries, `(B, Q, K)`."""
        return self.logits.dim() == 3

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

    def counted(self, mask: torch.Tensor | None) -> torch.Tensor:
        """Return which images have a valid position, `(B,)`: the others count for nothing in means of metrics."""
        ones = torch.ones(len(self.logits), dtype=torch.bool, device=self.logits.device)
        return ones if mask is None else mask.flatten(1).any(1)

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


def require_classes(model: nn.Module) -> None:
    """Raise `InputError` where it is known, before `model` runs, that it returns no class logits.

    [`predict`] asks this too, and sees the rest by names and shapes.
    """
    model = _answering(model)
    kind = type(model).__name__
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        raise no_distribution(f"{kind} says problem_type={problem!r}")
    if any(cls.__module__.startswith("timm.models._features") for cls in type(model).__mro__):
        raise no_distribution(f"{kind} (features_only=True) returns feature maps")
    if type(model).__module__.startswith("transformers.models.") and not re.search("For[A-Z]", kind):
        raise no_distribution(f"{kind} has no head and returns embeddings")
    if config is not None and "ForPreTraining" in kind:
        raise no_distribution(f"{kind} returns what it was pretrained to, not classes")
    # Of a detector's classes, "no object" is not counted.
    counts_all = re.search("For(ImageClassification|SemanticSegmentation)", kind)
    stated = {
        "num_labels": getattr(config, "num_labels", None) if counts_all else None,
        "num_classes": getattr(model, "num_classes", None) if hasattr(model, "pretrained_cfg") else None,  # timm's
    }
    for name, count in stated.items():
        if count in (0, 1):
            raise no_distribution(f"{kind} has {('no classifier', 'a single logit')[count]} ({name}={count})")


def predict(model: nn.Module, inputs: Mapping[str, torch.Tensor], field: str | None = None) -> Prediction:
    """Run `model` on a batch and return its prediction.

    Args:
        model (`nn.Module`): The model.
        inputs (`dict`): The batch, see [`run_model`].
        field (`str`, *optional*): The name (or, for tuples, the number) of the logits among several heads; a model
            with one output is not asked.

    Raises:
        `InputError`: No such output, several that could be meant, or one that is known to be no class distribution.
    """
    require_classes(model)
    outputs = run_model(model, inputs)
    kind = type(_answering(model)).__name__
    if isinstance(outputs, torch.Tensor):
        field, tensors = "", {"": outputs}
    else:
        if not isinstance(outputs, Mapping):
            named = hasattr(outputs, "_asdict")
            outputs = outputs._asdict() if named else {str(i): value for i, value in enumerate(outputs)}
        tensors = {
            name: value for name, value in outputs.items() if isinstance(value, torch.Tensor) and value.dim() > 1
        }
        field = _named_head(kind, tensors, field, _names_its_heads(outputs))
    logits, boxes = tensors[field], tensors.get("pred_boxes")
    if "logits" not in field and boxes is None and _is_map(logits, inputs["pixel_values"]):
        raise no_distribution(f"{kind} returns {tuple(logits.shape)}, one value a pixel")
    labels = getattr(getattr(_answering(model), "config", None), "num_labels", None)
    if boxes is not None and logits.shape[-1] == labels:
        raise no_distribution(
            f"{kind} predicts each class by a sigmoid of its own, without a class for 'no object' such as DETR and "
            "YOLOS have"
        )
    return Prediction(logits, boxes)


def _named_head(kind: str, tensors: Mapping[str, torch.Tensor], field: str | None, names_its_heads: bool) -> str:
    """Return which of the outputs are the logits: the one that `field` names, or the only one that can be meant."""
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "no tensor"
    if field is not None:
        if field not in tensors:
            raise InputError(f"output_field={field!r}: {kind} returns {found}.")
        if names_its_heads and ("logits" not in field or "mask" in field):
            raise no_distribution(f"output_field={field!r} of {kind} is no softmax over classes")
        return field
    if "logits" in tensors:
        return "logits"
    named = [name for name in tensors if "logits" in name]
    heads = named or [name for name in tensors if name.isdigit()]
    if not heads or (names_its_heads and "predicted_depth" in tensors):
        raise no_distribution(f"{kind} returns {found}, and no class logits")
    if len(heads) > 1:
        raise no_distribution(f"{kind} has several heads: {found}")
    return heads[0]


def _names_its_heads(outputs: Mapping[str, Any]) -> bool:
    """Tell whether these are outputs of transformers, where logits are called so."""
    return any(cls.__module__.startswith("transformers.") for cls in type(outputs).__mro__)


def _is_map(logits: torch.Tensor, pixel_values: torch.Tensor) -> bool:
    """Tell `(B, H, W)` from `(B, Q, K)`: by the image's own proportions."""
    sizes = (*logits.shape[1:], *pixel_values.shape[2:])
    if len(sizes) != 4 or not all(type(size) is int for size in sizes):  # of an export, sizes may be symbols
        return False
    height, width, image_height, image_width = sizes
    return height * image_width == width * image_height


def _answering(model: nn.Module) -> nn.Module:
    """Return the module whose output is that of `model`: behind wrappers, and at the end of an `nn.Sequential`."""
    model = unwrapped(model)
    is_sequence = isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward
    return _answering(model[-1]) if is_sequence and len(model) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what wrappers (DDP, a compiled model) wrap: those pass on whatever they get."""
    parameters = inspect.signature(type(model).forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    passes_on = kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    is_wrapper = passes_on and "pixel_values" not in parameters and isinstance(inner, nn.Module)
    return unwrapped(inner) if is_wrapper else model


def _keywords(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(unwrapped(model)).forward).parameters)
