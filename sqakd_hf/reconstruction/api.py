"""What callers use: `calibrate_model` with a teacher, and `reconstruct_model`."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .._validation import check_integer
from ..conversion import calibration
from ..conversion.rollback import unchanged_on_error
from ..conversion.student import (
    device_of,
    is_calibrated,
    parameter_shapes,
    quantized_layers,
    quantizers,
    record_signedness,
    require_planned_layers,
)
from ..conversion.trace import evaluating
from ..errors import InputError
from ..layers.quantized_layer import QuantizedLayer
from . import processes
from .calibration import STATISTICS_IMAGES, calibrate_unit
from .cost import cost_of
from .inputs import Store
from .state import Progress, UnitResult, digest_of
from .training import reconstruct_units
from .units import Unit, find_units, require_units
from .walk import Images, walk


logger = logging.getLogger(__name__)

# Ranges and statistics of less are those of these images.
FEWEST_IMAGES = 32

Batches = Iterable[torch.Tensor | Mapping[str, Any]]


@torch.no_grad()
def calibrate_model(
    model: nn.Module,
    batches: Batches,
    *,
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    reestimate_batch_norm: bool = False,
    memory_budget: int | None = None,
    disable_progress: bool = False,
) -> None:
    """Set all ranges of a quantized `model` from data, in place; with its teacher, correct what quantization shifted.

    Weights: each quantizer's `init_range`. Activations: layer by layer in the order of execution, each on inputs that
    passed the quantized layers before it; an input that is never negative gets unsigned codes.

    Without a teacher, ranges are averaged over the batches. BatchNorm: with codes of up to 4 bits anywhere, it
    normalises by the batch while ranges are set, as it will in training; quantization changes activations too much for
    the float network's statistics. With more bits those hold and are used. Running statistics stay those of the float
    network, which is what "calibrated only" usually means; training updates them. `reestimate_batch_norm=True`
    replaces them, in a second pass, by the average over the batches: right where these are the images that the network
    was trained on.

    With a teacher, the float network that the student was made of, unit by unit: ranges are set on the first images,
    BatchNorm's running statistics are the teacher's, changed by what differs between both models on the same images
    (see [`~sqakd_hf.reconstruction.batch_norm.match_statistics`]), and biases of layers without BatchNorm behind them
    are corrected by the difference of the means. That is for networks with trained weights and a few hundred
    photographs of any kind. A teacher of another architecture, or several, can't be compared: calibration is as
    without, and says so.

    All else (dropout, stochastic depth) is in eval mode. The model's own train/eval mode is restored.

    Args:
        model (`nn.Module`): A model after [`quantize_model`].
        batches (`Iterable`): Images as tensors `(B, C, H, W)`, or dicts with `pixel_values` (and `pixel_mask`, where
            the model takes one); without labels. A few hundred images are enough: with a teacher, the first 256 are
            used, and fewer than 32 are poor. An iterator is kept in memory.
        teacher (`nn.Module`, *optional*): See above.
        reestimate_batch_norm (`bool`, *optional*, defaults to `False`): See above; not with a teacher.
        memory_budget (`int`, *optional*): Bytes for what units take and put out, with a teacher; beyond it lies in
            temporary files. Defaults to half of the memory that is free.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: No batch, a batch of one image where BatchNorm needs more, a layer whose input is not finite, or
            a planned layer that the data never reached. The message names the layers.

    On any error the student is left as it was.
    """
    if teacher is not None and reestimate_batch_norm:
        raise InputError(
            "reestimate_batch_norm=True replaces the statistics that teacher= matches: pass one of the two."
        )
    if teacher is not None and (reason := _why_not_compared(model, teacher)) is not None:
        logger.warning("Calibrated without comparing student and teacher: %s.", reason)
        teacher = None
    if teacher is None:
        calibration.calibrate_model(
            model, batches, reestimate_batch_norm=reestimate_batch_norm, disable_progress=disable_progress
        )
        return
    if isinstance(batches, torch.Tensor):
        raise InputError(f"batches must be an iterable of image batches, got one tensor {tuple(batches.shape)}.")
    images = Images(batches, model, STATISTICS_IMAGES)
    if len(images) < FEWEST_IMAGES:
        logger.warning(
            "%d images are few: statistics and ranges will be those of these very images. Pass %d or more, better a "
            "few hundred; labels are not needed.",
            len(images),
            FEWEST_IMAGES,
        )
    with unchanged_on_error(model):
        _set_first_ranges(model, images)
        with evaluating(model), evaluating(teacher), Store(memory_budget) as store:
            units = _units(model, teacher, images)
            stages = walk(units, model, teacher, images, store)
            bar = tqdm(stages, "Calibrating", len(units), unit="unit", disable=disable_progress, leave=False)
            for stage in bar:
                calibrate_unit(stage.unit, model, teacher, stage.inputs, stage.teacher_inputs, device_of(model))
        record_signedness(model)


@dataclass(frozen=True)
class Reconstruction:
    """What [`reconstruct_model`] did, unit by unit. `print` it.

    Args:
        units (`tuple[UnitResult, ...]`): In the order of execution.
    """

    units: tuple[UnitResult, ...]

    def __iter__(self) -> Iterator[UnitResult]:
        return iter(self.units)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {"units": [vars(unit) for unit in self.units]}

    def __str__(self) -> str:
        width = max(len(unit.name) for unit in self.units)
        lines = [f"{'unit':{width}}  error before  calibrated   after"]
        for unit in self.units:
            errors = f"{unit.before:12.4f}  {unit.calibrated:10.4f}  {unit.after:6.4f}"
            lines.append(f"{unit.name:{width}}  {errors}")
        return "\n".join(lines)


@torch.no_grad()
def reconstruct_model(
    model: nn.Module,
    teacher: nn.Module,
    images: torch.Tensor | Batches,
    *,
    steps: int = 100,
    time_budget: float | None = None,
    batch_size: int = 16,
    units: Sequence[str] | None = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    memory_budget: int | None = None,
    disable_progress: bool = False,
) -> Reconstruction:
    """Let each block of a student learn to put out what the teacher's does, one after the other, in place.

    Without labels, and without a gradient through more than one block. Each unit (a stem, a residual or transformer
    block, a head) is calibrated as by [`calibrate_model`] with a teacher, then its weights, norms, biases and the
    ranges of its activations are trained on `mean squared error / variance`, the head on the KL divergence at
    temperature 1. A unit is left in the state of the least error, so that none gets worse. The ideas are those of
    [BRECQ](https://huggingface.co/papers/2102.05426) and [QDrop](https://huggingface.co/papers/2203.05740); weights
    are rounded straight through.

    In several processes (`torch.distributed`), each passes images of its own; gradients are averaged, and all end
    with the same student. Under `torch.autocast` units compute in its precision.

    The same arguments give the same student, to the last bit on one machine, with any `memory_budget` and however
    often it was interrupted. On any error, and where it is interrupted, the student is left as it was;
    `checkpoint_dir` keeps the finished units.

    Args:
        model (`nn.Module`): The student, after [`quantize_model`]; without ranges it is calibrated first.
        teacher (`nn.Module`): The float network that it was made of, or another with the same weights by name and
            shape.
        images (`torch.Tensor` or `Iterable`): As for [`calibrate_model`], or all in one tensor; several hundred, of
            any kind that the network knows.
        steps (`int`, *optional*, defaults to 100): Updates of each unit.
        time_budget (`float`, *optional*): Seconds; in the place of `steps`, as many updates as fit into this time on
            this machine, by timing a few of each unit. The number is logged, and kept in `checkpoint_dir`: an
            interrupted reconstruction goes on with it.
        batch_size (`int`, *optional*, defaults to 16): Images of each update.
        units (`list[str]`, *optional*): Patterns of modules that are blocks, see [`QuantizationConfig`]. By default
            they are found, see [`~sqakd_hf.reconstruction.units.find_units`].
        seed (`int`, *optional*, defaults to 0): Of everything random.
        checkpoint_dir (`str` or `Path`, *optional*): A folder for finished units: called again with the same
            arguments, it goes on behind the last of them.
        memory_budget (`int`, *optional*): Bytes for what units take and put out; beyond it lies in temporary files.
            Defaults to half of the memory that is free.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Returns:
        `Reconstruction`: Each unit's error before and after.

    Raises:
        `InputError`: No images or less than 32, a teacher without the student's layers, a pattern that matches
            nothing, nothing to reconstruct, no room for what units take, or a folder of another run.
    """
    check_integer(steps, "steps")
    check_integer(batch_size, "batch_size")
    if time_budget is not None and not 0 < time_budget < float("inf"):
        raise InputError(f"time_budget must be a positive number of seconds, got {time_budget!r}.")
    require_planned_layers(model)
    if not quantized_layers(model):
        raise InputError("The model has no quantized layer. Call quantize_model(model, config) first.")
    if (reason := _why_not_compared(model, teacher)) is not None:
        raise InputError(f"The student's units have nothing to learn from: {reason}.")
    images = Images(images, model)
    if checkpoint_dir is not None and processes.count() > 1:
        raise InputError("checkpoint_dir keeps the units of one process: leave it out where there are several.")
    if len(images) < FEWEST_IMAGES:
        raise InputError(
            f"{len(images)} images are too few: units would learn these by heart. Pass {FEWEST_IMAGES} or more; "
            "several hundred are good, and labels are not needed."
        )
    with unchanged_on_error(model), Store(memory_budget) as store:
        for layer in quantized_layers(model).values():
            layer.restore_latent()
        progress = None
        if checkpoint_dir is not None:
            progress = Progress(
                checkpoint_dir,
                {
                    "student": digest_of([*model.state_dict().values()]),
                    "teacher": digest_of([*teacher.state_dict().values()]),
                    "images": images.digest(),
                    "steps": steps if time_budget is None else None,
                    "time_budget": time_budget,
                    "batch_size": batch_size,
                    "units": None if units is None else list(units),
                    "seed": seed,
                },
            )
        if not is_calibrated(model):
            _set_first_ranges(model, images)
        with evaluating(model), evaluating(teacher):
            found = _units(model, teacher, images, units)
            # Updates wait for one another: all processes time them, or none.
            if time_budget is not None or (not disable_progress and processes.count() == 1):
                cost = cost_of(found, model, teacher, images, batch_size)
                if time_budget is not None:
                    steps = _agreed_steps(cost.steps(time_budget), progress, device_of(model))
                logger.info(
                    "%d updates of each of %d units: about %.0f min, and %.2f GB for what units take and put out.",
                    steps,
                    len(found),
                    max(cost.seconds(steps) / 60, 1),
                    cost.memory / 1e9,
                )
            with tqdm(total=len(found), desc="Reconstructing", unit="unit", disable=disable_progress) as bar:

                def show(result: UnitResult) -> None:
                    bar.set_postfix_str(f"{result.name}: error {result.before:.3g} -> {result.after:.3g}")
                    bar.update()

                results = reconstruct_units(
                    found,
                    model,
                    teacher,
                    images,
                    store,
                    steps=steps,
                    batch_size=batch_size,
                    seed=seed,
                    progress=progress,
                    on_unit=show,
                )
        record_signedness(model)
    return Reconstruction(tuple(results))


def _agreed_steps(steps: int, progress: Progress | None, device: torch.device) -> int:
    """Return as many updates as the interrupted run had, or else as the first process found."""
    if progress is not None and progress.steps is not None:
        return progress.steps
    number = torch.tensor(steps, device=device)
    processes.take_from_first([number])
    if progress is not None:
        progress.steps = int(number)
    return int(number)


def _set_first_ranges(model: nn.Module, images: Images) -> None:
    """Set all ranges from a few images, and find what can't be calibrated: what units need from one another."""
    calibration.calibrate_model(model, [images.first(min(len(images), FEWEST_IMAGES))], disable_progress=True)
    processes.take_from_first(tensor for q in quantizers(model) for tensor in q.state_dict().values())
    for quantizer in quantizers(model):
        quantizer.refresh()


def _units(model: nn.Module, teacher: nn.Module, images: Images, patterns: Sequence[str] | None = None) -> list[Unit]:
    """Return the units of student and teacher, and say which layers are in none."""
    layers = list(quantized_layers(model))
    units = find_units(teacher, layers, images.first(), patterns)
    require_units(units, layers, type(model).__name__)
    covered = {layer for unit in units for layer in unit.layers}
    if left := [layer for layer in layers if layer not in covered]:
        logger.warning(
            "In no unit, because the module around it runs several times or returns no tensor, so only its range is "
            "set: %s.",
            ", ".join(left),
        )
    return units


def _why_not_compared(student: nn.Module, teacher: Any) -> str | None:
    """Return why the units of student and teacher can't be compared, `None` where they can."""
    if not isinstance(teacher, nn.Module):
        return "it takes one teacher, the float network that the student was made of"
    if any(isinstance(module, QuantizedLayer) for module in teacher.modules()):
        return "the teacher is quantized itself"
    own, theirs = parameter_shapes(student), parameter_shapes(teacher)
    if own != theirs:
        names = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
        return (
            f"the teacher has other parameters than the student ({', '.join(names[:3])}"
            f"{', ...' * (len(names) > 3)}); it has to be the float network that the student was made of"
        )
    return None
