"""What a trainer's evaluations found, kept apart for each set of images: numbers of two sets are never compared."""

from dataclasses import dataclass, field
from typing import Any


Row = dict[str, Any]


@dataclass
class ImageSet:
    """One set of images, and what was measured on it.

    Args:
        images (`Any`): The dataset.
        name (`str`): What it is called, such as `"eval"` or `"test"`.
        rows (`dict[str, Row]`): `teacher`, `calibrated` and `reconstructed` (what the student was before its first
            step) and `student` (what it is) → metrics.
        by_step (`dict[int, Row]`): Step of the training → the student's metrics there.
    """

    images: Any
    name: str
    rows: dict[str, Row] = field(default_factory=dict)
    by_step: dict[int, Row] = field(default_factory=dict)

    def add(
        self,
        means: Row,
        teacher_accuracy: float | None,
        where: Row,
        measured_as: str,
        stage: str,
        step: int | None,
        in_training: bool,
    ) -> None:
        """Note what an evaluation found.

        Args:
            means (`Row`): Of the student: `kl`, `agreement` and, where there were labels, `accuracy`.
            teacher_accuracy (`float`, *optional*): Of its teacher.
            where (`Row`): The set's name and its number of images.
            measured_as (`str`): `calibrated`, `reconstructed` or `student`.
            stage (`str`): What the student is: `calibrated`, `reconstructed` or `trained`.
            step (`int`, *optional*): Of the training that the student is of.
            in_training (`bool`): Whether it will have further steps, and may come back to this one.
        """
        self.rows["teacher"] = {"accuracy": teacher_accuracy, "agreement": 1.0, "kl": 0.0, **where}
        row = {"accuracy": means.get("accuracy"), "agreement": means["agreement"], "kl": means["kl"], **where}
        self.rows[measured_as] = row = {**row, "stage": stage, "step": step}
        if in_training:
            self.by_step[step] = row
        elif measured_as != "student":  # which it may stay, without a training
            self.rows["student"] = {**row, "step": None}


class Measurements:
    """The sets of images that were evaluated; the last one is the one that a card shows."""

    def __init__(self) -> None:
        self._sets: list[ImageSet] = []

    @property
    def last(self) -> ImageSet | None:
        """The set that was evaluated last."""
        return self._sets[-1] if self._sets else None

    def on(self, images: Any, name: str) -> ImageSet:
        """Return what was measured on `images`, which become the last set."""
        found = next((each for each in self._sets if _same(each.images, images)), None)
        if found is None:
            found = ImageSet(images, name)
        else:
            self._sets.remove(found)
            found.name = name
        self._sets.append(found)
        return found

    def begin_training(self, stage: str) -> None:
        """What was measured of the student so far was measured before its first step: as what it is at this stage."""
        for each in self._sets:
            each.by_step.clear()
            if (row := each.rows.pop("student", None)) is not None:
                each.rows[stage] = {**row, "stage": stage}

    def keep_stage(self, stage: str, step: int | None = None) -> None:
        """The student is again, or stays, what it was at a stage before its first step.

        Args:
            stage (`str`): `calibrated` or `reconstructed`.
            step (`int`, *optional*): 0 where a training was tried.
        """
        for each in self._sets:
            self._keep(each, each.rows.get(stage), step)

    def keep_step(self, step: int) -> None:
        """The student is again what it was after this step of the training."""
        for each in self._sets:
            self._keep(each, each.by_step.get(step), step)

    def _keep(self, each: ImageSet, row: Row | None, step: int | None) -> None:
        each.rows.pop("student", None)
        if row is not None:
            each.rows["student"] = {**row, "step": step}


def _same(one: Any, other: Any) -> bool:
    """Tell whether two datasets are the same images: one object, or two with one fingerprint (`datasets.Dataset`)."""
    fingerprint = getattr(one, "_fingerprint", None)
    return one is other or (fingerprint is not None and fingerprint == getattr(other, "_fingerprint", None))
