"""What a model expects of its images: as it was trained here, as its folder says, or as timm knows."""

import logging
import os
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from ..conversion.trace import image_channels
from ..data.hub_access import hub_is_reachable
from ..errors import InputError
from .preprocessing import Preprocessing, image_processor, read_processor


logger = logging.getLogger(__name__)


RECORDED = "sqakd_preprocessing"  # the field of a transformers config


_USED = "_sqakd_preprocessing"  # the same of a model in memory: newer than what lies where it was loaded from


def preprocessing(model: PreTrainedModel) -> Preprocessing:
    """Return the preprocessing of a model's images.

    It is timm's metadata, or else what was recorded since the model was loaded, what the image processor that is saved
    with it does, or what its config was saved with. Where none is known a warning says what is assumed.
    """
    found = _known_preprocessing(model)
    if found is None:
        channels, stated = image_channels(model), _stated_size(model)
        found = Preprocessing(stated or 224, (0.5,) * channels, (0.5,) * channels, fixed_size=stated is not None)
        _warn_once_of(
            model,
            f"How {_name_of(model)} wants its images is not known: no image processor is saved with it. Assumed are "
            f"{found.image_size} pixels, a mean of 0.5 and a std of 0.5. Save its processor into its folder, or pass "
            "it to SQAKDTrainer as processing_class.",
        )
    return found


def _known_preprocessing(model: PreTrainedModel) -> Preprocessing | None:
    if isinstance(model.config, TimmWrapperConfig):
        return _timm_preprocessing(model)
    fixed_size = _stated_size(model) is not None
    if (used := vars(model).get(_USED)) is not None:
        return replace(used, fixed_size=fixed_size)
    if (processor := _saved_processor(model)) is not None:
        found, others = read_processor(processor, image_channels(model), _stated_size(model))
        if others:
            _warn_once_of(
                model,
                f"The image processor of {_name_of(model)} does more than size, mean and std express: "
                f"{'; '.join(others)}. Images are prepared without that here.",
            )
        return replace(found, fixed_size=fixed_size)
    recorded = getattr(model.config, RECORDED, None)
    if recorded is None:
        return None
    try:
        return Preprocessing(
            **{**recorded, "mean": tuple(recorded["mean"]), "std": tuple(recorded["std"])}, fixed_size=fixed_size
        )
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{RECORDED} in the config of {_name_of(model)} is no preprocessing: {recorded!r}. Remove it."
        ) from error


def _timm_preprocessing(model: PreTrainedModel) -> Preprocessing | None:
    cfg = model.config.pretrained_cfg or {}
    if "mean" not in cfg or "input_size" not in cfg:
        return None
    channels, mean, std = image_channels(model), tuple(cfg["mean"]), tuple(cfg["std"])
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return Preprocessing(
        cfg["input_size"][1],
        mean,
        std,
        cfg.get("crop_pct", 1.0),
        cfg.get("interpolation", "bicubic"),
        bool(cfg.get("fixed_input_size")),
    )


def _stated_size(model: PreTrainedModel) -> int | None:
    if isinstance(model.config, TimmWrapperConfig):
        return ((model.config.pretrained_cfg or {}).get("input_size") or (None, None))[1]
    stated = getattr(model.config, "image_size", None)
    return stated if isinstance(stated, int) else stated[0] if stated else None


def _saved_processor(model: PreTrainedModel) -> ImageProcessingMixin | None:
    """Return the image processor that is saved where `model` came from."""
    name = model.config._name_or_path
    if not name:
        return None
    offline = not os.path.isdir(name) and not hub_is_reachable()
    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=offline)
    except (OSError, ValueError):
        return None


def _name_of(model: PreTrainedModel) -> str:
    return repr(model.config._name_or_path) if model.config._name_or_path else type(model).__name__


def _warn_once_of(model: PreTrainedModel, message: str) -> None:
    if vars(model).get("_preprocessing_warning") != message:
        model._preprocessing_warning = message
        logger.warning(message)


def record_preprocessing(model: PreTrainedModel, used: Preprocessing) -> None:
    """Let the config of `model` state the preprocessing that it was trained with, in place: it is saved with it."""
    if isinstance(model.config, TimmWrapperConfig):
        numbers = _numbers(used)
        size = numbers.pop("image_size")
        cfg = {**(model.config.pretrained_cfg or {}), "input_size": (len(used.mean), size, size), **numbers}
        model.config.pretrained_cfg = cfg
    else:
        setattr(model.config, RECORDED, _numbers(used))
        setattr(model, _USED, used)


def _numbers(used: Preprocessing) -> dict[str, Any]:
    """Return what JSON holds of a preprocessing; whether the size is fixed is the model's own."""
    numbers = {name: value for name, value in asdict(used).items() if name != "fixed_size"}
    return numbers | {"mean": list(used.mean), "std": list(used.std)}


def record_processor(model: nn.Module, processor: Any) -> None:
    """Record what an image processor does, in place, unless that is what the model states already."""
    if not isinstance(model, PreTrainedModel) or not isinstance(processor, ImageProcessingMixin):
        return
    stated = processor.to_dict()
    if "image_mean" not in stated and "size" not in stated:
        return  # timm's, of the model's own metadata
    used, others = read_processor(processor, image_channels(model))
    if others:
        _warn_once_of(
            model,
            f"{type(processor).__name__} does more than size, mean and std express: {'; '.join(others)}. Only those "
            "are recorded with the model.",
        )
    known = _known_preprocessing(model)
    if known is None or image_processor(known).to_dict() != image_processor(used).to_dict():
        record_preprocessing(model, used)


def keep_preprocessing(model: PreTrainedModel) -> None:
    """Let the config state what is known, in place: a model is about to be saved without its image processor."""
    if not isinstance(model.config, TimmWrapperConfig) and (known := _known_preprocessing(model)) is not None:
        setattr(model.config, RECORDED, _numbers(known))


def processor_of(model: PreTrainedModel) -> ImageProcessingMixin | None:
    """Return the image processor saved where `model` came from; else, for a classifier, one like its preprocessing."""
    if vars(model).get(_USED) is None and (processor := _saved_processor(model)) is not None:
        return processor
    is_classifier = type(model).__name__.endswith("ForImageClassification")
    return image_processor(preprocessing(model)) if is_classifier else None
