"""The collator: images, and labels only where the dataset has them."""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError


class ImageCollator:
    """Stack `pixel_values` into `(B, C, H, W)`, and `labels` (or `label`) into `(B,)` where present; drop the rest.

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
            if first.get(key) is not None:
                batch["labels"] = torch.as_tensor([int(f[key]) for f in features])
                break
        return batch
