"""Whether the Hugging Face Hub can be asked at all, and what can be a name there."""

import functools
import os

import huggingface_hub


@functools.cache
def hub_is_reachable() -> bool:
    """Tell whether the Hub answers, by one quick request; without it every file costs half a minute of retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whichever HTTP library the client is built on, each with its own types
        return False
    return True


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be a repository's id; a folder's path says nothing to others."""
    if not name or os.path.isdir(name) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    return name
