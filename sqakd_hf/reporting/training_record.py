"""What a training measured, kept in a JSON file beside the student: what its report is drawn from."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import cached_file

from ..data.hub_access import hub_is_reachable
from ..errors import InputError


RECORD_FILE = "training_record.json"


@dataclass(frozen=True)
class TrainingRecord:
    """What a training measured.

    Args:
        results (`dict`): `teacher`, `calibrated`, `reconstructed` and `student` → `accuracy`, `agreement` (shares in
            [0, 1]), `kl` (at temperature 1) and `images`; only what was measured, `None` for an accuracy without
            labels.
        log_history (`list[dict]`): What Trainer logged, in order.
        layer_sqnr (`dict`): `calibrated`, `reconstructed` and `student` → layer → dB, see
            [`~sqakd_hf.distillation.layer_sqnr.layer_sqnr`].
    """

    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    layer_sqnr: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the record into the student's folder; what callbacks logged and is no number is left out.

        NaN and infinities are `null`, and `None` in a record that is loaded.
        """
        logs = [{key: float(value) for key, value in log.items() if _is_number(value)} for log in self.log_history]
        text = to_json({"results": self.results, "log_history": logs, "layer_sqnr": self.layer_sqnr}, indent=1)
        with open(os.path.join(folder, RECORD_FILE), "w", encoding="utf-8") as file:
            file.write(text)

    @classmethod
    def load(cls, name: str) -> "TrainingRecord":
        """Return the record of a student's folder or Hub id; an empty one where there is none.

        Fields that a later version wrote are left out.

        Raises:
            `InputError`: A file that is no record.
        """
        try:
            path = cached_file(name, RECORD_FILE, local_files_only=not (os.path.isdir(name) or hub_is_reachable()))
        except OSError:  # no such file, or no such repository
            return cls()
        try:
            with open(path, encoding="utf-8") as file:
                stated = json.load(file)
            return cls(
                {key: dict(row) for key, row in stated.get("results", {}).items()},
                [dict(log) for log in stated.get("log_history", [])],
                {key: dict(layers) for key, layers in stated.get("layer_sqnr", {}).items()},
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path!r} is no record of a training: {error}. Remove it to go on without.") from error


def to_json(value: Any, indent: int = 2) -> str:
    """Return JSON-ready data as JSON: numbers that are not finite are `null`, since JSON has no NaN."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0)
