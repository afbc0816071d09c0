"""`flip-hf evaluate` in this process."""

import json

from flip_hf.commands.evaluate import main


def evaluated(out, *argv) -> dict:
    """The report of the command, run in this process."""
    main([*map(str, argv), "--output_dir", str(out), "--num_workers", "1"])
    return json.loads((out / "results.json").read_text())
