"""What a run would need and cost, on hardware that is not at hand."""
