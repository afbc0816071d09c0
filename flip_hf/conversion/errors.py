"""The error of all conversions, and other libraries' errors in one line."""

from flip_hf.console.endings import one_line

MAX_REASON = 300


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says what is wrong with it and what to do."""


def reason(error: BaseException) -> str:
    """The words of another library's error, in one line, without a full stop; its type where it has none."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = one_line(words)[:MAX_REASON].rstrip(".")
    name = type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if isinstance(error, LookupError) else line  # of a KeyError the bare key
