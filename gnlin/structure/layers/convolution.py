"""Recogniser of a convolution: a dense layer that is applied to every patch of an image."""

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation
from gnlin.structure.layers.dense import scaled
from gnlin.structure.layers.notes import Notes, Site, Tangent, View, depends


def conv_general_dilated(operation: Operation, notes: Notes) -> Tangent | None:
    """The convolution of known images with a kernel.

    Each group of channels has inputs of its own, which count as applications. So the factor of the
    inputs is a mean over the groups. That of the outputs has a block for each.
    """
    (known, view), params = operation.inputs, operation.params
    if not isinstance(view, View) or depends(known) or params["batch_group_count"] > 1:
        return None
    if any(not group and length > 1 for group, length in zip(view.axes, view.shape, strict=True)):
        return None  # a leaf that is repeated is used once for each repetition
    groups, numbers = params["feature_group_count"], params["dimension_numbers"]

    # `rhs_spec` says where the kernel has its axes (out, in, window).
    out, fan_in, *window = (view.axes[place] for place in numbers.rhs_spec)
    lengths = [view.shape[place] for place in numbers.rhs_spec[1:]]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(known, numbers.lhs_spec),
        lengths[1:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
    )  # (N, groups · in · window, positions)
    images, channels, *positions = numbers.out_spec
    patches = patches.reshape(len(patches), groups, *lengths, *patches.shape[2:])
    # Images and positions in the order of the product; groups are applications, too.
    behind = 2 + len(lengths)
    place_of = {images: 0, **{place: behind + i for i, place in enumerate(positions)}}
    order = [*(place_of[place] for place in sorted(place_of)), *range(1, behind)]
    output_axes = tuple(
        out if place == channels else () for place in range(patches.ndim - behind + 2)
    )
    site = Site(
        kind="convolution",
        leaf=view.leaf,
        inputs=scaled(patches.transpose(order), view.factor),
        input_axes=(*[()] * (len(place_of) + 1), fan_in, *window),
        output=operation.output,
        output_axes=output_axes,
        loops=view.loops,
        groups=groups,
        taken=view.taken,
    )
    return notes.add_site(operation.path, site)
