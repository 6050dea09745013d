"""The reading of a linearisation: the uses of its leaves, and cotangents of its layers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Branches, Operation, Path, Scan, control_flow, run_jaxpr
from gnlin.sharding import in_this_mesh
from gnlin.structure.layers.inspector import inspect
from gnlin.structure.layers.loops import cut_branches, cut_scan
from gnlin.structure.layers.matrices import Layout, layouts
from gnlin.structure.layers.notes import Notes, Site
from gnlin.tree import Outputs, Params


class Use(NamedTuple):
    """How a model uses one leaf.

    A leaf that is read has a site for each use, or is the bias of another leaf. `why` says of the
    others why they are not read.
    """

    layout: Layout
    sites: tuple[Site, ...] = ()
    bias: int | None = None  # the leaf that is the bias of these sites
    bias_of: int | None = None  # the leaf whose bias this is
    why: str = ""


class Reading(NamedTuple):
    """The layers of a linearisation.

    ``pull_back(u)`` takes a cotangent of the model's outputs to ``(cotangents, others)``. The first
    are of the sites of each leaf, shaped like ``site.products``. The second is Jᵀu at the leaves
    that are not read, as a dictionary from their positions.
    """

    uses: tuple[Use, ...]
    pull_back: Callable[[Outputs], tuple[list[list[jax.Array]], dict[int, jax.Array]]]


def read_layers(jvp: Callable[[Params], Outputs], params: Params) -> Reading:
    """Find the layers in ``jvp``, the push-forward of a linearisation at `params`.

    A leaf is read if all its uses are recognised and fit its `Layout`. A matrix fits in a product
    over all its inputs, or in a lookup of rows. A vector fits in a product or a sum entry by entry.
    """
    return _Program(jvp, params).reading(_uses)


class Layer(NamedTuple):
    """One dense layer with R applications: R = N for a perceptron, N·T for a sequence."""

    weight: int  # which leaf of the parameters is W
    bias: int | None  # which leaf is b
    inputs: jax.Array  # x, (R, fan-in)
    transposed: bool  # whether W's trailing axes are the inputs, y = x Wᵀ


class DenseReading(NamedTuple):
    """The dense layers of a linearisation.

    ``pull_back(u)`` takes a cotangent of the model's outputs to ``(cotangents, others)``. The first
    are of the layers' outputs y, each (R, fan-out). The second is Jᵀu at the leaves that are in no
    layer, as a dictionary from their positions.
    """

    layers: tuple[Layer, ...]
    pull_back: Callable[[Outputs], tuple[list[jax.Array], dict[int, jax.Array]]]


def read_dense_layers(jvp: Callable[[Params], Outputs], params: Params) -> DenseReading:
    """The same of dense layers that are applied once, outside of loops, to all of a leaf."""
    reading = _Program(jvp, params).reading(_uses_once)
    found = [(leaf, use) for leaf, use in enumerate(reading.uses) if use.sites]
    layers = []
    for leaf, use in found:
        (site,), layout = use.sites, use.layout
        inputs = site.arranged_inputs(layout.shape, 0)
        transposed = bool(layout.is_transposed(site.fan_in, site.fan_out))
        layers.append(Layer(leaf, use.bias, inputs, transposed))

    def pull_back(cotangent: Outputs) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        of_sites, others = reading.pull_back(cotangent)
        return [
            use.sites[0].arranged(of_sites[leaf][0], use.layout.shape, 0) for leaf, use in found
        ], others

    return DenseReading(tuple(layers), pull_back)


class _Program:
    """A push-forward as a jaxpr, with the notes of the inspector."""

    def __init__(self, jvp: Callable[[Params], Outputs], params: Params):
        leaves, structure = jax.tree.flatten(params)
        self.shapes = [
            jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves
        ]
        tangents = jax.tree.unflatten(structure, self.shapes)
        self.push_forward, self.outputs = jax.make_jaxpr(jvp, return_shape=True)(tangents)
        self.notes = inspect(self.push_forward, [leaf.shape for leaf in self.shapes])
        self.notes.sites = {path: _here(site) for path, site in self.notes.sites.items()}
        self.layouts = layouts(tangents)

    def reading(self, uses: "Callable[[Notes, Sequence[Layout]], list[Use]]") -> Reading:
        """The reading in which these uses are cut out."""
        found = uses(self.notes, self.layouts)
        paths = [
            [] if not use.sites else self.notes.sites_of(leaf) for leaf, use in enumerate(found)
        ]
        sites = {path: self.notes.sites[path] for places in paths for path in places}
        # b moves y as x W does: the cotangent of x W serves both.
        skipped = {
            self.notes.sites_of(use.bias)[0] for use in found if use.sites and use.bias is not None
        }
        others = [leaf for leaf, use in enumerate(found) if not use.sites and use.bias_of is None]

        def pull_back(cotangent: Outputs) -> tuple[list[list[jax.Array]], dict[int, jax.Array]]:
            of_others, of_products = self._transpose(sites, skipped, others)(cotangent)
            return [[of_products[path] for path in places] for places in paths], of_others

        return Reading(tuple(found), pull_back)

    def _transpose(
        self, sites: Mapping[Path, Site], skipped: Collection[Path], others: Sequence[int]
    ) -> Callable[[Outputs], tuple[dict[int, jax.Array], dict[Path, jax.Array]]]:
        """The pull-back to the tangents of the other leaves, and to the products of the sites."""

        # The push-forward as a function of these.
        def cut(tangents, products) -> Outputs:
            given = [tangents.get(leaf, _ABSENT) for leaf in range(len(self.shapes))]
            flat = run_jaxpr(self.push_forward, given, _without_layers(products, skipped))
            return jax.tree.unflatten(jax.tree.structure(self.outputs), flat)

        arguments = (
            {leaf: self.shapes[leaf] for leaf in others},
            {path: site.products for path, site in sites.items()},
        )
        if not self.notes.is_rebuilt:
            return jax.linear_transpose(cut, *arguments)
        # A new scan cannot be transposed as it stands, in all versions of JAX. Its derivative can.
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), arguments)
        return jax.vjp(cut, *zeros)[1]


def _here(site: Site) -> Site:
    """The same site with its arrays in the mesh outside of the operation."""
    inputs, factor, ran = map(in_this_mesh, (site.inputs, site.factor, site.ran))
    return site._replace(inputs=inputs, factor=factor, ran=ran)


_ABSENT = object()  # the tangent of a leaf that enters only through sites that are cut out


def _without_layers(
    products: Mapping[Path, jax.Array], skipped: Collection[Path]
) -> Callable[[Operation], Sequence[Any] | None]:
    """Replaces the products of sites by those given, and leaves out the sums with their biases."""
    around = {path[:length] for path in products for length in range(1, len(path))}

    def again(products: Mapping[Path, jax.Array]) -> Callable[[Operation], Sequence[Any] | None]:
        return _without_layers(products, skipped)

    def replace(operation: Operation) -> Sequence[Any] | None:
        here, present = operation.path, [v for v in operation.inputs if v is not _ABSENT]
        if here in products:
            product = in_this_mesh(products[here])
            # A bias is added to its product: the other addend stays.
            if operation.name == "sub" and operation.inputs[0] is _ABSENT:
                return [product - present[0]]
            added = operation.name in ("add", "add_any", "sub")
            return [present[0] + product if added else product]
        if here in skipped:
            return [jnp.broadcast_to(present[0], operation.shape)]
        absent = len(present) < len(operation.inputs)
        if here in around or absent:
            inside = {path: rows for path, rows in products.items() if path[: len(here)] == here}
            match control_flow(operation.equation):
                case Scan() as scan:
                    return cut_scan(operation, scan, inside, again, _ABSENT)
                case Branches() as choice:
                    return cut_branches(operation, choice, inside, again, _ABSENT)
        if absent:
            # A view of a leaf, on its way to the site that it is in.
            return operation.all_outputs(lambda: _ABSENT)
        return None

    return replace


# Which uses are read.


def _uses(notes: Notes, layouts: Sequence[Layout]) -> list[Use]:
    """The use of each leaf."""
    found = [_use(notes, leaf, layout) for leaf, layout in enumerate(layouts)]
    return _with_biases(notes, found)


def _uses_once(notes: Notes, layouts: Sequence[Layout]) -> list[Use]:
    """The same, where all but plain dense layers count as not read."""
    found = []
    for use in (_use(notes, leaf, layout) for leaf, layout in enumerate(layouts)):
        plain = len(use.sites) == 1 and _is_plain(use.sites[0], use.layout)
        found.append(use if plain else Use(use.layout, why="no dense layer of its own"))
    return _with_biases(notes, found)


def _is_plain(site: Site, layout: Layout) -> bool:
    if layout.stack or layout.is_vector or site.loops or site.groups > 1:
        return False
    return site.kind in ("dense", "convolution")


def _use(notes: Notes, leaf: int, layout: Layout) -> Use:
    """The use of one leaf, biases of layers aside."""
    if leaf not in notes.used:
        return Use(layout, why="not used")
    if leaf in notes.strange:
        return Use(layout, why=f"used in {notes.strange[leaf]}")
    sites = tuple(notes.sites[path] for path in notes.sites_of(leaf))
    for site in sites:
        if why := _misfit(site, layout):
            return Use(layout, why=why)
    return Use(layout, sites)


def _misfit(site: Site, layout: Layout) -> str:
    """Why a site has no factors in this layout; empty where it has."""
    inside = range(layout.stack, len(layout.shape))
    of_loops = {axis for axis in site.loops if axis is not None}
    if (of_loops | {axis for axis, _ in site.taken}) & set(inside):
        return "a stack, beside leaves that are none"
    if layout.is_vector:
        return _misfit_of_vector(site, layout)
    if site.kind in ("gain", "bias"):
        # A row for each place is read, where the places have more applications than one.
        whole = all(map(site.fills, inside)) and len(site.output_axes) > len(inside)
        return "" if whole else f"a matrix in a {site.kind}"
    if site.kind == "embedding":
        fan_out = {axis for group in site.output_axes for axis in group}
        fan_in = set(range(len(layout.shape))) - fan_out
        # Rows are looked up by one number.
        if layout.stack:
            return "rows of a stack"
        fits = layout.is_transposed(fan_in, fan_out) is not None
    else:
        fits = layout.is_transposed(site.fan_in, site.fan_out) is not None
        fits = fits and (site.groups == 1 or not layout.stack)
    if fits:
        return ""
    return f"product over axes {tuple(sorted(site.fan_in))} of {layout.shape}"


def _misfit_of_vector(site: Site, layout: Layout) -> str:
    """The same for a vector, which has a diagonal."""
    if site.kind == "convolution":
        return "a vector as a kernel"
    # Rows of a stack of vectors, or entries of one vector.
    if site.kind == "embedding" and (site.fills(0) or layout.stack > 1):
        return "entries of a stack"
    return ""


def _with_biases(notes: Notes, found: list[Use]) -> list[Use]:
    """The uses, with each bias joined to the sites that it is added to."""
    for leaf, use in enumerate(list(found)):
        if len(use.sites) != 1 or use.sites[0].bias is None or use.layout.is_vector:
            continue
        bias, (path,) = use.sites[0].bias.leaf, notes.sites_of(leaf)
        layout = found[bias].layout
        same_stack = layout.stacked == use.layout.stacked
        contracted = any(axis < use.layout.stack for axis in use.sites[0].fan_in)
        if notes.bias_holds(path) and same_stack and not contracted:
            found[leaf] = use._replace(bias=bias)
            found[bias] = Use(layout, bias_of=leaf)
    return found
