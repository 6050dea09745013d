"""Dense layers, read from a model's linearisation: which leaves, and with which inputs.

A dense layer y = x W + b has a mark in the push-forward dθ ↦ J dθ. There a known array, x, meets
the tangent of a parameter in a ``dot_general``. So its inputs can be read off. Nothing has to be
registered, and any library may have written the network. The cotangents of its outputs can be had,
too: y is cut out, and made an argument of the linear function.

* `reading`: cuts the layers out of the push-forward and transposes it. Start here.
* `inspector`: follows tangents through the push-forward, with a worked example.
* `notes`: the records of the inspector.
* `views`: recognises a leaf that is transposed or reshaped.
* `dense`: recognises the product of an array with a weight.
* `convolution`: recognises a convolution with a weight.
* `bias`: recognises the sum of a layer's product and a bias.
* `matrices`: leaves seen as matrices.
"""

from gnlin.structure.layers.matrices import matrix_shape
from gnlin.structure.layers.reading import Layer, Reading, read_layers

__all__ = ["Layer", "Reading", "matrix_shape", "read_layers"]
