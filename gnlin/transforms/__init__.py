"""What goes into an Optax chain."""
