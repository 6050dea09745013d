r"""The empirical neural tangent kernel K = J Jᵀ.

It says how outputs move together under gradient descent: to first order a step of size η on the
loss of example m moves output c of example n by −η Σ_d K[n, c, m, d] ∂ℓ/∂z[m, d].
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_number
from gnlin.jaxprs import numbers_held_by
from gnlin.kernel.gram import Pairs, columns, contract, order_by_example
from gnlin.kernel.rows import Found, LeftOutError, Rows, find_rows
from gnlin.problem.linearisation import linearise
from gnlin.problem.objective import Objective, check_not_bound, check_objective, without_binding
from gnlin.structure.parts import Cut, assemble, cut_of, joined, part_of
from gnlin.tree import Batch, Outputs, Params

_PAIRS: tuple[Pairs, ...] = ("full", "diagonal", "trace")


def empirical_ntk(
    objective: Objective,
    params: Params,
    batch: Batch = None,
    other: Batch = None,
    *,
    outputs: Pairs = "full",
    max_bytes: float = 2**32,
) -> jax.Array:
    r"""The empirical neural tangent kernel between the outputs of two batches.

    .. math:: K_{nc,md} = \Big\langle \frac{\partial f_c(x_n)}{\partial\theta},
                                      \frac{\partial f_d(x_m)}{\partial\theta} \Big\rangle

    The Jacobian is not materialised where it can be avoided: dense layers contribute products of
    their inputs and cotangents, other leaves a block of the Jacobian at a time, and only what mixes
    the examples of a batch (batch normalisation) takes a pull-back and a push-forward for each
    output. Where the model is shown to treat examples one by one, batches are worked on in parts,
    so that result and intermediate results stay within `max_bytes`. Leaves of a batch with N along
    their first axis are then cut, others (a key, frozen statistics) passed whole.

    Compiled for each objective, and for the shapes of `params` and batches; call it with the same
    `objective`. All leaves of a batch are traced: what the model branches on belongs into the
    model.

    Args:
        objective: the problem; its loss plays no part.
        params: θ.
        batch: N examples; not needed where the objective is bound.
        other: M examples of the same structure; `None` for `batch` itself.
        outputs: which pairs of the C outputs of an example: ``"full"`` for all, ``"diagonal"`` for
            each with itself, ``"trace"`` for the sum of these. Several leaves of outputs count as
            one, in the order of the tree; scalar outputs are those of one example.
        max_bytes: bound on what result and intermediate results take, beside the arguments.

    Returns:
        (N, C, M, C) for ``"full"``, so that ``reshape(N * C, M * C)`` is J Jᵀ; (C, N, M) for
        ``"diagonal"``; (N, M) for ``"trace"``. In the accumulation dtype of `params`, at least
        float32.

    Raises:
        ValueError: `max_bytes` is too small for the kernel or for the work on two examples;
            `outputs` is none of the three; `other` has another structure than `batch`; outputs are
            for different numbers of examples.
        ValueError, TypeError: as `linearise`.

    References: Jacot, Gabriel & Hongler, arXiv 1806.07572; Novak, Sohl-Dickstein & Schoenholz,
        arXiv 2206.08720.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective(lambda p, x: x @ p, lambda z, x: jnp.sum(z ** 2))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> gnlin.kernel.empirical_ntk(objective, jnp.zeros((2, 3)), x, outputs="trace")   # 3 x xᵀ
        Array([[ 3.,  3.],
               [ 3., 15.]], dtype=float32)
    """
    _check(objective, params, batch, other)
    if outputs not in _PAIRS:
        raise ValueError(f"`outputs` must be one of {_PAIRS}; got {outputs!r}")
    check_number("max_bytes", max_bytes, positive=True, finite=False)
    objective, batch = without_binding(objective, batch)
    return _kernel(
        params,
        batch,
        other,
        objective=objective,
        pairs=outputs,
        max_bytes=math.ceil(min(max_bytes, 2**62)),
    )


def ntk_vector_product(
    objective: Objective, params: Params, batch: Batch = None, other: Batch = None
) -> Callable[[Outputs], Outputs]:
    r"""The matrix-free product :math:`v \mapsto J_a J_b^\top v` with the kernel between two
    batches.

    The linearisations are done once and serve every product, which costs one pull-back and one
    push-forward.

    Args:
        objective: the problem; its loss plays no part.
        params: θ.
        batch: data a; not needed where the objective is bound.
        other: data b; `None` for `batch` itself.

    Returns:
        A linear function from trees like the outputs on `other` to trees like the outputs on
        `batch`.

    Raises:
        ValueError, TypeError: as `empirical_ntk`.

    Reference: Novak, Sohl-Dickstein & Schoenholz, arXiv 2206.08720, section 3.3.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective(lambda p, x: x @ p, lambda z, x: jnp.sum(z ** 2))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> gnlin.kernel.ntk_vector_product(objective, jnp.zeros(2), x)(jnp.array([1.0, 1.0]))   # x xᵀ v
        Array([2., 6.], dtype=float32)
    """
    _check(objective, params, batch, other)
    linear = linearise(objective, params, batch)
    pull = linear.vjp if other is None else linearise(objective, params, other).vjp
    return lambda cotangent: linear.jvp(pull(cotangent))


# How the kernel is had.


def _check(objective: Objective, params: Params, batch: Batch, other: Batch) -> None:
    check_objective(objective)
    objective.check_params(params)
    objective.check_batch(batch)
    check_not_bound("batch", objective, batch)
    if other is None:
        return
    check_not_bound("other", objective, other)
    if jax.tree.structure(other) != jax.tree.structure(batch):
        raise ValueError(
            "`other` must have the structure of `batch`.\n"
            f"  other: {jax.tree.structure(other)}\n  batch: {jax.tree.structure(batch)}"
        )


@functools.partial(jax.jit, static_argnames=("objective", "pairs", "max_bytes"))
def _kernel(
    params: Params,
    batch: Batch,
    other: Batch,
    *,
    objective: Objective,
    pairs: Pairs,
    max_bytes: int,
) -> jax.Array:
    def model(params, batch):
        return objective.outputs_and_aux(params, batch)[0]

    dtype = tree.accumulation_dtype(params)
    own = cut_of(model, params, batch)
    theirs = own if other is None else cut_of(model, params, other)
    if own.outputs_per_example != theirs.outputs_per_example:
        raise ValueError(
            f"`other` has {theirs.outputs_per_example} outputs of an example, but `batch` has {own.outputs_per_example}"
        )
    n, c, m = own.examples, own.outputs_per_example, theirs.examples
    shape = {"full": (n, c, m, c), "diagonal": (c, n, m), "trace": (n, m)}[pairs]
    size = math.prod(shape)
    room = max_bytes // dtype.itemsize - size
    if room <= 0:
        raise ValueError(
            f"`max_bytes` is {max_bytes}, but the kernel by itself takes {size * dtype.itemsize}: ask for fewer "
            'examples, for outputs="trace", or raise `max_bytes`'
        )
    if not tree.size(params):
        return jnp.zeros(shape, dtype)
    if not (own.apart and theirs.apart):
        return _in_one(objective, params, batch, other, (own, theirs), pairs, room)
    sides = (
        _Side(objective, batch, own),
        _Side(objective, batch if other is None else other, theirs),
    )
    return _in_parts(params, sides, pairs, room)


def _in_one(
    objective: Objective,
    params: Params,
    batch: Batch,
    other: Batch,
    cuts: tuple[Cut, Cut],
    pairs: Pairs,
    room: int,
) -> jax.Array:
    """K of batches that cannot be cut."""

    def kernel(params, batch, other, budget):
        a = linearise(objective, params, batch)
        b = a if other is None else linearise(objective, params, other)
        found = [find_rows(linear.jvp, params, budget, keep=budget) for linear in (a, b)]
        left = found[0].left | found[1].left
        while True:
            try:
                total = contract(
                    found[0].without(left), found[1].without(left), pairs, None, budget
                )
                break
            except LeftOutError as out:
                left |= out.leaves
        if not left:
            return total
        places = [order_by_example(linear.outputs) for linear in (a, b)]
        rest = columns((a.jvp, a.vjp), (b.jvp, b.vjp), params, left, None, budget)[places[0]][
            :, places[1]
        ]
        shapes = [(cut.examples, cut.outputs_per_example) for cut in cuts]
        return total + jnp.einsum(_PICK[pairs], rest.reshape(*shapes[0], *shapes[1]))

    def needed(budget):
        return _numbers(functools.partial(kernel, budget=budget), params, batch, other)

    budget = max(1, room // 8)
    while (numbers := needed(budget)) > room:
        if budget == 1:
            what = "the batch, whose examples cannot be shown to be independent,"
            raise _too_small(room, numbers, tree.accumulation_dtype(params), what)
        budget = max(1, budget // 16)
    return kernel(params, batch, other, budget)


_PICK: dict[Pairs, str] = {"full": "ncmd->ncmd", "diagonal": "ncmc->cnm", "trace": "ncmc->nm"}
# Where the examples of both batches are along the kernel's axes.
_AXES: dict[Pairs, tuple[int, int]] = {"full": (0, 2), "diagonal": (1, 2), "trace": (0, 1)}


class _Side(NamedTuple):
    """A batch that can be cut, and how to have rows of J at parts of it."""

    objective: Objective
    batch: Batch
    cut: Cut

    def found(self, params: Params, part: Batch, budget: int) -> Found:
        return find_rows(linearise(self.objective, params, part).jvp, params, budget)

    def rows(
        self, params: Params, start: Any, length: int, left: frozenset[int], budget: int
    ) -> Rows:
        part = part_of(self.batch, self.cut, start, length)
        # A single example is looked at twice, for an axis of length 1 could be any.
        looked_at = part if length > 1 else joined(part, part, self.cut)
        rows = self.found(params, looked_at, budget).without(left)
        rows = jax.tree.map(lambda row: row[:length], rows)
        rows.whole.update(self._one_by_one(params, part, left))
        return rows

    def _one_by_one(
        self, params: Params, part: Batch, left: frozenset[int]
    ) -> dict[int, jax.Array]:
        leaves, structure = jax.tree.flatten(params)
        of_part, of_batch = jax.tree.flatten(part)
        dtype = tree.accumulation_dtype(params)

        def rows_of(example):
            cut = iter(example)
            whole = [
                next(cut)[None] if split else leaf
                for leaf, split in zip(of_part, self.cut.batched, strict=True)
            ]

            def outputs(chosen):
                given = [chosen.get(index, leaf) for index, leaf in enumerate(leaves)]
                one = jax.tree.unflatten(structure, given), jax.tree.unflatten(of_batch, whole)
                return tree.flatten(self.objective.outputs_and_aux(*one)[0], dtype)

            _, pull_back = jax.vjp(outputs, {index: leaves[index] for index in sorted(left)})
            (rows,) = jax.vmap(pull_back)(jnp.eye(self.cut.outputs_per_example, dtype=dtype))
            return {
                index: row.reshape(self.cut.outputs_per_example, -1).astype(dtype)
                for index, row in rows.items()
            }

        examples = [leaf for leaf, split in zip(of_part, self.cut.batched, strict=True) if split]
        return jax.vmap(rows_of)(examples) if left else {}


def _in_parts(params: Params, sides: tuple[_Side, _Side], pairs: Pairs, room: int) -> jax.Array:
    """K of batches that can be cut, with parts as large as there is room for."""
    left: frozenset[int] = frozenset()  # leaves whose rows have to be had one example at a time
    while True:
        try:
            return _with_rows(params, sides, pairs, room, left)
        except LeftOutError as out:
            left |= out.leaves


def _with_rows(
    params: Params, sides: tuple[_Side, _Side], pairs: Pairs, room: int, left: frozenset[int]
) -> jax.Array:
    a, b = sides
    same, budget = a.batch is b.batch, max(1, room // 8)
    down, across = _AXES[pairs]
    total = a.cut.examples, b.cut.examples

    def rows(side, length):
        return lambda start: side.rows(params, start, length, left, budget)

    kept = jax.eval_shape(rows(b, total[1]), 0)
    spare = room - 2 * tree.size(kept)  # XLA may copy what a loop has assembled

    def strip(length, kept):
        def of(start):
            if same:
                return contract(
                    jax.tree.map(lambda leaf: _part(leaf, start, length), kept),
                    kept,
                    pairs,
                    None,
                    budget,
                )
            return contract(rows(a, length)(start), kept, pairs, None, budget)

        return of

    # Rows of one side that fit as a whole are computed once.
    of_rows, of_strips = (
        _longest(lambda length: _numbers(rows(b, length), 0), total[1], spare),
        _longest(
            lambda length: _numbers(lambda kept: strip(length, kept)(0), kept), total[0], spare
        ),
    )
    if of_rows and of_strips:
        kept = assemble(rows(b, of_rows), total[1], of_rows, axis=0)
        return assemble(strip(of_strips, kept), total[0], of_strips, down)

    def block(length):
        lengths = min(length, total[0]), min(length, total[1])

        def row_of_blocks(start):
            own = rows(a, lengths[0])(start)
            return assemble(
                lambda start: contract(own, rows(b, lengths[1])(start), pairs, None, budget),
                *(total[1], lengths[1], across),
            )

        return row_of_blocks

    length = _longest(lambda length: _numbers(block(length), 0), max(total), room)
    if length is None:
        least = min(2, max(total))
        numbers = _numbers(block(least), 0)
        raise _too_small(
            room,
            numbers,
            tree.accumulation_dtype(params),
            "two examples" if least > 1 else "one example",
        )
    return assemble(block(length), total[0], min(length, total[0]), down)


def _part(array: jax.Array, start: Any, length: int) -> jax.Array:
    # The whole stays one array, so that what is made of it on both sides is made once.
    return array if length == array.shape[0] else jax.lax.dynamic_slice_in_dim(array, start, length)


def _numbers(function: Callable[..., Any], *arguments: Any) -> int:
    return numbers_held_by(jax.make_jaxpr(function)(*arguments).jaxpr)


def _longest(needed: Callable[[int], int], total: int, room: int) -> int | None:
    """The length of equal parts of `total`, as few as there is room for; at least 2, as 1 could be any axis."""
    length, least = total, min(2, total)
    while (numbers := needed(length)) > room:
        if length == least:
            return None
        length = max(least, min(length - 1, max(room, 0) * length // numbers))
    return max(least, math.ceil(total / math.ceil(total / length)))


def _too_small(room: int, numbers: int, dtype: Any, what: str) -> ValueError:
    left, needed = room * dtype.itemsize, numbers * dtype.itemsize
    return ValueError(
        f"`max_bytes` leaves {left} bytes beside the kernel, but the work on {what} may take {needed}: raise it by "
        f"{needed - left}"
    )
