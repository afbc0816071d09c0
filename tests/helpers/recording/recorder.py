"""Records what warns in a process: Python's warnings and Transformers' logger. Imports nothing of this project."""

import logging
import sys
import sysconfig
import warnings

LIBRARIES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "<frozen", __file__)


def _cause() -> str:
    """The innermost line outside of libraries: the call of ours that a library warns of."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return "nowhere" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def record() -> list[str]:
    """From here on, each warning as a line that says what caused it, in the list that is returned."""
    lines: list[str] = []

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        lines.append(f"{_cause()}: {category.__name__}: {message}")

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(f"{_cause()}: {record.name}: {record.getMessage()}")
    logging.getLogger("transformers").addHandler(handler)
    warnings.simplefilter("always")
    warnings.showwarning = show
    return lines
