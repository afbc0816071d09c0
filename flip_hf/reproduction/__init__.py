"""The paper's claims, at a scale of one's own: what scripts/reproduce.py does."""
