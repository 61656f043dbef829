"""Whether the Hugging Face Hub can be asked at all."""

import functools

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
