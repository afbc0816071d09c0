"""Data sets before training: checked in one pass, and written as shuffled shards."""
