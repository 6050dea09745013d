"""Who takes part in a comparison."""
