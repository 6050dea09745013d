"""What the jaxpr of a model proves of it: its layers, and which of its examples are independent."""
