"""The paper's claims, tested at any scale: the work behind `flip-hf reproduce`."""
