"""The collator: images, and labels only where the dataset has them."""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError
from .teacher_cache import LOGITS


class ImageCollator:
    """Stack `pixel_values` into `(B, C, H, W)`, and `labels` (or `label`), `valid_mask`, `pixel_mask` where present.

    Labels are class numbers, `(B,)`, or maps of them, `(B, H, W)`; others (boxes) and all other columns are dropped.
    `valid_mask` `(B, H, W)` is `False` where the loss is to leave pixels out; `pixel_mask` is passed to the model. The
    teacher's cached logits go along.

    Examples:
        >>> batch = ImageCollator()([{"pixel_values": torch.zeros(3, 8, 8), "path": "a.png"}])
        >>> {key: tuple(value.shape) for key, value in batch.items()}
        {'pixel_values': (1, 3, 8, 8)}
    """

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        first = features[0]
        if "pixel_values" not in first:
            raise InputError(
                f"The dataset yields the columns {sorted(first)} but not 'pixel_values'. Give it a transform, such as "
                "dataset.with_transform(ImageTransform(...))."
            )
        batch = {"pixel_values": torch.stack([torch.as_tensor(f["pixel_values"]) for f in features])}
        for key in ("labels", "label"):
            if first.get(key) is not None and not _is_annotation(first[key]):
                batch["labels"] = torch.stack([torch.as_tensor(f[key]).long() for f in features])
                break
        for key in ("valid_mask", "pixel_mask"):
            if first.get(key) is not None:
                batch[key] = torch.stack([torch.as_tensor(f[key]).bool() for f in features])
        if LOGITS in first:
            batch[LOGITS] = torch.stack([f[LOGITS] for f in features])
        return batch


def _is_annotation(label: Any) -> bool:
    """Tell whether a label is made of boxes and the like, as detectors have it."""
    return isinstance(label, Mapping) or (isinstance(label, list | tuple) and any(map(_is_annotation, label)))
