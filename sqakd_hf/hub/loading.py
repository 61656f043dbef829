"""Float models by name: `timm/NAME`, a Hugging Face id, or a folder."""

import logging
import os
import re
import types
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .._text import first_line, quote, suggest
from .._validation import check_integer
from ..data.hub_access import hub_is_reachable
from ..errors import InputError


logger = logging.getLogger(__name__)

TIMM_PREFIX = "timm/"
# Names of files of weights, half-written ones (`model.safetensors.part`) included.
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack)\b")


class WeightsNotFoundError(InputError):
    """The name is a known architecture without weights: the Hub and the local cache, or the folder, have none.

    Never said of weights that are there and damaged, nor of a student, which is its weights.
    """


def load_model(name: str, num_labels: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load an image classifier with its trained weights: a full-precision model, or a stored student.

    Args:
        name (`str`): `timm/NAME` (without a tag: timm's default weights, `timm/resnet18` is
            `timm/resnet18.a1_in1k`), any Hugging Face id, or a folder that `save_pretrained` wrote.
        num_labels (`int`, *optional*): Give the model a new head for this many classes, randomly initialised where
            the stored head has another number.
        **kwargs: Passed to `from_pretrained`.

    Raises:
        `WeightsNotFoundError`: Neither the Hub nor the cache has the weights, or the folder is a `config.json` alone.
        `InputError`: A name that does not exist, with close names; files that are damaged or lack weights.
    """
    source = resolve_name(name)
    offline = not os.path.isdir(source) and not hub_is_reachable()
    config = None
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=offline)
        if isinstance(config, TimmWrapperConfig):
            _timm()  # it may be one of the paper's networks
            # A timm repository may state it, the wrapper states it too.
            config.model_args = {k: v for k, v in (config.model_args or {}).items() if k != "num_classes"}
        new_head = num_labels is not None and num_labels != config.num_labels
        if new_head:
            _set_num_labels(config, num_labels)
            kwargs["ignore_mismatched_sizes"] = True
        # In full precision, whatever its file is in.
        kwargs.setdefault("dtype", torch.float32)
        model, found = AutoModelForImageClassification.from_pretrained(
            source, config=config, local_files_only=offline, output_loading_info=True, **kwargs
        )
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        shown = repr(name) + (f" ({source})" if source != name else "")
        raise _why_not_loaded(source, shown, config, offline, error) from error
    missing = sorted(key for key in found["missing_keys"] if not (new_head and _may_start_anew(model, key)))
    if missing:
        raise InputError(
            f"The files of {name!r} lack {quote(missing[:3])}, {len(missing)} weights of {type(model).__name__}: "
            "they are damaged or of another model. Save or download it again; num_labels gives a model a new head."
        )
    return model


def load_teacher(name: str, num_labels: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Call [`load_model`], which this was named before it loaded students too."""
    warnings.warn("load_teacher is now load_model; the old name will go.", FutureWarning, stacklevel=2)
    return load_model(name, num_labels, **kwargs)


def _may_start_anew(model: PreTrainedModel, key: str) -> bool:
    """Tell whether a tensor that a backbone's files lack is part of a new head, or a norm that starts as identity."""
    tensor = model.state_dict()[key]
    return tensor.dim() < 2 or len(tensor) == model.config.num_labels or key.split(".")[0] != model.base_model_prefix


def _why_not_loaded(
    source: str, shown: str, config: PreTrainedConfig | None, offline: bool, error: Exception
) -> InputError:
    """Return the error to raise: what is there and damaged, or that there are no weights."""
    reason = f"{first_line(error).rstrip('.')}."
    if config is not None and _has_weights(source, offline):
        return InputError(
            f"The model {shown} can't be loaded: {reason} If its files are damaged or incomplete, save or download "
            "them again."
        )
    if getattr(config, "quantization_config", None) is not None:
        return InputError(
            f"The weights of the quantized model {shown} are missing: {reason} Save or download it again."
        )
    if not os.path.isdir(source):
        return WeightsNotFoundError(
            f"Neither the Hub nor the local cache gives trained weights for {shown}: {reason} Check the name and the "
            "connection, or pass a folder with a trained model."
        )
    if config is None:
        return InputError(f"The folder {shown} holds no model: {reason} Pass one that save_pretrained wrote.")
    return WeightsNotFoundError(
        f"The folder {shown} has no trained weights: {reason} Pass one that save_pretrained wrote."
    )


def _has_weights(source: str, offline: bool) -> bool:
    """Tell whether a folder, or a repository on the Hub or in the cache, has files of weights, whole or not."""
    if os.path.isdir(source):
        return any(_WEIGHTS.search(name) for name in os.listdir(source))
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    try:
        return any(
            cached_file(
                source,
                name,
                local_files_only=offline,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for name in names
        )
    except OSError:  # no such repository, or none of ours to see
        return False


def build_model(
    name: str, num_labels: int, image_size: int | None = None, model_args: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Build an image classifier with random weights.

    Args:
        name (`str`): `timm/NAME`, or a folder (or cached Hugging Face id) with a `config.json`.
        num_labels (`int`): Number of classes.
        image_size (`int`, *optional*): Side of the square images; the architecture's own by default.
        model_args (`dict`, *optional*): Further arguments of the timm architecture, such as `{"patch_size": 4}`, or
            fields of the transformers config.

    Raises:
        `InputError`: A name or an argument that the architecture does not know.
    """
    check_integer(num_labels, "num_labels")
    model_args = dict(model_args or {})
    if name.startswith(TIMM_PREFIX):
        timm = _timm()
        resolve_name(name)
        architecture = name.removeprefix(TIMM_PREFIX)
        pretrained_cfg = timm.models.get_pretrained_cfg(architecture)
        cfg = pretrained_cfg.to_dict() if pretrained_cfg else {"input_size": (3, 224, 224)}
        channels, native, _ = cfg["input_size"]
        size = image_size or model_args.get("img_size") or native
        cfg["input_size"] = (model_args.get("in_chans", channels), size, size)
        if cfg.get("fixed_input_size") and size != native:
            model_args.setdefault("img_size", size)
        config = TimmWrapperConfig(
            architecture=architecture.split(".")[0], num_labels=num_labels, pretrained_cfg=cfg, model_args=model_args
        )
    else:
        try:
            offline = not os.path.isdir(name) and not hub_is_reachable()
            config = AutoConfig.from_pretrained(name, local_files_only=offline)
        except (OSError, ValueError) as error:
            raise InputError(_unknown(name, first_line(error))) from error
        _set_num_labels(config, num_labels)
        if image_size is not None and hasattr(config, "image_size"):
            model_args.setdefault("image_size", image_size)
        for key, value in model_args.items():
            if not hasattr(config, key):
                raise InputError(f"{type(config).__name__} has no field {key!r}.{suggest(key, vars(config))}")
            setattr(config, key, value)
    random_numbers = torch.get_rng_state()
    try:
        return AutoModelForImageClassification.from_config(config)
    except Exception as error:  # an architecture raises whatever its first failing line does
        torch.set_rng_state(random_numbers)  # it may have initialised its first layers
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{name!r} can't be built with {model_args or 'these arguments'}: {reason}") from error


def resolve_name(name: str) -> str:
    """Return the Hub id or folder that `name` stands for; a timm name without tag gets timm's default tag.

    Examples:
        >>> resolve_name("timm/resnet18")
        'timm/resnet18.a1_in1k'
    """
    if os.path.isdir(name) or not name.startswith(TIMM_PREFIX):
        if not os.path.isdir(name) and "/" not in name:
            if _timm().is_model(name):
                raise InputError(f"{name!r} is a timm model: write 'timm/{name}'.")
        return name
    timm = _timm()
    architecture = name.removeprefix(TIMM_PREFIX)
    base = architecture.split(".")[0]
    if not timm.is_model(base):
        raise InputError(f"timm has no model {base!r}.{suggest(base, timm.list_models())}")
    try:
        pretrained_cfg = timm.models.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{base}.*")) or "no tag"
        raise InputError(f"timm has no weights {architecture!r}; accepted: {base}, {tags}.") from error
    if pretrained_cfg is not None and pretrained_cfg.hf_hub_id:
        # timm writes "timm/" for "the repository of my own name".
        hub_id = pretrained_cfg.hf_hub_id
        return hub_id + pretrained_cfg.architecture + f".{pretrained_cfg.tag}" if hub_id == TIMM_PREFIX else hub_id
    return name


def _timm() -> types.ModuleType:
    """Return timm, with the paper's networks in its registry."""
    import timm

    from . import paper_networks  # noqa: F401

    return timm


def _set_num_labels(config: PreTrainedConfig, num_labels: int) -> None:
    """Give `config` classes of no particular name, unless it has as many already."""
    if config.num_labels != num_labels:
        config.num_labels = num_labels


def _unknown(name: str, reason: str) -> str:
    timm = _timm()
    return f"Model {name!r} can't be found: {reason}" + suggest(
        name if name.startswith(TIMM_PREFIX) else TIMM_PREFIX + name, [TIMM_PREFIX + n for n in timm.list_models()]
    )


def num_classes(model: nn.Module) -> int | None:
    """Return the number of classes that `model` states (transformers' or timm's way), or `None`."""
    if isinstance(model, PreTrainedModel):
        return model.config.num_labels
    stated = getattr(model, "num_classes", None)
    return stated if isinstance(stated, int) else None
