"""The paper's claims, tested at any scale: the code of scripts/reproduce.py."""
