"""What is published: a complete folder, its card, its push."""
