"""The reading of a linearisation: inputs of its layers, and cotangents of their outputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Operation, Path, run_jaxpr
from gnlin.structure.layers.inspector import find_sites
from gnlin.structure.layers.notes import Site
from gnlin.tree import Outputs, Params


class Layer(NamedTuple):
    """One dense layer with R applications: R = N for a perceptron, N·T for a sequence."""

    weight: int  # which leaf of the parameters is W
    bias: int | None  # which leaf is b
    inputs: jax.Array  # x, (R, fan-in)
    transposed: bool  # whether W's trailing axes are the inputs, y = x Wᵀ


class Reading(NamedTuple):
    """The layers of a linearisation.

    ``pull_back(u)`` takes a cotangent of the model's outputs to ``(cotangents, others)``. The first
    are of the layers' outputs y, each (R, fan-out). The second is Jᵀu at the leaves that are in no
    layer, as a dictionary from their positions.
    """

    layers: tuple[Layer, ...]
    pull_back: Callable[[Outputs], tuple[list[jax.Array], dict[int, jax.Array]]]


def read_layers(jvp: Callable[[Params], Outputs], params: Params) -> Reading:
    """Find the dense layers in ``jvp``, the push-forward of a linearisation at `params`.

    A leaf is in a layer only if its one use is a product over all its inputs, or a sum with such a
    product. A leaf that is used twice (shared weights) or inside a loop is in none.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    trace = jax.make_jaxpr(jvp, return_shape=True)
    push_forward, outputs = trace(jax.tree.unflatten(structure, shapes))
    sites = find_sites(push_forward, [leaf.shape for leaf in shapes])

    layers = []
    for site in sites.values():
        bias = None if site.bias is None else site.bias.leaf
        layers.append(Layer(site.weight, bias, site.inputs, site.transposed))
    in_layers = {leaf for layer in layers for leaf in (layer.weight, layer.bias)}
    others = [leaf for leaf in range(len(leaves)) if leaf not in in_layers]

    # The push-forward as a function of the layers' products and of the other leaves' tangents.
    def cut(tangents: Mapping[int, jax.Array], products: Mapping[Path, jax.Array]) -> Outputs:
        given = [tangents.get(leaf, _ABSENT) for leaf in range(len(leaves))]
        flat = run_jaxpr(push_forward, given, _without_layers(sites, products))
        return jax.tree.unflatten(jax.tree.structure(outputs), flat)

    def pull_back(cotangent: Outputs) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        transpose = jax.linear_transpose(
            cut,
            {leaf: shapes[leaf] for leaf in others},
            {path: site.output for path, site in sites.items()},
        )
        of_others, of_products = transpose(cotangent)
        of_layers = [site.by_application(of_products[path]) for path, site in sites.items()]
        return of_layers, of_others

    return Reading(tuple(layers), pull_back)


_ABSENT = object()  # the tangent of a leaf that enters only through layers that are cut out


def _without_layers(
    sites: Mapping[Path, Site], products: Mapping[Path, jax.Array]
) -> Callable[[Operation], list[Any] | None]:
    """Replaces the products of layers by those given, and leaves out the sums with their biases."""
    sums = {site.bias.sum for site in sites.values() if site.bias is not None}

    def replace(operation: Operation) -> list[Any] | None:
        if operation.path in products:
            return [products[operation.path]]
        if operation.path in sums:
            # b moves y as x W does: the cotangent of x W serves both.
            return [next(value for value in operation.inputs if value is not _ABSENT)]
        if any(value is _ABSENT for value in operation.inputs):
            # A view of a leaf, on its way to the layer that it is in.
            return operation.all_outputs(lambda: _ABSENT)
        return None

    return replace
