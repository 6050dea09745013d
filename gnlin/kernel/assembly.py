"""Assembly of a kernel within a bound on memory.

Where the model treats examples one by one, both batches are cut into parts, as large as there is
room for. Otherwise each batch is worked on as a whole, and the pull-backs run in smaller groups.

A number is an entry of an array: all sizes here are in numbers, not in bytes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.jaxprs import numbers_held
from gnlin.kernel.gram import columns, order_by_example
from gnlin.kernel.products import Pairs, contract
from gnlin.kernel.rows import LeftOutError, Rows, find_rows
from gnlin.problem.linearisation import linearise
from gnlin.problem.objective import Objective
from gnlin.sharding import by_compiler
from gnlin.structure.parts import Cut, assemble, joined, part_of
from gnlin.tree import Batch, Params


class Side(NamedTuple):
    """One of the two batches, and how it may be cut."""

    batch: Batch
    cut: Cut


class Request(NamedTuple):
    """The kernel that is asked for, between the outputs on a and those on b.

    `room` is for intermediate results, beside the kernel itself.
    """

    objective: Objective
    params: Params
    a: Side
    b: Side
    pairs: Pairs
    room: int

    @property
    def of_one_batch(self) -> bool:
        """Whether a and b are the same."""
        return self.a.batch is self.b.batch

    def too_little_room(self, numbers: int, work: str) -> ValueError:
        """The error that this work takes more numbers than there is room for."""
        itemsize = tree.accumulation_dtype(self.params).itemsize
        left, needed = self.room * itemsize, numbers * itemsize
        return ValueError(
            f"`max_bytes` leaves {left} bytes beside the kernel, but the work on {work} may take "
            f"{needed}: raise it by {needed - left}"
        )


# Batches as a whole.

# From all products of outputs (N, C, M, C) to the pairs that are asked for.
_PICK: dict[Pairs, str] = {"full": "ncmd->ncmd", "diagonal": "ncmc->cnm", "trace": "ncmc->nm"}


def as_a_whole(request: Request) -> jax.Array:
    """K of batches that cannot be cut."""
    params, batch = request.params, request.a.batch
    other = None if request.of_one_batch else request.b.batch

    def kernel(params: Params, batch: Batch, other: Batch, budget: int) -> jax.Array:
        return _whole_kernel(request, params, batch, other, budget)

    # Smaller and smaller groups of pull-backs and columns, until the traced program fits.
    budget = max(1, request.room // 8)
    while True:
        bounded = functools.partial(kernel, budget=budget)
        numbers = numbers_held(bounded, params, batch, other)
        if numbers <= request.room:
            return bounded(params, batch, other)
        if budget == 1:
            work = "the batch, whose examples cannot be shown to be independent,"
            raise request.too_little_room(numbers, work)
        budget = max(1, budget // 16)


def _whole_kernel(
    request: Request, params: Params, batch: Batch, other: Batch, budget: int
) -> jax.Array:
    """K, of rows where these are found, and of columns elsewhere. `other` may be `None`."""
    a = linearise(request.objective, params, batch)
    b = a if other is None else linearise(request.objective, params, other)
    found = [find_rows(linear.jvp, params, budget, keep=budget) for linear in (a, b)]
    # A leaf has rows in both batches, or columns in both: products need the two sides.
    left = found[0].left | found[1].left
    while True:
        try:
            rows = found[0].without(left), found[1].without(left)
            break
        # A layer goes as a whole, with its bias. The set only grows, so this ends.
        except LeftOutError as error:
            left |= error.leaves
    total = by_compiler(contract, *rows, request.pairs, None, budget)
    if not left:
        return total
    rest = columns(a.jvp, b.vjp, b.outputs, params, left, None, budget)
    # Columns have the order of the flattened outputs, and `total` has (example, output).
    rest = rest[order_by_example(a.outputs)][:, order_by_example(b.outputs)]
    cuts = request.a.cut, request.b.cut
    shapes = [(cut.examples, cut.outputs_per_example) for cut in cuts]
    return total + jnp.einsum(_PICK[request.pairs], rest.reshape(*shapes[0], *shapes[1]))


# Batches in parts.

# The axes of the kernel that number the examples of a and those of b.
_AXES: dict[Pairs, tuple[int, int]] = {"full": (0, 2), "diagonal": (1, 2), "trace": (0, 1)}


def in_parts(request: Request) -> jax.Array:
    """K of batches that can be cut, with parts as large as there is room for."""
    left: frozenset[int] = frozenset()  # leaves whose rows are computed one example at a time
    while True:
        parts = _Parts(request, left)
        try:
            kernel = _in_strips(parts)
            return _in_blocks(parts) if kernel is None else kernel
        # One more round with these leaves one by one. The set only grows, so this ends.
        except LeftOutError as error:
            left |= error.leaves


class _Parts(NamedTuple):
    """Rows of J at parts of the two batches, and products of these rows."""

    request: Request
    left: frozenset[int]  # leaves whose rows are computed one example at a time

    @property
    def budget(self) -> int:
        return max(1, self.request.room // 8)

    @property
    def totals(self) -> tuple[int, int]:
        """The numbers of examples of a and b."""
        return self.request.a.cut.examples, self.request.b.cut.examples

    def product(self, a: Rows, b: Rows) -> jax.Array:
        return by_compiler(contract, a, b, self.request.pairs, None, self.budget)

    def rows(self, side: Side, start: Any, length: int) -> Rows:
        """Rows at `length` examples from `start` on."""
        request = self.request
        part = part_of(side.batch, side.cut, start, length)
        # A single example is taken twice, for an axis of length 1 could be any.
        seen = part if length > 1 else joined(part, part, side.cut)
        linear = linearise(request.objective, request.params, seen)
        found = find_rows(linear.jvp, request.params, self.budget).without(self.left)
        rows = jax.tree.map(lambda row: row[:length], found)
        if self.left:
            rows.whole.update(self._one_by_one(part, side.cut))
        return rows

    def _one_by_one(self, part: Batch, cut: Cut) -> dict[int, jax.Array]:
        """Rows at the leaves `left`, by reverse mode for each example."""
        params, objective = self.request.params, self.request.objective
        leaves, structure = jax.tree.flatten(params)
        of_part, batch_structure = jax.tree.flatten(part)
        dtype = tree.accumulation_dtype(params)

        def rows_of(example: list[jax.Array]) -> dict[int, jax.Array]:
            # A batch of one example: cut leaves get their first axis back, the others stay whole.
            cut_leaves = iter(example)
            of_one = [
                next(cut_leaves)[None] if split else leaf
                for leaf, split in zip(of_part, cut.batched, strict=True)
            ]
            batch = jax.tree.unflatten(batch_structure, of_one)

            def outputs(chosen: dict[int, jax.Array]) -> jax.Array:
                given = [chosen.get(index, leaf) for index, leaf in enumerate(leaves)]
                whole = jax.tree.unflatten(structure, given)
                return tree.flatten(objective.outputs_and_aux(whole, batch)[0], dtype)

            _, pull_back = jax.vjp(outputs, {leaf: leaves[leaf] for leaf in sorted(self.left)})
            per_example = cut.outputs_per_example
            (rows,) = jax.vmap(pull_back)(jnp.eye(per_example, dtype=dtype))
            return {leaf: row.reshape(per_example, -1).astype(dtype) for leaf, row in rows.items()}

        examples = [leaf for leaf, split in zip(of_part, cut.batched, strict=True) if split]
        return jax.vmap(rows_of)(examples)


def _in_strips(parts: _Parts) -> jax.Array | None:
    """K, a strip of examples of a at a time, with the rows of b computed once.

    `None` where there is no room for all rows of b.
    """
    request, (n, m) = parts.request, parts.totals

    def rows_of_b(start: Any, length: int) -> Rows:
        return parts.rows(request.b, start, length)

    def strip(all_rows: Rows, start: Any, length: int) -> jax.Array:
        if request.of_one_batch:
            own = jax.tree.map(lambda leaf: _part(leaf, start, length), all_rows)
        else:
            own = parts.rows(request.a, start, length)
        return parts.product(own, all_rows)

    rows = jax.eval_shape(lambda start: rows_of_b(start, m), 0)
    spare = request.room - 2 * tree.size(rows)  # XLA may copy the rows that a loop has assembled
    part_length = _longest(
        lambda length: numbers_held(lambda start: rows_of_b(start, length), 0), m, spare
    )
    strip_length = _longest(
        lambda length: numbers_held(lambda rows: strip(rows, 0, length), rows), n, spare
    )
    if part_length is None or strip_length is None:
        return None
    rows = assemble(lambda start: rows_of_b(start, part_length), m, part_length, axis=0)
    down, _ = _AXES[request.pairs]
    return assemble(lambda start: strip(rows, start, strip_length), n, strip_length, down)


def _part(array: jax.Array, start: Any, length: int) -> jax.Array:
    """A part of the first axis."""
    # The whole stays one array, so that the intermediate results of both sides are one.
    if length == array.shape[0]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, start, length)


def _in_blocks(parts: _Parts) -> jax.Array:
    """K, a block at a time, with the rows of b computed again for each part of a."""
    request, (n, m) = parts.request, parts.totals
    down, across = _AXES[request.pairs]

    def row_of_blocks(start: Any, length: int) -> jax.Array:
        own = parts.rows(request.a, start, min(length, n))
        width = min(length, m)

        def block(start: Any) -> jax.Array:
            return parts.product(own, parts.rows(request.b, start, width))

        return assemble(block, m, width, across)

    def needed(length: int) -> int:
        return numbers_held(lambda start: row_of_blocks(start, length), 0)

    length = _longest(needed, max(n, m), request.room)
    if length is None:
        least = min(2, max(n, m))
        raise request.too_little_room(needed(least), "two examples" if least > 1 else "one example")
    return assemble(lambda start: row_of_blocks(start, length), n, min(length, n), down)


def _longest(needed: Callable[[int], int], total: int, room: int) -> int | None:
    """The length of equal parts of `total`, as few as there is room for.

    At least 2, for an axis of length 1 could be any. `None` where there is no room for that.
    """
    length, least = total, min(2, total)
    while (numbers := needed(length)) > room:
        if length == least:
            return None
        # In proportion, and by at least one.
        length = max(least, min(length - 1, max(room, 0) * length // numbers))
    # As many parts, but of one length, so that the last is not nearly empty.
    parts = math.ceil(total / length)
    return max(least, math.ceil(total / parts))
