"""Publishes models: prepares a complete folder, writes its card, pushes it."""
