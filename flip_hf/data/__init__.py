"""Turns any data set into batches of visible patches and tokens, resumable from any position."""
