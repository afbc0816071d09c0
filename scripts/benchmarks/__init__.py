"""The questions of scripts/benchmark.py, a file each."""
