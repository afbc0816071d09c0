"""The error of all conversions, and other libraries' errors in one line."""

MAX_REASON = 300


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says what is wrong with it and what to do."""


def one_line(text: str, limit: int) -> str:
    """A text as one line of printable characters: what is read from a file may hold line breaks and escapes."""
    text = text[: 10 * limit]
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def reason(error: BaseException) -> str:
    """The words of another library's error, in one line, without a full stop; its type where it has none."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = one_line(words, MAX_REASON).rstrip(".")
    name = type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if isinstance(error, LookupError) else line  # of a KeyError the bare key
