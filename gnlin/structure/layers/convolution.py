"""Recogniser of a convolution: a dense layer that is applied to every patch of an image."""

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.matrices import is_transposed
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def conv_general_dilated(operation: Operation, notes: Notes) -> Tangent | None:
    """The convolution of known images with a kernel, of one group."""
    (known, view), params = operation.inputs, operation.params
    one_group = params["feature_group_count"] == params["batch_group_count"] == 1
    if not isinstance(view, View) or depends(known) or not one_group:
        return None
    numbers = params["dimension_numbers"]

    # `rhs_spec` says where the kernel has its axes (out, in, window).
    out, *fan_in = (axis for place in numbers.rhs_spec for axis in view.axes[place])
    transposed = is_transposed(view.leaf_shape, sorted(fan_in), [out])
    if len(view.axes) != len(fan_in) + 1 or transposed is None:
        return None
    window = [view.length(view.axes[place]) for place in numbers.rhs_spec[2:]]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(known, numbers.lhs_spec),
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )  # (N, in · window, positions)

    # Features last, with their axes in the order in which the leaf has them.
    patches = jnp.moveaxis(patches, 1, -1)
    patches = patches.reshape(-1, *(view.length([axis]) for axis in fan_in))
    order = [1 + fan_in.index(axis) for axis in sorted(fan_in)]
    inputs = patches.transpose(0, *order).reshape(len(patches), -1)

    images, channels, *positions = numbers.out_spec
    applications, features = (images, *positions), (channels,)
    site = Site(view.leaf, inputs, transposed, operation.output, applications, features)
    return notes.add_site(operation.path, site)
