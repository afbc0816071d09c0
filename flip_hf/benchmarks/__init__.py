"""The questions of `flip-hf benchmark`, a file each."""
