"""Any data set to batches of visible patches and tokens, and from any position on."""
