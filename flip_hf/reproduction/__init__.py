"""The paper's claims, at a scale of one's own: what `flip-hf reproduce` does."""
