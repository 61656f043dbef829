"""What a training minimises for comparison with SQAKD: a weighted sum of its KL divergence, labels and features."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .._text import quote, suggest
from ..distillation.extensions import Extension, register_extension
from ..errors import InputError
from ..outputs.forward import Prediction
from . import feature_losses as losses
from .features import FeatureTap, feature_maps, find_lattice_layer, find_stages


if TYPE_CHECKING:
    from ..distillation.trainer import SQAKDTrainer
    from ..distillation.training_args import SQAKDTrainingArguments


class Term(NamedTuple):
    """One term of the objective."""

    weight: float
    name: str


# Which features each term compares: the maps of the stages behind the stem, one of them, or the last one pooled.
_OF_STAGES: dict[str, Callable[..., torch.Tensor]] = {
    "at": losses.attention_transfer_loss,
    "nst": losses.neuron_selectivity_loss,
    "fsp": losses.flow_loss,
}
_OF_THE_MIDDLE = {"fitnet": losses.hint_loss}
_OF_THE_LAST = {"sp": losses.similarity_preserving_loss}
_OF_POOLED = {"rkd": losses.relational_loss, "cc": losses.correlation_loss, "pkt": losses.probabilistic_loss}
LATTICE = "squat"
FEATURE_TERMS = (*_OF_STAGES, *_OF_THE_MIDDLE, *_OF_THE_LAST, *_OF_POOLED, LATTICE)
TERMS = ("kl", "ce", *FEATURE_TERMS)


def parse_objective(text: str) -> tuple[Term, ...]:
    """Return the terms of an objective such as `"kl"`, `"ce + kl"` or `"ce + 1000 * at"`.

    Raises:
        `InputError`: An unknown or a repeated term, a weight that is not a positive number.

    Examples:
        >>> parse_objective("ce + 0.5*kl")
        (Term(weight=1.0, name='ce'), Term(weight=0.5, name='kl'))
    """
    terms = []
    for part in text.split("+") if isinstance(text, str) else [""]:
        weight, _, name = part.rpartition("*")
        name = name.strip()
        try:
            value = float(weight) if weight.strip() else 1.0
        except ValueError:
            value = math.nan
        if name not in TERMS or not 0 < value < math.inf:
            raise InputError(
                f"objective must be a sum such as 'kl' or 'ce + 0.5*kl', of {quote(TERMS)} with positive weights, got "
                f"{text!r}.{suggest(name, TERMS)}"
            )
        terms.append(Term(value, name))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise InputError(f"objective names a term twice: {text!r}. Add up their weights.")
    return tuple(terms)


def feature_terms(terms: Sequence[Term]) -> list[str]:
    """Return the names of the terms that compare features.

    Examples:
        >>> feature_terms(parse_objective("kl + 1000*at"))
        ['at']
    """
    return [term.name for term in terms if term.name in FEATURE_TERMS]


def reads_labels(terms: Sequence[Term]) -> bool:
    """Tell whether one of the terms needs labels."""
    return any(term.name == "ce" for term in terms)


def label_loss(logits: torch.Tensor, labels: torch.Tensor | None, smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy of `logits` `(B, K)` and the classes `labels` `(B,)`, in float32.

    `smoothing` is the share of the probability that is spread over all classes. Images whose label is negative have
    none and are left out; without any label the loss is 0.

    Raises:
        `InputError`: No labels, or not one an image.
    """
    if labels is None:
        raise InputError(
            "The objective has the term 'ce', but the images bring no labels. Leave it out: objective='kl'; or, where "
            "only some have one, label the others -100."
        )
    if logits.dim() != 2 or labels.dim() != 1:
        raise InputError(
            f"The term 'ce' needs logits (B, K) and labels (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    given = labels >= 0
    total = F.cross_entropy(
        logits.float(), labels.where(given, -100), ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )
    return total / given.sum().clamp(min=1)


class Features:
    """The feature terms of an objective, for a student and a teacher of one architecture.

    Args:
        terms (`Sequence[str]`): Names among `FEATURE_TERMS`.
        student, teacher (`nn.Module`): They get hooks that cost nothing unless they listen.
        inputs (`dict`): A batch, by which the stages are found.
        layer (`str`, *optional*): The layer of the term `squat`, see [`find_lattice_layer`].
    """

    def __init__(
        self,
        terms: Sequence[str],
        student: nn.Module,
        teacher: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        layer: str | None = None,
    ):
        self._taps: list[FeatureTap] = []
        self._quantizer = None
        self.stages: list[str] = []
        if set(terms) - {LATTICE}:
            self.stages = find_stages(teacher, inputs)
            if "fsp" in terms and len(self.stages) < 3:
                raise InputError(f"The term 'fsp' compares stages behind the stem, but the model has {self.stages}.")
            self._student_maps = self._tap({name: _same(student, name) for name in self.stages})
            self._teacher_maps = self._tap({name: teacher.get_submodule(name) for name in self.stages})
        if LATTICE in terms:
            layer = find_lattice_layer(student, layer)
            self._quantizer = student.get_submodule(layer).input_quantizer
            self._student_values = self._tap({layer: self._quantizer})
            self._teacher_values = self._tap({layer: _same(teacher, layer)}, inputs=True)

    def _tap(self, modules: Mapping[str, nn.Module], **options: bool) -> FeatureTap:
        self._taps.append(FeatureTap(modules, **options))
        return self._taps[-1]

    def remove(self) -> None:
        """Take the hooks off student and teacher."""
        for tap in self._taps:
            tap.remove()

    def listening(self) -> list:
        """Return contexts to enter around the forward passes and [`loss`]."""
        return [tap.listening() for tap in self._taps]

    def loss(self, name: str) -> torch.Tensor:
        """Return the term of that name, of the features that the last forward passes left."""
        if name == LATTICE:
            (values,) = self._student_values.features.values()
            with torch.no_grad():
                (other,) = self._teacher_values.features.values()
                target = self._quantizer(other)
            lower, upper = self._quantizer.grid()[:2]
            return losses.lattice_loss(values, target, lower, upper)
        missing = [stage for stage in self.stages if stage not in self._student_maps.features]
        if missing:
            raise InputError(
                f"The student ran without calling {missing[0]!r}, whose features are compared: gradient checkpointing "
                "goes around it. Turn that off, or use the objective 'kl'."
            )
        student, teacher = (
            [feature_maps(tap.features[stage]) for stage in self.stages]
            for tap in (self._student_maps, self._teacher_maps)
        )
        # Behind the stem, where there is anything behind it.
        behind = slice(min(1, len(self.stages) - 1), None)
        if name in _OF_STAGES:
            return _OF_STAGES[name](student[behind], teacher[behind])
        if name in _OF_THE_MIDDLE:
            middle = len(self.stages) // 2
            return _OF_THE_MIDDLE[name](student[middle], teacher[middle])
        if name in _OF_THE_LAST:
            return _OF_THE_LAST[name](student[-1], teacher[-1])
        return _OF_POOLED[name](student[-1].float().mean((2, 3)), teacher[-1].float().mean((2, 3)))


def _same(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"Feature terms compare student and teacher module by module, but one of them has no {name!r}. Use a "
            "teacher of the student's architecture, or the objective 'kl'."
        ) from None


@register_extension
class Objective(Extension):
    """`objective` other than `"kl"`: a weighted sum of the KL divergence, of labels and of features.

    Its features are found on a few training images, before the first batch.
    """

    option = "objective"

    def __init__(self, trainer: "SQAKDTrainer") -> None:
        super().__init__(trainer)
        self.terms = parse_objective(trainer.args.objective)
        self._names = feature_terms(self.terms)
        self._features: Features | None = None

    def __str__(self) -> str:
        return f"The objective {self.trainer.args.objective!r}"

    @classmethod
    def is_asked_for(cls, args: "SQAKDTrainingArguments") -> bool:
        return parse_objective(args.objective) != (Term(1.0, "kl"),)

    @classmethod
    def check_arguments(cls, args: "SQAKDTrainingArguments") -> None:
        terms = parse_objective(args.objective)
        features = feature_terms(terms)
        for option in ("cache_teacher_logits", "torch_compile", "gradient_checkpointing"):
            if features and getattr(args, option):
                raise InputError(f"The objective {args.objective!r} looks into the models: it can't go with {option}.")
        if args.label_smoothing_factor and not reads_labels(terms):
            raise InputError(f"label_smoothing_factor belongs to the term 'ce', which {args.objective!r} has not.")
        if args.feature_layer is not None and LATTICE not in features:
            raise InputError(f"feature_layer belongs to the term 'squat', which {args.objective!r} has not.")

    @property
    def needs_whole_weights(self) -> bool:
        return bool(self._names)

    @property
    def reads_labels(self) -> bool:
        return reads_labels(self.terms)

    @property
    def features(self) -> Features:
        """The features of student and teacher that its terms compare."""
        if self._features is None:
            batch = next(self.trainer.sample_images(2))
            model, teacher = self.trainer.model, self.trainer.teacher.models[0]
            self._features = Features(self._names, model, teacher, batch, self.trainer.args.feature_layer)
        return self._features

    def check(self) -> None:
        if self._names and len(self.trainer.teacher.models) > 1:
            raise InputError(f"{self} compares features: pass one teacher, not several.")

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        for tap in self.features.listening() if self._names else ():
            stack.enter_context(tap)
        return stack

    def loss(self, loss: torch.Tensor, student: Prediction, inputs: Mapping[str, Any]) -> torch.Tensor:
        total = 0.0
        for weight, name in self.terms:
            if name == "kl":
                value = loss
            elif name == "ce":
                value = label_loss(student.logits, inputs.get("labels"), self.trainer.args.label_smoothing_factor)
            else:
                value = self.features.loss(name)
            total = total + (value if weight == 1 else weight * value)
        return total

    def close(self) -> None:
        if self._features is not None:
            self._features.remove()
            self._features = None
