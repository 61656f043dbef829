"""The `sqakd` command: one sub-command in each module here, over the public API."""

import sys
from collections.abc import Sequence
from importlib import import_module

from .._text import quote, suggest
from ..errors import ExportMismatchError, InputError, UploadError


COMMANDS = {
    "distill": "train a low-bit student from a full-precision teacher, without labels",
    "evaluate": "measure a student, or its ONNX file, on images",
    "inspect": "show what is quantized, in how many bytes, and what engines will make of it",
    "export": "write a student to an ONNX file that computes with the same integers",
    "benchmark": "time the float network, the student and its ONNX file side by side",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sub-command; what the user can mend ends it with a sentence instead of a stack trace."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {command:<{width}}  {what}" for command, what in COMMANDS.items())
        print(f"usage: sqakd COMMAND ...\n\n{lines}\n\n`sqakd COMMAND --help` lists a command's arguments.")
        return
    try:
        if name not in COMMANDS:
            raise InputError(f"There is no command {name!r}; choose from {quote(COMMANDS)}.{suggest(name, COMMANDS)}")
        import_module(f".{name}", __name__).main(arguments)
    except (InputError, ExportMismatchError, UploadError) as error:
        sys.exit(f"error: {error}")
