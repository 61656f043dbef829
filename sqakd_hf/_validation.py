"""The checks of values that several places share."""

from typing import Any

from .errors import InputError


MAX_BITS = 8


def is_integer(value: Any, least: int, most: float = float("inf")) -> bool:
    """Tell whether `value` is an `int` in that range; `True` and `False` are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_integer(value: Any, name: str, least: int = 1, hint: str = "") -> int:
    """Return `value` if it is an integer of at least `least`, else raise `InputError` naming it, with a hint."""
    if not is_integer(value, least):
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}.{hint and f' {hint}'}")
    return value


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer from 1 to 8, else raise `InputError` naming the field."""
    if not is_integer(bits, 1, MAX_BITS):
        raise InputError(
            f"{name} must be an integer from 1 to {MAX_BITS}, got {bits!r}. "
            "To keep a layer in full precision add it to modules_to_not_convert."
        )
    return bits
