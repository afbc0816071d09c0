"""Each promise of SECURITY.md names its tests, and they are there."""

import re

from tests.helpers.programs import ROOT


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text()
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|--"))
    ]
    assert len(promises) > 15
    for line in promises:
        named = re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", line.rsplit("|", 2)[1])
        assert named, line
        folder = ""
        for path, function in named:
            folder = path.rpartition("/")[0] or folder  # `test_pickled.py` lies beside the one before
            file = ROOT / (path if "/" in path else f"{folder}/{path}")
            assert file.is_file(), f"{file} in {line}"
            assert not function or f"def {function}(" in file.read_text(), line
