"""A page to try a model on, here or as a Space of the Hub."""
