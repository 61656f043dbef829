"""The one exception type for input that can't be used, and the wording that its messages share."""

import difflib
from collections.abc import Iterable


MAX_BITS = 8


class InputError(ValueError):
    """The caller's input can't be used; the message says what was given, what is accepted and what to do.

    Command-line programs print it as a sentence instead of a stack trace.
    """


class UploadError(RuntimeError):
    """The Hub did not take the files; the message says why and where they still are."""


class ExportMismatchError(RuntimeError):
    """An exported file does not compute what its student does; the message says by how much."""


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is an integer from 1 to 8, else raise `InputError` naming the field."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise InputError(
            f"{name} must be an integer from 1 to {MAX_BITS}, got {bits!r}. "
            "To keep a layer in full precision add it to modules_to_not_convert."
        )
    return bits


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of the known names, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def quote(names: Iterable[str]) -> str:
    """Return the names quoted and separated by commas, for a message."""
    return ", ".join(map(repr, names))


def reason(error: BaseException) -> str:
    """Return the message of an error, or of what caused it, on one line and without a full stop."""
    message = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return message or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for libraries that write paragraphs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
