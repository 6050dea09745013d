"""The table of a model's layers, as the factors of `Kronecker` see them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.problem.curvature import quadratic_model
from gnlin.problem.objective import Objective, check_objective, check_params
from gnlin.solve.kronecker import Kronecker
from gnlin.structure.layers import Use, read_layers
from gnlin.tree import Batch, Params


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """How a model uses one leaf of its parameters.

    Attributes:
        leaf: its place in the tree, as `jax.tree_util.keystr` writes it.
        shape: of the leaf.
        kind: kinds of its sites, joined by "+": dense, convolution, embedding, gain, bias. A bias
            that is added to a layer has "bias of" and that leaf. Without a reading it is "other".
        sites: number of uses, a loop counted once.
        factors: shapes of the moments on the two sides: (n, n) for a matrix, (n,) for a diagonal,
            with the axes of a stack in front. A spare row and column belong to the bias.
        why_not: why the leaf is not read; empty if it is. Its factors are then those of
            pseudo-gradients.
    """

    leaf: str
    shape: tuple[int, ...]
    kind: str
    sites: int
    factors: tuple[tuple[int, ...], ...]
    why_not: str = ""


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """All leaves of a model, in the order of the tree. Printed, it is a table.

    Attributes:
        rows: one `LayerRow` for each leaf.
    """

    rows: tuple[LayerRow, ...]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        heads = ("leaf", "shape", "kind", "sites", "factors", "why not")
        cells = [heads, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, self._summary()])

    def _cells(self, row: LayerRow) -> Sequence[str]:
        factors = " ".join("x".join(map(str, shape)) for shape in row.factors)
        shape = "x".join(map(str, row.shape)) or "scalar"
        return row.leaf, shape, row.kind, str(row.sites or ""), factors, row.why_not

    def _summary(self) -> str:
        sizes = [math.prod(row.shape) for row in self.rows]
        read = [not row.why_not for row in self.rows]
        share = sum(size for size, ok in zip(sizes, read, strict=True) if ok) / max(sum(sizes), 1)
        return f"{sum(read)} of {len(self.rows)} leaves read, {share:.1%} of the parameters"


@shows_signature
def layers(
    objective: Objective, params: Params, batch: Batch = None, *, solver: Kronecker = Kronecker()
) -> LayerTable:
    """The layers that `Kronecker` finds in a model, as a table. Nothing is computed.

    Args:
        objective: the problem.
        params: parameters, or their shapes.
        batch: data of the model, or their shapes; not needed where the objective is bound.
        solver: the record whose factors are shown; those of an `Eigenbasis` are its `kronecker`.

    Returns:
        A `LayerTable`.

    Raises:
        ValueError, TypeError: as `gnlin.linearise`; `solver` is no `Kronecker`.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> model = lambda p, x: jnp.tanh(p["table"][x] * p["gain"]) @ p["w"] + p["b"]
        >>> objective = gnlin.Objective.least_squares(model)
        >>> params = {"table": jnp.ones((5, 3)), "gain": jnp.ones(3), "w": jnp.ones((3, 2))}
        >>> gnlin.layers(objective, {**params, "b": jnp.ones(2)}, jnp.array([0, 4, 2]))
        leaf       shape  kind           sites  factors  why not
        ---------  -----  -------------  -----  -------  -------
        ['b']      2      bias of ['w']         2
        ['gain']   3      gain           1      3
        ['table']  5x3    embedding      1      6x6 4x4
        ['w']      3x2    dense          1      4x4 3x3
        4 of 4 leaves read, 100.0% of the parameters
    """
    check_objective(objective)
    check_params(params)
    if not isinstance(solver, Kronecker):
        raise TypeError(
            f"`solver` must be a gnlin.Kronecker record, whose factors are shown; got {solver!r}. "
            "Those of gnlin.Eigenbasis are its `kronecker`"
        )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    rows: list[LayerRow] = []

    def read(params, batch):
        model = quadratic_model(objective, params, batch)
        state, _ = solver.init(params)
        shapes = [
            tuple(side.shape for side in sides if side.ndim)
            for sides in zip(jax.tree.leaves(state.left), jax.tree.leaves(state.right), strict=True)
        ]
        uses = read_layers(model.linear.jvp, params).uses
        rows.extend(map(_row, names, uses, shapes, [names] * len(names)))
        return tree.zeros_like(params)

    jax.eval_shape(read, params, batch)
    return LayerTable(tuple(rows))


def _row(
    name: str, use: Use, factors: tuple[tuple[int, ...], ...], names: Sequence[str]
) -> LayerRow:
    if use.bias_of is not None:
        kind = f"bias of {names[use.bias_of]}"
    else:
        kind = " + ".join(site.kind for site in use.sites) or "other"
    return LayerRow(name, use.layout.shape, kind, len(use.sites), factors, use.why)
