"""Lets a script parse its options before torch and Transformers are imported, which takes seconds.

`import flip_hf` imports both, to register FLIP with the Auto classes. Importing this module before anything of flip_hf
puts the package in place without that, so that the parts which know options can be imported alone; a script calls
[`finish_import`] when its options are right. Where flip_hf has been imported before, both do nothing.
"""

import importlib.util
import sys


def _put_in_place() -> None:
    spec = importlib.util.find_spec("flip_hf")
    if spec is None:
        sys.exit("error: flip_hf is not installed in this Python: activate its environment (`. .venv/bin/activate`).")
    sys.modules["flip_hf"] = importlib.util.module_from_spec(spec)


def finish_import() -> None:
    """Imports the rest of flip_hf, and with it torch and Transformers."""
    package = sys.modules["flip_hf"]
    loader = package.__spec__.loader if package.__spec__ is not None else None
    if loader is not None and not hasattr(package, "__version__"):
        loader.exec_module(package)


if "flip_hf" not in sys.modules:
    _put_in_place()
