"""Layers inside loops and branches: the inspector goes into each body once.

Known arrays of the body are computed for all turns, in a scan of their own that gathers the inputs
of the layers. Then the body is run with the products of the layers as given rows. Branches are
treated alike. The inputs and cotangents of a branch that is not taken are zeros.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gnlin.jaxprs import Branches, Operation, Path, Scan, as_function, carries_from, run_jaxpr
from gnlin.structure.layers.notes import Notes, View, depends

Follow = Callable[[Operation], Sequence[Any] | None]


def follow_scan(operation: Operation, scan: Scan, notes: Notes, follow: Follow) -> list[Any]:
    """Outputs of a scan in which `follow` sees the operations of the body, once for all turns."""
    constants, carry, rows = _parts(operation.inputs, scan)
    notes.spoil([value for value in carry if isinstance(value, View)], "carry of a loop")
    dependent = carries_from(scan, [depends(value) for value in operation.inputs])
    constants = [_in_each_turn(value, notes) for value in constants]
    symbols = [_row(value, notes) if depends(value) else None for value in rows]
    known = [value for value in rows if not depends(value)]
    first = [value for value, moves in zip(carry, dependent, strict=True) if not moves]
    moving: list[bool] = []
    before = set(notes.sites)

    def body(carried, row):
        carried_on, row_on = iter(carried), iter(row)
        turn = [notes.new_tangent() if moves else next(carried_on) for moves in dependent]
        here = [next(row_on) if symbol is None else symbol for symbol in symbols]
        outputs = run_jaxpr(scan.body, [*constants, *turn, *here], follow, operation.path)
        notes.read(outputs)
        notes.spoil(outputs, "output of a loop")
        moving.extend([*dependent, *map(depends, outputs[len(carry) :])])
        pairs = zip(outputs[: len(carry)], dependent, strict=True)
        on = [value for value, moves in pairs if not moves]
        stacked = [value for value in outputs[len(carry) :] if not depends(value)]
        return on, (stacked, _known_of(notes, before))

    notes.lengths.append(scan.length)
    row = [jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for value in known]
    turn, _ = _traced_once(body, first, row)
    notes.lengths.pop()
    last, (stacked, inside) = jax.lax.scan(turn, first, known, scan.length, scan.reverse)
    _keep(notes, inside)
    found = iter([*last, *stacked])
    return [notes.new_tangent() if moves else next(found) for moves in moving]


def cut_scan(
    operation: Operation,
    scan: Scan,
    products: Mapping[Path, jax.Array],
    replace: Callable[[Mapping[Path, jax.Array]], Follow],
    absent: object,
) -> list[Any]:
    """Outputs of a scan in which the products of layers are given, one row for each turn.

    Args:
        operation: the scan.
        scan: the same, read.
        products: of the layers inside, by their paths.
        replace: what to run instead of the operations of the body, given a row of `products`.
        absent: stands for inputs that the body does not need.
    """
    constants, carry, rows = _parts(operation.inputs, scan)
    present = [value for value in rows if value is not absent]

    def turn(carried, row):
        row, given = row
        row = iter(row)
        here = [absent if value is absent else next(row) for value in rows]
        run = replace(given)
        outputs = run_jaxpr(scan.body, [*constants, *carried, *here], run, operation.path)
        carried_on = [
            jnp.asarray(value, start.dtype) for value, start in zip(outputs, carried, strict=False)
        ]
        return carried_on, outputs[len(carry) :]

    # What the model computes again, in the pull-back, is computed again here.
    turn = jax.checkpoint(turn, prevent_cse=False) if scan.computes_again else turn
    last, stacked = jax.lax.scan(
        turn, carry, (present, dict(products)), scan.length, scan.reverse, scan.unroll
    )
    return [*last, *stacked]


def follow_branches(
    operation: Operation, choice: Branches, notes: Notes, follow: Follow
) -> list[Any]:
    """Outputs of a choice in which `follow` sees the operations of all branches."""
    number, *operands = operation.inputs
    if depends(number):
        raise AssertionError("the branch of a linear function is known")
    known = [value for value in operands if not depends(value)]
    moving: list[list[bool]] = []
    traced: list[tuple[Any, Any]] = []
    for branch, jaxpr in enumerate(choice.branches):
        outside = set(notes.sites)

        def body(given, branch=branch, jaxpr=jaxpr, outside=outside):
            rest = iter(given)
            here = [_inside(value, notes) if depends(value) else next(rest) for value in operands]
            outputs = run_jaxpr(jaxpr, here, follow, (*operation.path, branch))
            notes.read(outputs)
            notes.spoil(outputs, "output of a branch")
            moving.append(list(map(depends, outputs)))
            for path, site in notes.sites.items():
                if path not in outside:
                    ran = jnp.ones([]) if site.ran is None else site.ran
                    notes.sites[path] = site._replace(ran=ran)
            new = _known_of(notes, outside)
            return [None if depends(value) else value for value in outputs], new

        traced.append(_traced_once(body, known))
    moves = [any(flags) for flags in zip(*moving, strict=True)]
    not_run: dict[Path, Any] = {}
    for _, (_, new) in traced:
        not_run.update(jax.tree.map(_of_branch_not_run, new))

    def computed(run):
        def branch(given):
            outputs, new = run(given)
            kept = [out for out, moved in zip(outputs, moves, strict=True) if not moved]
            return kept, {**not_run, **new}

        return branch

    outputs, inside = jax.lax.switch(number, [computed(run) for run, _ in traced], known)
    _keep(notes, inside)
    found = iter(outputs)
    return [notes.new_tangent() if moved else next(found) for moved in moves]


def cut_branches(
    operation: Operation,
    choice: Branches,
    products: Mapping[Path, jax.Array],
    replace: Callable[[Mapping[Path, jax.Array]], Follow],
    absent: object,
) -> list[Any]:
    """Outputs of a choice in which the products of layers are given, as in `cut_scan`."""
    number, *operands = operation.inputs
    present = [value for value in operands if value is not absent]

    def computed(branch, jaxpr):
        here = (*operation.path, branch)

        def run(present, products):
            rest = iter(present)
            given = [absent if value is absent else next(rest) for value in operands]
            inside = {path: p for path, p in products.items() if path[: len(here)] == here}
            return run_jaxpr(jaxpr, given, replace(inside), here)

        return run

    branches = [computed(branch, jaxpr) for branch, jaxpr in enumerate(choice.branches)]
    return jax.lax.switch(number, branches, present, dict(products))


def _traced_once(body: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Any]:
    """A body and the shapes of its results. Each trace of it would note the layers again."""
    traced, shape = jax.make_jaxpr(body, return_shape=True)(*arguments)

    def run(*arguments):
        flat = as_function(traced)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return run, shape


def _known_of(notes: Notes, before: Collection[Path]) -> dict[Path, Any]:
    """The known arrays of the sites that are new."""
    new = {path: site for path, site in notes.sites.items() if path not in before}
    return {path: (site.inputs, site.factor, site.ran) for path, site in new.items()}


def _keep(notes: Notes, found: Mapping[Path, Any]) -> None:
    """Note the known arrays of these sites, as they are outside of a body."""
    notes.is_rebuilt |= bool(found)
    for path, (inputs, factor, ran) in found.items():
        notes.sites[path] = notes.sites[path]._replace(inputs=inputs, factor=factor, ran=ran)


def _of_branch_not_run(like: Any) -> jax.Array:
    """Zeros, or numbers of rows that no table has."""
    whole = jnp.issubdtype(like.dtype, jnp.integer)
    return jnp.full(like.shape, jnp.iinfo(like.dtype).max if whole else 0, like.dtype)


def _inside(value: Any, notes: Notes) -> Any:
    """A tangent or a view, inside a branch."""
    return value if isinstance(value, View) else notes.new_tangent()


def _parts(inputs: Sequence[Any], scan: Scan) -> tuple[list[Any], list[Any], list[Any]]:
    split = scan.split
    parts = (split.constants, split.carried, split.scanned)
    constants, carry, rows = ([inputs[place] for place in part] for part in parts)
    return constants, carry, rows


def _in_each_turn(value: Any, notes: Notes) -> Any:
    """A constant of the loop, inside it."""
    if isinstance(value, View):
        return value._replace(loops=(*value.loops, None))
    return notes.new_tangent() if depends(value) else value


def _row(value: Any, notes: Notes) -> Any:
    """A row of a tangent that the loop goes over."""
    if not isinstance(value, View):
        return notes.new_tangent()
    if len(value.axes[0]) > 1:
        notes.spoil([value], "rows of merged axes")
        return notes.new_tangent()
    axis = value.axes[0][0] if value.axes[0] else None
    loops = (*value.loops, axis)
    return value._replace(axes=value.axes[1:], shape=value.shape[1:], loops=loops)
