"""Try a model on a page, served locally or as a Space on the Hub."""
