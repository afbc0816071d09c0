"""Fine-tuning a classifier on labelled images: the paper's and MAE's protocol."""
