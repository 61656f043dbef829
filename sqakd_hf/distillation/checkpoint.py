"""Training checkpoints on disk: which of them are complete."""

import json
import logging
import os
import re

from .._text import quote
from ..errors import InputError


logger = logging.getLogger(__name__)

# Trainer writes it last.
STATE_FILE = "trainer_state.json"


def is_complete(folder: str) -> bool:
    """Tell whether the process that wrote the checkpoint `folder` got to its end."""
    try:
        with open(os.path.join(folder, STATE_FILE), encoding="utf-8") as file:
            return "global_step" in json.load(file)
    except (OSError, ValueError):
        return False


def discard_state(folder: str) -> None:
    """Take from a checkpoint `folder` what marks it as complete, since it is about to be written again."""
    if os.path.exists(path := os.path.join(folder, STATE_FILE)):
        os.remove(path)


def last_checkpoint(folder: str) -> str:
    """Return the path of the last complete checkpoint in an output `folder`; warn of half-written ones.

    Raises:
        `InputError`: There is none.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = (re.fullmatch(r"checkpoint-(\d+)", name) for name in names)
    steps = sorted((int(match[1]) for match in matches if match), reverse=True)
    broken = []
    for step in steps:
        path = os.path.join(folder, f"checkpoint-{step}")
        if is_complete(path):
            if broken:
                logger.warning("Half-written and passed over: %s. Resuming from %s.", ", ".join(broken), path)
            return path
        broken.append(path)
    found = f"only half-written ones: {quote(broken)}" if broken else "none at all"
    raise InputError(f"There is no complete checkpoint in {folder!r} to resume from, {found}. Start the run anew.")
