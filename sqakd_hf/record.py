"""What a training measured, kept in a JSON file beside the student: what its report is drawn from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers.utils import cached_file

from .errors import InputError


RECORD_FILE = "training_record.json"


@dataclass(frozen=True)
class TrainingRecord:
    """What a training measured.

    Args:
        results (`dict`): `teacher`, `calibrated` and `student` → `accuracy`, `agreement` (shares in [0, 1]), `kl` and
            `images`; only what was measured, `None` for an accuracy without labels.
        log_history (`list[dict]`): What Trainer logged, in order.
        layer_sqnr (`dict`): `calibrated` and `student` → layer → dB, see [`~sqakd_hf.layer_error.layer_sqnr`].
    """

    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    layer_sqnr: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the record into the student's folder."""
        with open(os.path.join(folder, RECORD_FILE), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)

    @classmethod
    def load(cls, name: str) -> "TrainingRecord":
        """Return the record of a student's folder or Hub id; an empty one where there is none.

        Raises:
            `InputError`: A file that is no record.
        """
        path = cached_file(
            name,
            RECORD_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return cls()
        try:
            with open(path, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path!r} is no record of a training: {error}. Remove it to go on without it."
            ) from error
