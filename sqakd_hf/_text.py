"""The wording that messages share, and tables of text."""

import difflib
from collections.abc import Iterable, Sequence


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


def text_table(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Return rows of cells as lines with even columns, the first one to the left and the others to the `right`.

    Examples:
        >>> text_table([("layer", "bits"), ("stem", "8")])
        ['layer  bits', 'stem   8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    adjust = str.rjust if right else str.ljust
    return ["  ".join([row[0].ljust(widths[0]), *map(adjust, row[1:], widths[1:])]).rstrip() for row in rows]
