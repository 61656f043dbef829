"""Whether the Hugging Face Hub can be asked at all, and what can be a name there."""

import os
import time

import huggingface_hub


TIMEOUT = 5.0  # seconds
ASK_AGAIN_AFTER = 60.0  # seconds: one slow answer does not make the Hub unreachable for the life of the process
_answers: dict[str, tuple[bool, float]] = {}  # endpoint → whether it answered, and when


def hub_is_reachable() -> bool:
    """Tell whether the Hub answers, by one quick request; without it every file costs half a minute of retries.

    An answer is remembered; that there was none, for a minute.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    endpoint = huggingface_hub.constants.ENDPOINT
    answered, when = _answers.get(endpoint, (False, float("-inf")))
    if not answered and time.monotonic() - when >= ASK_AGAIN_AFTER:
        answered = _answers_now(endpoint)
        # One assignment: threads that ask at the same time each write a whole answer.
        _answers[endpoint] = answered, time.monotonic()
    return answered


def _answers_now(endpoint: str) -> bool:
    try:
        huggingface_hub.utils.get_session().head(endpoint, timeout=TIMEOUT)
    except Exception:  # whichever HTTP library the client is built on, each with its own types
        return False
    return True


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be a repository's id; a folder's path says nothing to others."""
    if not name or os.path.isdir(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    return name
