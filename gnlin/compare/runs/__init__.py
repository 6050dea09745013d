"""Training, watching and keeping runs."""
