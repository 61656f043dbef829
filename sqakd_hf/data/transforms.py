"""From encoded images to the normalised tensors that a model takes."""

import functools
import logging
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._text import quote, reason, suggest
from ..errors import InputError


if TYPE_CHECKING:
    import PIL.Image

logger = logging.getLogger(__name__)

AUGMENTATIONS = ("none", "crop", "crop-flip", "resized-crop")
GREY_MODES = ("1", "L", "LA", "I", "F")  # and I;16 with its byte orders
FORMATS_OF_16_BITS = ("PPM", "PNG")  # whose 16 bits Pillow opens as mode "I" (PNG: before Pillow 11)
# What Pillow raises for files that it can't decode; OSError includes missing files and unknown formats.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)


@dataclass
class ImageTransform:
    """Turn a batch of encoded images into normalised tensors, for `dataset.with_transform(transform)`.

    Images are turned upright by their EXIF orientation and converted to RGB or to grey, whichever the model takes
    (warned of once), and transparent parts are composed over white. The result is `(pixels / 255 - mean) / std`, of
    pixels in 8 bits: 16 bits are divided by 257, floats, of which 1 is white, multiplied by 255. No image is scaled by
    its own contents: floats outside [0, 1] are an error, and so are 32-bit integers, whose white nobody has agreed on,
    unless their file has 16 bits (PGM).

    Args:
        size (`int`): Height and width of the result, in pixels.
        mean (`Sequence[float]`): Mean of each channel in units of [0, 1]; three for RGB, one for grey.
        std (`Sequence[float]`): Standard deviation of each channel in the same units.
        crop_pct (`float`, *optional*, defaults to 1.0): Side of the centre crop over the shorter side of the image.
        interpolation (`str`, *optional*, defaults to `"bicubic"`): A `torchvision.transforms.InterpolationMode`.
        augment (`str`, *optional*, defaults to `"none"`): Drawn from torch's global generator, which
            `SQAKDTrainer` seeds anew for what it reads.
            - `"none"`: shorter side to `round(size / crop_pct)`, centre crop.
            - `"crop"`: shorter side to `size`, pad by `size // 8` (mirrored), random crop.
            - `"crop-flip"`: the same, and a horizontal flip with probability 0.5.
            - `"resized-crop"`: random crop of 0.35 to 1 of the area, resized, and the flip.

    Raises:
        InputError: If an argument is not accepted, or on use if an image can't be read.

    Examples:
        >>> from sqakd_hf import ImageTransform, load_image_data
        >>> data = load_image_data("digits")
        >>> transform = ImageTransform(16, mean=[0.5], std=[0.5])
        >>> item = data.train.with_transform(transform)[0]
        >>> item["pixel_values"].shape, item["labels"]
        (torch.Size([1, 16, 16]), 0)
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    _: KW_ONLY
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    augment: str = "none"

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        self._check()
        self._mode = "RGB" if len(self.mean) == 3 else "L"
        self._reshape = _build_reshape(self.size, self.crop_pct, self.interpolation, self.augment)

    def without_augmentation(self) -> "ImageTransform":
        """Return a copy with `augment="none"`, for evaluation."""
        return replace(self, augment="none")

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Decode and normalise a batch.

        Args:
            batch (`Mapping[str, list]`): Columns; `image` holds `{"bytes": ..., "path": ...}` or Pillow images.

        Returns:
            `dict[str, list]`: `pixel_values`, float32 tensors of shape `(C, size, size)`, and, only if `batch` has the
            column `label`, `labels`, integers.

        Raises:
            InputError: If there is no column `image`, or if an image is missing or corrupt; the message names it.
        """
        if "image" not in batch:
            raise InputError(
                f"ImageTransform needs the column 'image', got {quote(sorted(batch))}. Keep that column; with a "
                "Trainer set remove_unused_columns=False."
            )
        images = [self._decode(value, number) for number, value in enumerate(batch["image"], start=1)]
        pixels = torch.from_numpy(np.stack([np.asarray(self._reshape(image)) for image in images]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (B, C, size, size)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        normalized = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
        result: dict[str, list[Any]] = {"pixel_values": list(normalized)}
        if "label" in batch:
            result["labels"] = batch["label"]
        return result

    def _decode(self, value: Any, number: int) -> "PIL.Image.Image":
        """Return the image in the mode of the model, upright; `number` is its place in the batch, from 1."""
        import datasets
        import PIL.Image

        try:
            if value is None:
                raise ValueError("it is missing")
            if not isinstance(value, PIL.Image.Image | Mapping):
                raise TypeError(f"it is a {type(value).__name__}")
            image = value if isinstance(value, PIL.Image.Image) else datasets.Image().decode_example(value)
            self._warn_of_channels(image)
            return _convert_mode(image, self._mode)
        except (*DECODING_ERRORS, PIL.Image.DecompressionBombError) as error:
            path = value.get("path") if isinstance(value, dict) else None
            what = f"Image '{path}'" if path else f"Image number {number} of the batch"
            raise InputError(
                f"{what} can't be read ({reason(error)}); accepted are Pillow's images and the files that it opens, "
                "of 8 or 16 bits or of floats from 0 to 1. Remove or replace it."
            ) from error

    def _warn_of_channels(self, image: "PIL.Image.Image") -> None:
        """Warn that images have other channels than the model."""
        is_grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
        if is_grey and self._mode == "RGB":
            warn_once(
                "Grey images are converted to RGB for a model with 3 input channels. A model with 1 input channel "
                "would compute less. (Said once.)"
            )
        elif not is_grey and self._mode == "L":
            warn_once(
                "Colour images are converted to grey for a model with 1 input channel. To keep the colours use a "
                "model with 3. (Said once.)"
            )

    def _check(self) -> None:
        """Raise `InputError` for the first argument that is not accepted."""
        from torchvision.transforms import InterpolationMode

        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(
                f"size must be an integer of at least 1, got {self.size!r}. Give the side of the images in pixels."
            )
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise InputError(
                f"mean and std must have three values each (RGB) or one each (grey), got {len(self.mean)} and "
                f"{len(self.std)}. Give those of the model."
            )
        if min(self.std) <= 0:
            raise InputError(
                f"std must be greater than 0 in every channel, got {list(self.std)}. Give those of the model."
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(
                f"crop_pct must be greater than 0 and at most 1, got {self.crop_pct!r}. Use 1 for no centre crop."
            )
        modes = sorted(mode.value for mode in InterpolationMode)
        for argument, value, known in (
            ("interpolation", self.interpolation, modes),
            ("augment", self.augment, AUGMENTATIONS),
        ):
            if value not in known:
                raise InputError(
                    f"Unknown {argument} {value!r}; accepted are {quote(known)}."
                    f"{suggest(value, known) or ' Use one of them.'}"
                )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time a process asks for it, however many transforms it has."""
    logger.warning(message)


def _build_reshape(size: int, crop_pct: float, interpolation: str, augment: str) -> torch.nn.Module:
    """Return a map from an image to one of `size` x `size` pixels."""
    from torchvision.transforms import InterpolationMode, v2

    mode = InterpolationMode(interpolation)
    if augment == "none":
        steps = [v2.Resize(round(size / crop_pct), mode), v2.CenterCrop(size)]
    elif augment == "resized-crop":
        steps = [v2.RandomResizedCrop(size, scale=(0.35, 1), interpolation=mode)]
    else:
        steps = [v2.Resize(size, mode), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    if augment in ("crop-flip", "resized-crop"):
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)


def _convert_mode(image: "PIL.Image.Image", mode: str) -> "PIL.Image.Image":
    """Convert an image to `"RGB"` or `"L"`: wider pixels brought to 8 bits, transparent parts composed over white."""
    import PIL.Image

    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _to_8_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Return a grey image of wider pixels in 8 bits: what is white follows from its kind, never from its contents."""
    import PIL.Image

    levels = np.asarray(image)
    if image.mode == "F":
        if not ((levels >= 0) & (levels <= 1)).all():  # NaN is neither
            raise ValueError(f"its floats reach from {levels.min():g} to {levels.max():g}, and 1 is white")
        levels = levels.astype(np.float64) * 65535
    elif image.mode == "I" and image.format not in FORMATS_OF_16_BITS:
        raise ValueError("it holds 32-bit integers, which do not tell what is white")
    grey = PIL.Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(PIL.Image.fromarray(levels != image.info["transparency"]).convert("L"))
    return grey
