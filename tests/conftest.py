"""The environment of the suite's processes, the order of its files, and the place of its fixtures."""

import os
from pathlib import Path

import pytest

# Of the runs that tests start side by side, threads that wait must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nor do their tiny models gain by a second one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing is kept from one test for another, nor among the files of whoever runs them.
os.environ.setdefault("FLIP_HF_CACHE", "")

# Files that start many programs or compile. Workers take files in the order of their collection
# (`--no-loadscope-reorder`): begun last, one of these would keep a single worker busy after the others have finished.
LONG_FILES = (
    "docs/test_guides.py",
    "curation/test_shard_kills.py",
    "modeling/test_export.py",
    "training/test_kill.py",
    "training/test_pretrain.py",
    "training/test_failures.py",
    "evaluation/test_evaluate.py",
    "test_wheel.py",
    "demo/test_page.py",
    "training/test_objectives.py",
    "training/test_interruptions.py",
    "training/test_stream_runs.py",
    "training/test_stage_runs.py",
    "training/test_finetune_clip.py",
    "scripts/test_benchmark.py",
    "hub/test_credentials.py",
    "hub/test_published.py",
    "planning/test_plan.py",
    "training/test_distribution.py",
    "training/test_flops.py",
)
TESTS = Path(__file__).parent
assert all((TESTS / name).is_file() for name in LONG_FILES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first."""
    places = {TESTS / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_configure(config: pytest.Config) -> None:
    """Imports the fixtures, and with them torch and Transformers, where tests run: not in the head of `pytest -n 2`."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.helpers.shared_fixtures")
