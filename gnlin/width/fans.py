"""Which axes of a parameter are its inputs and which its outputs: leaves seen as matrices.

A leaf is a map from its inputs to its outputs, features on both sides being of order one. How large
it should be depends on how many of each there are, its fan-in and fan-out, and on nothing else
here.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gnlin.checks import is_integer
from gnlin.tree import Params, Tree

Axes = int | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Fans:
    """Axes of a leaf, in the words of `jax.nn.initializers`.

    | leaf | shape | what to say |
    |---|---|---|
    | matrix of a dense layer, y = x W | (in, out) | ``Fans()``, the default |
    | kernel of a convolution over two or more dimensions | (..., in, out) | ``Fans()``, the default |
    | bias | (out) | ``Fans((), -1)``, the default |
    | gain, one factor for each feature | (features) | ``Fans(-1, -1)`` |
    | embedding, looked up | (words, out) | ``Fans((), -1, index_axis=0)`` |
    | layers stacked for `jax.lax.scan` | (layers, in, out) | ``Fans(batch_axis=0)`` |
    | their biases | (layers, out) | ``Fans((), -1, batch_axis=0)`` |
    | kernel of a convolution over one dimension | (width, in, out) | ``Fans()`` |
    | attention's queries, keys, values | (in, heads, width) | ``Fans(0, (1, 2))`` |
    | their biases | (heads, width) | ``Fans((), (0, 1))`` |
    | attention's output | (heads, width, out) | ``Fans((0, 1), 2)`` |
    | experts, one of which acts on each token | (experts, in, out) | ``Fans(index_axis=0)`` |
    | PyTorch's matrix, y = x Wᵀ | (out, in) | ``Fans(1, 0)`` |

    Axes that are not named are a receptive field, and count among the inputs: fan-in is in × field,
    as many numbers as each output sees, and fan-out is out. (The initialisers of JAX multiply
    fan-out by the field as well.)

    Args:
        in_axis: axes of the inputs; () where there is one input, of constant size, as for a bias.
        out_axis: axes of the outputs; () where there is one. Along an axis that is among the inputs
            and the outputs the map is diagonal: feature i acts on feature i alone.
        batch_axis: axes that number separate maps, such as layers.
        index_axis: axes of which the input picks one entry, a one-hot input. Its norm is one
            whatever its length, so the axis counts as one input, and the norm of the map is that of
            its largest entry.

    Raises:
        TypeError: an axis is no integer.
        ValueError: an axis is named twice (except as input and output).

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813, for what fan-in and fan-out are used for.

    Example:
        >>> import gnlin
        >>> gnlin.width.Fans(batch_axis=0)
        Fans(in_axis=(-2,), out_axis=(-1,), batch_axis=(0,), index_axis=())
    """

    in_axis: Axes = -2
    out_axis: Axes = -1
    batch_axis: Axes = ()
    index_axis: Axes = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            axes = (given,) if is_integer(given) else given
            if (
                isinstance(axes, str)
                or not isinstance(axes, Sequence)
                or not all(map(is_integer, axes))
            ):
                raise TypeError(
                    f"`{field.name}` must be an integer or a tuple of integers; got {given!r}"
                )
            object.__setattr__(self, field.name, tuple(int(axis) for axis in axes))
        _check_distinct(self, *self._axes())

    def layout(self, shape: Sequence[int]) -> "Layout":
        """How a leaf of this shape is a stack of matrices."""
        if not all(-len(shape) <= axis < len(shape) for axes in self._axes() for axis in axes):
            raise ValueError(
                f"`fans` names axes that an array of shape {tuple(shape)} does not have: {self}. A tree of Fans says "
                "it leaf by leaf"
            )
        inputs, outputs, batch, index = (
            tuple(axis % len(shape) for axis in axes) for axes in self._axes()
        )
        _check_distinct(self, inputs, outputs, batch, index)
        diagonal = tuple(axis for axis in inputs if axis in outputs)
        rows = tuple(axis for axis in range(len(shape)) if axis not in {*outputs, *batch, *index})
        columns = tuple(axis for axis in outputs if axis not in diagonal)

        def count(axes):
            return math.prod(shape[axis] for axis in axes)

        return Layout(
            shape=tuple(shape),
            batch_axes=tuple(sorted(batch)),
            order=(*sorted(batch), *index, *diagonal, *rows, *columns),
            stack=(count(batch), count(index + diagonal), count(rows), count(columns)),
            fan_in=count(diagonal + rows),
            fan_out=count(outputs),
        )

    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.in_axis, self.out_axis, self.batch_axis, self.index_axis  # pyright: ignore[reportReturnType]


FansOf = Fans | Tree | Callable[[Params], Tree] | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf as ``stack`` = (matrices, blocks, rows, columns); each matrix is block-diagonal and
    maps rows to columns.

    The entries of an index, of which one acts at a time, are blocks as well: in both cases the norm
    of the matrix is the largest among its blocks.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    order: tuple[int, ...]  # the leaf's axes as they follow one another in the stack
    stack: tuple[int, int, int, int]
    fan_in: int
    fan_out: int

    @property
    def prescription(self) -> float:
        """√(fan-out / fan-in), the norm of a map between features of order one."""
        return math.sqrt(self.fan_out / max(self.fan_in, 1))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch_axes)

    def split(self, leaf: jax.Array) -> jax.Array:
        """The leaf as its stack of matrices."""
        return leaf.transpose(self.order).reshape(self.stack)

    def join(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        moved = matrices.reshape([self.shape[axis] for axis in self.order])
        return moved.transpose([self.order.index(axis) for axis in range(len(self.order))])

    def spread(self, numbers: jax.Array) -> jax.Array:
        """One number for each matrix, (matrices), with the leaf's axes, for broadcasting."""
        return numbers.reshape(
            [n if axis in self.batch_axes else 1 for axis, n in enumerate(self.shape)]
        )


def layouts(fans: FansOf, params: Params) -> Tree:
    """A tree like `params` of `Layout`s.

    Raises:
        TypeError, ValueError: `fans` is no tree of `Fans` for these parameters, or does not fit a
            leaf; a leaf of three axes has none.
    """
    if not jax.tree.leaves(
        params
    ):  # nothing to lay out, such as the placeholder of optax.tree_map_params
        return params
    given = fans(params) if callable(fans) else fans
    spread: list[tuple[str, Any, tuple[int, ...]]] = []

    def visit(path, each, part):
        for inner, leaf in jax.tree.leaves_with_path(part):
            spread.append((jax.tree_util.keystr((*path, *inner)), each, np.shape(leaf)))

    try:
        jax.tree_util.tree_map_with_path(
            visit, given, params, is_leaf=lambda node: node is None or _is_fans(node)
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`fans` must be a gnlin.width.Fans, or a tree of them (None for the default) of the form of the parameters or a "
            f"prefix of it; got {given!r} for {jax.tree.structure(params)}"
        ) from error
    return jax.tree.unflatten(jax.tree.structure(params), [layout_of(*each) for each in spread])


def layout_of(name: str, fans: Fans | None, shape: tuple[int, ...]) -> Layout:
    """The layout of one leaf, `name` in messages; without `fans` that of its number of axes."""
    if fans is None:
        if len(shape) == 3:
            raise ValueError(
                f"`fans` must say what the three axes of {name} are, of shape {shape}: gnlin.width.Fans(batch_axis=0) for a "
                "stack of matrices (in, out), Fans() for the kernel of a one-dimensional convolution, Fans(0, (1, 2)) "
                "for attention's (in, heads, width), Fans((0, 1), 2) for its output's (heads, width, out)"
            )
        fans = (Fans((), ()), Fans((), -1))[len(shape)] if len(shape) < 2 else Fans()
    if not _is_fans(fans):
        raise TypeError(
            f"`fans` must hold gnlin.width.Fans, or None for the default; got {fans!r} at {name}"
        )
    try:
        return fans.layout(shape)
    except ValueError as error:
        raise ValueError(f"{error} (at {name})") from None


def _is_fans(node: Any) -> bool:
    return isinstance(node, Fans)


def _check_distinct(fans: Fans, inputs, outputs, batch, index) -> None:
    """No axis twice; only inputs and outputs may share some."""
    both = {*inputs, *outputs}
    if len({*both, *batch, *index}) < len(both) + len(batch) + len(index) or any(
        len(set(axes)) < len(axes) for axes in (inputs, outputs)
    ):
        raise ValueError(
            f"`fans` names an axis twice: {fans}. Only an axis of a diagonal map is input and output."
        )
