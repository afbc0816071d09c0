"""What `import flip_hf` does to Transformers' Auto classes, and what it leaves alone."""

import subprocess
import sys

import pytest

import flip_hf

# In which order a user's file imports, and that the Auto classes know FLIP then.
ORDERS = [
    "import flip_hf; from transformers import AutoConfig",
    "from transformers import AutoConfig; import flip_hf",
    "from flip_hf.modeling import FlipModel; from transformers import AutoConfig",
    "from flip_hf import FlipModel; from transformers import AutoConfig",
]
CHECK = """
import os, sys
for order in {orders!r}:
    pid = os.fork()  # each order in an interpreter that has imported nothing
    if not pid:
        exec(order)
        from transformers import AutoModel
        assert type(AutoConfig.for_model("flip")).__module__ == "flip_hf.modeling.configuration_flip", order
        assert flip_hf_config() in AutoModel._model_mapping, order
        import transformers
        assert type(transformers.__spec__.loader).__name__ == "SourceFileLoader", order
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("flip_hf")], order
        print("registered", flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, order
import flip_hf
from importlib.util import find_spec
assert find_spec("transformers").origin.endswith("__init__.py")
assert "FlipModel" in dir(flip_hf)
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""


def test_the_auto_classes_know_flip_whoever_is_imported_first():
    check = "def flip_hf_config():\n    import flip_hf\n    return flip_hf.FlipConfig\n" + CHECK.format(orders=ORDERS)
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("registered") == len(ORDERS)


def test_names_that_are_not_public_are_an_error():
    assert all(isinstance(getattr(flip_hf, name), type) for name in flip_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FlipModels'"):
        flip_hf.FlipModels  # noqa: B018
