"""The exceptions that callers may catch."""


class InputError(ValueError):
    """The caller's input can't be used; the message says what was given, what is accepted and what to do.

    Command-line programs print it as a sentence instead of a stack trace.
    """


class UploadError(RuntimeError):
    """The Hub did not take the files; the message says why and where they still are."""


class ExportMismatchError(RuntimeError):
    """An exported file does not compute what its student does; the message says by how much."""
