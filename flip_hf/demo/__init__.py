"""A page to try a model on, served locally or as a Space on the Hub."""
