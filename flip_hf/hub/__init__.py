"""Publish models: prepare a complete folder, write its card, push it."""
