"""The registration of FLIP in Transformers' Auto classes by `import flip_hf`."""

import subprocess
import sys

import pytest

import flip_hf

# In which order a user's file imports.
ORDERS = [
    "import flip_hf; from transformers import AutoConfig",
    "from transformers import AutoConfig; import flip_hf",
    "from flip_hf.modeling import FlipModel; from transformers import AutoConfig",
]
CHECK = """
import os, sys
import flip_hf
from importlib.util import find_spec
assert find_spec("transformers").origin.endswith("__init__.py")
assert "FlipModel" in dir(flip_hf)
assert not {{"torch", "transformers"}} & sys.modules.keys()
for name in [name for name in sys.modules if name.split(".")[0] == "flip_hf"]:
    del sys.modules[name]
del sys.meta_path[0]
import torch
for library in ("sklearn.metrics", "torchao"):  # what Transformers imports, too, takes longest, and has no part in this
    if find_spec(library.split(".")[0]):
        __import__(library)
assert "transformers" not in sys.modules
orders = {orders!r}
children = []
for order in orders:  # each in an interpreter of its own that has imported neither
    children.append(os.fork())
    if not children[-1]:
        exec(order)
        from transformers import AutoModel
        assert type(AutoConfig.for_model("flip")).__module__ == "flip_hf.modeling.configuration_flip", order
        import flip_hf
        assert flip_hf.FlipConfig in AutoModel._model_mapping, order
        import transformers
        assert type(transformers.__spec__.loader).__name__ == "SourceFileLoader", order
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("flip_hf")], order
        print("registered", flush=True)
        os._exit(0)
ends = [os.waitpid(child, 0)[1] for child in children]
assert not any(ends), list(zip(orders, ends))
"""


def test_the_auto_classes_know_flip_in_any_order_of_imports():
    done = subprocess.run([sys.executable, "-c", CHECK.format(orders=ORDERS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("registered") == len(ORDERS)


def test_names_that_are_not_public_are_an_error():
    assert all(isinstance(getattr(flip_hf, name), type) for name in flip_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FlipModels'"):
        flip_hf.FlipModels  # noqa: B018
