"""What leans on private or version-dependent parts of transformers, accelerate and torch, each with its reason.

Tried with transformers 5.17 to 5.24, accelerate 1.10 to 1.15 and torch 2.9 to 2.14. Private methods of `Trainer` that
`SQAKDTrainer` overrides, since it has no public ones in their place: `_get_dataloader` (images as they are trained
on), `_hp_search_setup` (called once at the beginning of every training, when the student is there), `_save`,
`_save_checkpoint` and `_push_from_checkpoint` (codes instead of latents; no pickle that holds a token).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


# --- accelerate ---


def forget_preparation(model: nn.Module) -> None:
    """Let accelerate prepare `model` for training, whatever it was prepared for before.

    It marks a model that it prepared for evaluation, copies of it included, and would leave a marked one as it is: not
    wrapped in DDP, so that each process trains a student of its own. What was prepared for half precision also keeps
    an autocast around its forward, inside of any other.
    """
    state = vars(model)
    if state.pop("_is_accelerate_prepared", False) and "_original_forward" in state:
        model.forward = state.pop("_original_forward")


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Context in which `model` computes without the autocast that accelerate keeps around its forward."""
    state = vars(model)
    prepared = state.get("forward") if "_original_forward" in state else None
    if prepared is not None:
        model.forward = state["_original_forward"]
    try:
        yield
    finally:
        if prepared is not None:
            model.forward = prepared


def compile_options(accelerator: Any) -> dict[str, Any] | None:
    """Return how accelerate compiles the model that it prepares, or `None` if it does not."""
    from accelerate.utils import DynamoBackend

    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    return {key: value for key, value in plugin.to_kwargs().items() if key != "use_regional_compilation"}


def keep_parameters_float32(accelerator: Any) -> None:
    """Let FSDP2 cast no parameter: its own policy would cast ranges too, and autocast casts what is multiplied."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether processes hold parts of the parameters of `model` (FSDP2)."""
    from torch.distributed.tensor import DTensor  # whose import takes a third of a second

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


# --- transformers: Trainer ---


def checkpoint_folder(trainer: Any, trial: Any) -> str:
    """Return the folder of a checkpoint at this step; Trainer names it while it saves."""
    return os.path.join(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")


def add_candidate(trainer: Any, trial: Any) -> None:
    """Evaluate and save the model before its first step as Trainer does after an epoch: it may be the best one."""
    metrics = trainer._evaluate(trial, None, skip_scheduler=True)
    trainer._determine_best_metric(metrics, trial)
    # Trainer knows the folder of a best step from 1 on.
    trainer.state.best_model_checkpoint = checkpoint_folder(trainer, trial)
    trainer._save_checkpoint(trainer.model, trial)
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


# --- transformers: loading and saving ---


def _nothing() -> None:
    """Stand for a method that has nothing to do; a function of a module, so that models can be pickled."""


def _yes() -> bool:
    return True


def put_off_initialisation(model: Any) -> None:
    """Keep `from_pretrained` from initialising what is missing: by the shapes and dtypes of codes, as it would be."""
    model.initialize_weights = _nothing


def initialise_now(model: Any) -> None:
    """Initialise what was missing, which [`put_off_initialisation`] put off."""
    del model.initialize_weights
    model.initialize_weights()


def look_for_shared_modules(model: Any) -> None:
    """Keep `from_pretrained` from initialising anew what it has loaded under another name.

    It looks for modules in several places only in models that are not its own.
    """
    model.is_custom_code = _yes


def expect_missing(model: Any, patterns: list[str]) -> None:
    """Let `from_pretrained` not report tensors whose names match as missing."""
    model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or []), *patterns]


def save_under_own_names(model: Any) -> None:
    """Let `save_pretrained` write the names in memory, by which training checkpoints are resumed.

    It would rename them to those of a layout from before (transformers #43701).
    """
    model._weight_conversions = []


def was_loaded(tensor: torch.Tensor) -> bool:
    """Tell whether `from_pretrained` took this tensor from a file; what is missing is uninitialised memory."""
    return getattr(tensor, "_is_hf_initialized", False)


def mark_loaded(tensor: torch.Tensor) -> None:
    """Let transformers take this tensor for one that came from a file."""
    tensor._is_hf_initialized = True
