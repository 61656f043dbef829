"""What is exported, and the images that it is traced on."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from .._text import first_line
from .._validation import check_integer
from ..conversion.calibration import calibrate_model
from ..conversion.student import is_calibrated, quantized_layers, require_planned_layers
from ..conversion.trace import example_images, image_channels
from ..errors import InputError
from ..hub.loading import load_model
from ..hub.model_preprocessing import preprocessing
from ..hub.preprocessing import Preprocessing


EXAMPLES = 8


def require_student(model: nn.Module | str) -> nn.Module:
    """Return the student, loaded if it is named; anything else is an `InputError`."""
    student = load_model(model) if isinstance(model, str) else model
    require_planned_layers(student)
    if not quantized_layers(student) or not hasattr(student, "quantization_plan"):
        raise InputError("The model is no student of quantize_model. Quantize it with that, calibrate or train it.")
    return student


def with_ranges(student: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return the student, or, where it has no ranges yet, a copy that is calibrated on these images."""
    if is_calibrated(student):
        return student
    student = copy.deepcopy(student).to("cpu", torch.float32)
    try:
        calibrate_model(student, [images], disable_progress=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(student).__name__} does not run on images of {tuple(images.shape[2:])} pixels: {first_line(error)}"
        ) from error
    return student


def expected_images(student: nn.Module) -> Preprocessing | None:
    """Return how the student's images are prepared, `None` where that is not known."""
    return preprocessing(student) if isinstance(student, PreTrainedModel) else None


def noise(student: nn.Module, image_size: int | None, count: int = EXAMPLES) -> torch.Tensor:
    """Return images of noise `(count, C, H, W)`, of pixels that an image can have where its preprocessing is known."""
    if image_size is not None:
        check_integer(image_size, "image_size")
    generator = torch.Generator().manual_seed(0)
    expected = expected_images(student)
    if expected is None:
        size = next(example_images(student, torch.device("cpu"))).shape[2:] if image_size is None else [image_size] * 2
        return torch.randn(count, image_channels(student), *size, generator=generator)
    size = image_size or expected.image_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (expected.mean, expected.std))
    pixels = torch.randint(256, (count, len(mean), size, size), generator=generator)
    return (pixels / 255 - mean) / std
