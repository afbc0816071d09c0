"""The files of `tests/fixtures`: outputs and checkpoints of other code."""

from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures"
HEADS = {"vision_heads": 4, "text_heads": 4}
