"""Converts other formats to FLIP and back, each by a table of names and a few reshapes."""
