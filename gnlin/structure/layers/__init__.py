"""Layers, read from a model's linearisation: which leaves, and with which inputs.

A dense layer y = x W + b has a mark in the push-forward dθ ↦ J dθ. There a known array, x, meets
the tangent of a parameter in a ``dot_general``. So its inputs can be read off. Nothing has to be
registered, and any library may have written the network. The cotangents of its outputs can be had,
too: y is cut out, and made an argument of the linear function. Embeddings, gains and biases have
marks of their own.

* `reading`: cuts the layers out of the push-forward and transposes it. Start here.
* `inspector`: follows tangents through the push-forward, with a worked example.
* `notes`: the records of the inspector.
* `views`: recognises a leaf that is transposed, reshaped or repeated.
* `dense`: recognises the product of an array with a weight.
* `convolution`: recognises a convolution with a weight.
* `embedding`: recognises the rows of a table.
* `gain`: recognises the gain of a normalisation.
* `bias`: recognises the sum of a layer's product and a bias, and any other sum with a leaf.
* `loops`: goes into loops.
* `matrices`: leaves seen as stacks of matrices.
"""

from gnlin.structure.layers.matrices import Layout, layouts, matrix_shape
from gnlin.structure.layers.notes import Site
from gnlin.structure.layers.reading import (
    DenseReading,
    Layer,
    Reading,
    Use,
    read_dense_layers,
    read_layers,
)

__all__ = [
    "DenseReading",
    "Layer",
    "Layout",
    "Reading",
    "Site",
    "Use",
    "layouts",
    "matrix_shape",
    "read_dense_layers",
    "read_layers",
]
