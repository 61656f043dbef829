"""The collator: images, and labels only where the dataset has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError


# What collators and the trainer call a teacher's cached logits; no dataset has such a column of its own.
LOGITS = "_teacher_logits"
# The label of an image, or a pixel, without one: PyTorch's `ignore_index`. Any negative number means the same.
NO_LABEL = -100


class ImageCollator:
    """Stack `pixel_values` into `(B, C, H, W)`, and `labels` (or `label`), `valid_mask`, `pixel_mask` where present.

    A dataset may yield pairs `(image, label)` as well, as torchvision's do. Images are floats, normalised as the model
    expects them. Labels are class numbers, `(B,)`, or maps of them, `(B, H, W)`; others (boxes) and all other columns
    are dropped. In a batch with labels, an image without one gets -100, which counts nowhere. `valid_mask` `(B, H, W)`
    is `False` where the loss is to leave pixels out; `pixel_mask` is passed to the model. The teacher's cached logits
    go along.

    Examples:
        >>> batch = ImageCollator()([{"pixel_values": torch.zeros(3, 8, 8), "path": "a.png"}])
        >>> {key: tuple(value.shape) for key, value in batch.items()}
        {'pixel_values': (1, 3, 8, 8)}
        >>> ImageCollator()([(torch.zeros(3, 8, 8), 2), (torch.zeros(3, 8, 8), None)])["labels"]
        tensor([   2, -100])
    """

    def __call__(self, features: list[Mapping[str, Any] | Sequence[Any]]) -> dict[str, torch.Tensor]:
        rows = [columns(item) for item in features]
        if "pixel_values" not in rows[0]:
            raise InputError(
                f"The dataset yields the columns {sorted(rows[0])} but not 'pixel_values'. Give it a transform, such "
                "as dataset.with_transform(ImageTransform(...))."
            )
        images = [_tensor("pixel_values", row["pixel_values"]) for row in rows]
        if not all(image.is_floating_point() for image in images):
            raise InputError(
                f"pixel_values must be floats, normalised as the model expects them, got {images[0].dtype}. Give the "
                "dataset a transform: ImageTransform, or torchvision's ToDtype(torch.float32, scale=True) and "
                "Normalize."
            )
        batch = {"pixel_values": _stack("pixel_values", images)}
        for key, values, dtype, filling in (
            ("labels", [_label(row) for row in rows], torch.int64, NO_LABEL),
            ("valid_mask", [row.get("valid_mask") for row in rows], torch.bool, True),
            ("pixel_mask", [row.get("pixel_mask") for row in rows], torch.bool, True),
        ):
            tensors = [None if value is None else _tensor(key, value).to(dtype) for value in values]
            found = [tensor for tensor in tensors if tensor is not None]
            if found:
                missing = torch.full_like(found[0], filling)
                batch[key] = _stack(key, [missing if tensor is None else tensor for tensor in tensors])
        if LOGITS in rows[0]:
            batch[LOGITS] = torch.stack([row[LOGITS] for row in rows])
        return batch


def columns(item: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """Return the columns of what a dataset yields: itself, or the image and label of a pair."""
    if isinstance(item, Mapping):
        return item
    if isinstance(item, tuple | list) and len(item) in (1, 2):
        return dict(zip(("pixel_values", "labels"), item, strict=False))
    raise InputError(
        f"The dataset yields a {type(item).__name__}; accepted are dicts with 'pixel_values' and pairs (image, label)."
    )


def _label(row: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the label of an image, a class number or a map of them, or `None`."""
    for key in ("labels", "label"):
        if row.get(key) is not None and not _is_annotation(row[key]):
            label = _tensor(key, row[key])
            if label.numel():
                return label.squeeze() if label.shape == (1,) else label
    return None


def _is_annotation(label: Any) -> bool:
    """Tell whether a label is made of boxes and the like, as detectors have it."""
    return isinstance(label, Mapping) or (isinstance(label, list | tuple) and any(map(_is_annotation, label)))


def _tensor(column: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{column!r} must hold tensors, arrays or numbers, got a {type(value).__name__}. Give the dataset a "
            "transform, such as dataset.with_transform(ImageTransform(...))."
        ) from error


def _stack(column: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in tensors))
    if len(shapes) > 1:
        raise InputError(
            f"{column!r} of one batch must have one shape, got {' and '.join(map(str, shapes[:2]))}. Resize or crop "
            "all images to one size."
        )
    return torch.stack(tensors)
