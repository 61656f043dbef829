"""`sensitivity`: what the network loses where one place alone is quantized, at each width. No labels, no training."""

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .._text import text_table
from .._validation import check_bits
from ..conversion.calibration import RangeAverage
from ..conversion.config import QuantizationConfig
from ..conversion.convert import apply_plan
from ..conversion.plan import LayerPlan, QuantizationPlan
from ..conversion.planner import is_depthwise, plan_quantization
from ..conversion.student import device_of
from ..conversion.trace import evaluating
from ..distillation.evaluation import agreement
from ..distillation.losses import distillation_loss
from ..errors import InputError
from ..outputs.forward import Prediction, predict
from ..quantization.quantizers import FakeQuantizer
from ..reconstruction.calibration import least_error
from ..reconstruction.state import digest_of, write_whole
from ..reconstruction.units import Unit, find_units, is_inside
from ..reconstruction.walk import Images
from .prefix import Prefix


WIDTHS = (2, 3, 4, 6, 8)
WEIGHT, INPUT, ATTENTION, OUTPUT = "weight", "input", "attention", "output"
IMPORTANT = 0.8  # a share of the sum: what makes it up is worth more bits


@dataclass(frozen=True)
class SiteError:
    """What one place costs at one width, the rest in float.

    Args:
        name (`str`): The module.
        kind (`str`): `"weight"` or `"input"` of a layer, the operands of `"attention"`, or the `"output"` that is
            added or pooled.
        bits (`int`): The width.
        kl, kl_error (`float`): KL divergence from the float model at temperature 1, mean over images, and the
            standard error of that mean.
        agreement, agreement_error (`float`): Share of images with the same class, and its standard error.
    """

    name: str
    kind: str
    bits: int
    kl: float
    kl_error: float
    agreement: float
    agreement_error: float


@dataclass(frozen=True)
class SensitivityReport:
    """What [`sensitivity`] found; `print` it.

    Args:
        errors (`tuple[SiteError, ...]`): All places, in the model's order, at all widths.
        images (`int`): How many images it was measured on.
        weight_bits, activation_bits (`int`): Those that were asked for: by them the table is sorted.
    """

    errors: tuple[SiteError, ...]
    images: int
    weight_bits: int
    activation_bits: int | None

    def ranked(self, bits: int | None = None) -> list[SiteError]:
        """Return one line for each place, at its own width or at `bits` everywhere; what costs most comes first."""
        widths = sorted({error.bits for error in self.errors})

        def wanted(error: SiteError) -> int:
            asked = bits or (self.weight_bits if error.kind == WEIGHT else self.activation_bits)
            return min(widths, key=lambda width: (abs(width - (asked or width)), width))

        return sorted((error for error in self.errors if error.bits == wanted(error)), key=lambda error: -error.kl)

    def keep_high(self, bits: int | None = None) -> list[SiteError]:
        """Return the fewest places that make up `IMPORTANT` of the sum of all, as [`ranked`]."""
        ranked = self.ranked(bits)
        total, so_far, found = sum(error.kl for error in ranked), 0.0, []
        for error in ranked:
            if so_far >= IMPORTANT * total:
                break
            so_far += error.kl
            found.append(error)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        widths = sorted({error.bits for error in self.errors})
        by_site: dict[tuple[str, str], dict[int, SiteError]] = {}
        for error in self.errors:
            by_site.setdefault((error.name, error.kind), {})[error.bits] = error
        rows = [("KL where this alone is quantized", "", *(f"{bits} bits" for bits in widths))]
        ranked = self.ranked()
        for error in ranked:
            each = by_site[error.name, error.kind]
            rows.append((error.name, error.kind, *(f"{each[bits].kl:.5f}" for bits in widths)))
        high = self.keep_high()
        lines = text_table(rows)
        lines.append(
            f"{len(high)} of {len(ranked)} places make up {IMPORTANT:.0%} of the sum at the bits that were asked for: "
            f"keep these high. {self.images} images; standard errors are in the JSON."
        )
        return "\n".join(lines)


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor | Mapping[str, Any]],
    config: QuantizationConfig | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    output_field: str | None = None,
    progress_file: str | os.PathLike | None = None,
    disable_progress: bool = False,
) -> SensitivityReport:
    """Quantize one place of a float model at a time and measure what that costs: which to keep high, without labels.

    Places are the weight and the input of each layer, attention's operands, and what is added or pooled, as `config`
    quantizes them. Ranges are those of least squared error on the first 32 images. Only forward passes; the network
    before a place is not computed again.

    Args:
        model (`nn.Module`): A float model with class logits; it is left as it was.
        images (`torch.Tensor` or `Iterable`): Images `(B, C, H, W)` as the model takes them, or batches of them; 64 to
            256 are a good number.
        config (`QuantizationConfig`, *optional*): What is quantized and by which quantizers. Defaults to LSQ with
            the activations of LSQ+, at 8 bits.
        widths (list of `int`, *optional*): The widths that are tried, of 1 to 8.
        output_field (`str`, *optional*): Which output holds the class logits, for models with several heads.
        progress_file (`str`, *optional*): A JSON file that is written after each place; with the same model, images
            and settings a later call goes on from it.
        disable_progress (`bool`, *optional*, defaults to `False`): Show no progress bar.

    Raises:
        `InputError`: No images, a model that is quantized already or has no class logits, a width out of range, a
            file of another run.
    """
    if config is None:
        config = QuantizationConfig("lsq", weight_bits=8, activation_bits=8, activation_quantizer="lsq+")
    widths = list(dict.fromkeys(widths))
    if not widths:
        raise InputError("widths must hold at least one number of bits, got none.")
    for bits in widths:
        check_bits(bits, "widths")
    images = Images(images, model)
    with evaluating(model):
        plan = plan_quantization(model, config, images.first(1)["pixel_values"])
        expected = [predict(model, chunk, output_field) for chunk in images.chunks()]
        settings = {
            "model": digest_of([tensor for _, tensor in sorted(model.state_dict().items())]),
            "images": images.digest(),
            "config": {key: value for key, value in config.to_dict().items() if key != "stored"},
            "widths": widths,
            "output_field": output_field,
        }
        done = _Done(progress_file, settings)
        if device_of(model).type == "cpu" and any(map(is_depthwise, model.modules())):
            model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # in which these are faster
        units = find_units(model, [line.name for line in plan.quantized], images.first())
        sites = _by_unit(plan, units)
        count = sum(len(each) for each in sites.values())
        with tqdm(total=count, desc="Sensitivity", unit="place", disable=disable_progress) as bar:
            for number, lines in sites.items():
                left = [line for line in lines if line not in done]
                bar.update(len(lines) - len(left))
                prefix = Prefix(units[: number or 0] if left else [], model, images)
                for kind, line in left:
                    students = [_with_one_site(model, kind, line, bits) for bits in widths]
                    found = [_predictions(student, images, prefix, output_field) for student in students]
                    errors = [_compare(*each, expected, kind, line) for each in zip(widths, found, strict=True)]
                    done.add(kind, line, errors)
                    bar.update()
    order = [(kind, line) for lines in sites.values() for kind, line in lines]
    found = tuple(error for site in order for error in done[site])
    return SensitivityReport(found, len(images), config.weight_bits, config.activation_bits)


Site = tuple[str, LayerPlan]


class _Done:
    """The places that were measured, in a file if there is one."""

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any]):
        self._path = None if path is None else Path(path)
        self._settings = json.loads(json.dumps(settings))
        self._errors: dict[str, list[dict[str, Any]]] = {}
        if self._path is None:
            return
        if not self._path.parent.is_dir():
            raise InputError(f"The folder {str(self._path.parent)!r} does not exist: make it, or choose another path.")
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text(encoding="utf-8"))
                before, self._errors = stored["settings"], stored["errors"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{str(self._path)!r} is no file of a sensitivity: choose another path.") from error
            differing = sorted(key for key in self._settings if before.get(key) != self._settings[key])
            if differing:
                raise InputError(
                    f"{str(self._path)!r} is of another run, with other {', '.join(differing)}. Choose another path, "
                    "or delete it to begin anew."
                )

    @staticmethod
    def _key(site: Site) -> str:
        return f"{site[0]} of {site[1].name}"

    def __contains__(self, site: Site) -> bool:
        return self._key(site) in self._errors

    def __getitem__(self, site: Site) -> list[SiteError]:
        return [SiteError(**error) for error in self._errors[self._key(site)]]

    def add(self, kind: str, line: LayerPlan, errors: Sequence[SiteError]) -> None:
        self._errors[self._key((kind, line))] = [asdict(error) for error in errors]
        if self._path is not None:
            write_whole(self._path, json.dumps({"settings": self._settings, "errors": self._errors}).encode())


def _by_unit(plan: QuantizationPlan, units: Sequence[Unit]) -> dict[int | None, list[Site]]:
    """Return the places by the number of the unit that they are in, in order; `None`: in no unit."""
    sites: list[Site] = []
    for line in plan.quantized:
        sites += [(WEIGHT, line)] + [(INPUT, line)] * (line.activation_bits is not None)
    sites += [(ATTENTION, line) for line in plan.attention if line.skipped is None]
    sites += [(OUTPUT, line) for line in plan.residuals if line.skipped is None]
    found: dict[int | None, list[Site]] = {}
    for site in sites:
        found.setdefault(_unit_of(site[1].name, units), []).append(site)
    return dict(sorted(found.items(), key=lambda item: math.inf if item[0] is None else item[0]))


def _unit_of(name: str, units: Sequence[Unit]) -> int | None:
    inside = (number for number, unit in enumerate(units) if any(is_inside(name, module) for module in unit.modules))
    return next(inside, None)


def _predictions(student: nn.Module, images: Images, prefix: Prefix, field: str | None) -> list[Prediction]:
    """Return what a student predicts, chunk by chunk; the first chunk sets the ranges of its activations."""
    predictions = []
    with _ranges_from_what_comes(student):
        for number, chunk in enumerate(images.chunks()):
            with prefix.skipped(student, number):
                predictions.append(predict(student, chunk, field))
    return predictions


def _compare(
    bits: int, found: Sequence[Prediction], expected: Sequence[Prediction], kind: str, line: LayerPlan
) -> SiteError:
    """Return what one place costs at one width."""
    pairs = list(zip(found, expected, strict=True))
    kl = torch.cat([distillation_loss(one.logits, other.logits, 1.0, "none") for one, other in pairs]).double()
    same = torch.cat([agreement(one, other, None) for one, other in pairs]).double()
    return SiteError(line.name, kind, bits, *_mean_and_error(kl), *_mean_and_error(same))


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _with_one_site(model: nn.Module, kind: str, line: LayerPlan, bits: int) -> nn.Module:
    """Return a copy of the model, which shares its tensors, with one place quantized."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    student = copy.deepcopy(model, tensors)
    if kind in (WEIGHT, INPUT):
        line = replace(line, weight_bits=bits, activation_bits=bits if kind == INPUT else None)
        apply_plan(student, QuantizationPlan((line,)))
        layer = student.get_submodule(line.name)
        weight = layer.float_weight()
        if kind == WEIGHT:
            with least_error(layer.weight_quantizer):
                layer.weight_quantizer.init_range(weight)
            weight = layer.weight_quantizer(weight)
        layer.shared_weight = weight.detach()  # computed once, or left as it is
    else:
        table = "attention" if kind == ATTENTION else "residuals"
        apply_plan(student, QuantizationPlan((), **{table: (replace(line, activation_bits=bits),)}))
    return student.eval()


@contextlib.contextmanager
def _ranges_from_what_comes(student: nn.Module) -> Iterator[None]:
    """Set the range of each activation quantizer from what comes first to it."""
    with contextlib.ExitStack() as stack:
        for name, module in student.named_modules():
            if isinstance(module, FakeQuantizer) and module.role == "activation":
                stack.enter_context(_RangeOfFirst(name, module))
        yield


class _RangeOfFirst(RangeAverage):
    """Set the range once, from the first chunk of images."""

    def observe(self, quantizer: FakeQuantizer, args: tuple[torch.Tensor]) -> None:
        if not self.averaged:
            with least_error(quantizer):
                super().observe(quantizer, args)
