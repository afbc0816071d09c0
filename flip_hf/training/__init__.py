"""A run: options, model, loop, checkpoints, and what a person sees of it."""
