"""The error of all conversions; shortens other libraries' errors to one line."""

from flip_hf.console.endings import one_line

MAX_REASON = 300


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says what is wrong and what to do."""


def reason(error: BaseException) -> str:
    """Returns another library's error message in one line without a full stop, or its type if it has no message."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = one_line(words)[:MAX_REASON].rstrip(".")
    name = type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if isinstance(error, LookupError) else line  # a KeyError's message is only the key
