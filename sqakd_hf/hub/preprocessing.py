"""What image processors of transformers do to an image, as the few numbers that a model needs, and the way back."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_processing_base import ImageProcessingMixin


# How Pillow numbers the ways of resampling that ImageTransform knows by name.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_WARPED_FROM = 384  # ConvNeXt's processor cuts smaller images and warps larger ones
_COLOUR = (40, 120, 200)


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images: side in pixels, per-channel mean and std, centre-crop ratio, resampling.

    `fixed_size` tells whether it takes no other size (a ViT's position embeddings).
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    fixed_size: bool = True


def image_processor(expected: Preprocessing) -> ImageProcessingMixin:
    """Return an image processor that prepares images as `expected`: resize the shorter side, crop the centre."""
    from transformers import BitImageProcessor

    resample = next(number for number, name in _RESAMPLING.items() if name == expected.interpolation)
    return BitImageProcessor(
        size={"shortest_edge": round(expected.image_size / expected.crop_pct)},
        crop_size={"height": expected.image_size, "width": expected.image_size},
        resample=resample,
        image_mean=list(expected.mean),
        image_std=list(expected.std),
        do_convert_rgb=len(expected.mean) == 3,
    )


def read_processor(
    processor: ImageProcessingMixin, channels: int, image_size: int | None = None
) -> tuple[Preprocessing, list[str]]:
    """Return what a processor does, and in words what of it [`Preprocessing`] can't express.

    Args:
        processor (`ImageProcessingMixin`): Of images with `channels` channels.
        channels (`int`): How many the model takes.
        image_size (`int`, *optional*): The side that the model takes; by default the processor's own.
    """
    stated = processor.to_dict()
    mean, std = _normalisation(stated, channels)
    side, crop_pct, others = _geometry(stated)
    resample = stated.get("resample")
    interpolation = "bicubic" if resample is None else _RESAMPLING.get(int(resample))
    if interpolation is None:
        others.append(f"it resamples by Pillow's method {int(resample)}, not bicubically")
    if image_size and side and side != image_size:
        others.append(f"its images have {side} pixels, the model states {image_size}")
    found = Preprocessing(image_size or side or 224, mean, std, crop_pct, interpolation or "bicubic")
    if channels == 3 and (colour := _colour_made(processor, found.image_size)) is not None:
        expected = (np.array(_COLOUR) / 255 - mean) / std
        if not np.allclose(colour, expected, rtol=1e-3, atol=1e-3):
            others.append("it makes other numbers of pixels than (pixels / 255 - mean) / std")
    return found, others


def _normalisation(stated: dict[str, Any], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels in [0, 1], whatever factor the processor multiplies pixels by first."""
    factor = 255 * stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale", True) else 255.0
    factor = 1.0 if math.isclose(factor, 1.0) else factor
    if stated.get("do_normalize", True) and stated.get("image_mean") is not None:
        mean, std = _each(stated["image_mean"], channels), _each(stated["image_std"], channels)
    else:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _each(values: float | list[float], channels: int) -> tuple[float, ...]:
    return (values,) * channels if isinstance(values, int | float) else tuple(values)


def _geometry(stated: dict[str, Any]) -> tuple[int | None, float, list[str]]:
    """Return side, centre-crop ratio, and what differs from resizing the shorter side and cutting the centre."""
    size, crop = stated.get("size") or {}, stated.get("crop_size") or {}
    edge, others = size.get("shortest_edge"), []
    resizes, cuts = stated.get("do_resize", True), bool(stated.get("do_center_crop")) and bool(crop)
    if edge and stated.get("crop_pct") and not cuts:
        height, width = edge, edge
        edge = int(edge / stated["crop_pct"]) if edge < _WARPED_FROM else None
    elif cuts:
        height, width = crop.get("height"), crop.get("width")
    else:
        height, width = size.get("height", edge), size.get("width", edge)
        if resizes and not size.get("height"):
            others.append("its images keep their shape, whose centre is cut out here")
    if not resizes:
        others.append("it does not resize")
    elif edge is None and (size.get("height") or height):
        others.append("it changes the shape of images that are not square, whose centre is cut out here")
        edge = size.get("height", height)
    if height is None:
        return None, 1.0, others
    if height != width:
        others.append(f"its images have {height} x {width} pixels")
    if edge and height > edge:
        others.append(f"it pads images of {edge} pixels to {height}")
    return height, min(1.0, height / edge) if edge and resizes else 1.0, others


def _colour_made(processor: ImageProcessingMixin, side: int) -> np.ndarray | None:
    """Return what a processor makes of an image of one colour `(C,)`, or `None` where it makes no such image."""
    image = np.full((side, side, 3), _COLOUR, np.uint8)
    values = processor(image, return_tensors="pt", input_data_format="channels_last").get("pixel_values")
    if values is None or values.ndim != 4 or values.shape[1] != 3:
        return None
    return values[0, :, values.shape[2] // 2, values.shape[3] // 2].numpy()
