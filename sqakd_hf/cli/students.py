"""What commands are given to work on: a saved student, or a float model to quantize."""

import logging
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..conversion.convert import quantize_model
from ..conversion.student import quantized_layers
from ..data.transforms import ImageTransform
from ..errors import InputError
from ..hub.loading import WeightsNotFoundError, build_model, load_model
from ..hub.preprocessing import Preprocessing
from .quantization_arguments import QuantizationArguments


logger = logging.getLogger(__name__)


def load_student(name: str) -> PreTrainedModel:
    """Return the saved student of this folder or Hub id; a float model is an `InputError`."""
    model = load_model(name)
    if not quantized_layers(model):
        raise InputError(f"{name!r} is a float model, not a student. `sqakd distill` makes one.")
    return model.eval()


def student_or_plan(
    name: str, quantization: QuantizationArguments, given: Sequence[str], image_size: int | None, num_labels: int
) -> nn.Module:
    """Return the saved student of this name, or what the arguments make of the float model, without ranges.

    A student has its own quantization: with it none of the arguments may be `given`.
    """
    config = quantization.to_config()
    try:
        model = load_model(name)
    except WeightsNotFoundError as error:
        model = build_model(name, num_labels, image_size)  # what is quantized does not depend on the weights
        logger.warning("Random weights, and %d classes unless --num_labels says. %s", num_labels, error)
    if not quantized_layers(model):
        quantize_model(model, config)
    elif given:
        raise InputError(f"{name!r} is a student, whose quantization is its own. Leave out --{', --'.join(given)}.")
    return model.eval()


def expected_transform(expected: Preprocessing, image_size: int | None = None) -> ImageTransform:
    """Return how a model expects its images, without augmentation; of another size where one is given."""
    return ImageTransform(
        image_size or expected.image_size,
        expected.mean,
        expected.std,
        crop_pct=expected.crop_pct,
        interpolation=expected.interpolation,
    )


def class_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the model's classes in their order, `LABEL_0` and so on where it has none."""
    return [name for _, name in sorted(model.config.id2label.items())]
