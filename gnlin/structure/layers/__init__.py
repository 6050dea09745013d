"""Dense layers, read from a model's linearisation."""

from gnlin.structure.layers.inspector import Layer, Reading, matrix_shape, read_layers

__all__ = ["Layer", "Reading", "matrix_shape", "read_layers"]
