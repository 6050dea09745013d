"""The spectral condition."""
