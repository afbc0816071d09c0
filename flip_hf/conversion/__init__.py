"""Other formats to FLIP and back: a table of names and a few reshapes each."""
