"""Which axes of a parameter are its inputs and which are its outputs: leaves as matrices.

A leaf is a map from its inputs to its outputs, and the features on both sides are of order one. The
right size of the leaf depends on the numbers of inputs and outputs alone: its fan-in and fan-out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gnlin.checks import is_integer, shows_signature
from gnlin.tree import Params, Tree

Axes = int | Sequence[int]


class _Axes(NamedTuple):
    """The four kinds of axes of one leaf."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...]
    index: tuple[int, ...]

    def exist_in(self, ndim: int) -> bool:
        return all(-ndim <= axis < ndim for axes in self for axis in axes)

    def from_the_front(self, ndim: int) -> "_Axes":
        """The same axes as numbers from 0 to ndim - 1."""
        return _Axes(*(tuple(axis % ndim for axis in axes) for axes in self))

    def are_distinct(self) -> bool:
        """Whether no axis is named twice. An input may also be an output, but nothing else."""
        if len(set(self.inputs)) < len(self.inputs) or len(set(self.outputs)) < len(self.outputs):
            return False
        maps = {*self.inputs, *self.outputs}
        named = len(maps) + len(self.batch) + len(self.index)
        return len({*maps, *self.batch, *self.index}) == named


@shows_signature
@dataclasses.dataclass(frozen=True)
class Fans:
    """The axes of a leaf, in the words of `jax.nn.initializers`.

    | leaf | shape | `Fans` |
    |---|---|---|
    | matrix of a dense layer, y = x W | (in, out) | ``Fans()``, the default |
    | kernel of a convolution over 2 or more dimensions | (..., in, out) | ``Fans()``, the default |
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

    Axes without a name are a receptive field, and they count among the inputs. So fan-in is
    in × field, the number of inputs of each output, and fan-out is out. (The initialisers of JAX
    multiply fan-out by the field as well.)

    Args:
        in_axis: axes of the inputs; () where there is one input of constant size, as for a bias.
        out_axis: axes of the outputs; () where there is one. Along an axis of both the inputs and
            the outputs the map is diagonal: feature i acts on feature i alone.
        batch_axis: axes that number separate maps, such as layers.
        index_axis: axes of which the input picks one entry, a one-hot input. The norm of such an
            input is one at every length, so the axis counts as one input. The norm of the map is
            that of its largest entry.

    Raises:
        TypeError: an axis is no integer.
        ValueError: an axis is named twice (except as input and output).

    Reference: Yang, Simon & Bernstein, arXiv 2310.17813, for the use of fan-in and fan-out.

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
            axes = _integers(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, axes)
        self._check_distinct(self._axes())

    def layout(self, shape: Sequence[int]) -> "Layout":
        """The stack of matrices that a leaf of this shape is.

        Raises:
            ValueError: the axes do not fit the shape.
        """
        if not self._axes().exist_in(len(shape)):
            raise ValueError(
                f"`fans` names axes that an array of shape {tuple(shape)} does not have: {self}. "
                "Pass a tree of Fans, one for each leaf"
            )
        axes = self._axes().from_the_front(len(shape))
        self._check_distinct(axes)
        diagonal = tuple(axis for axis in axes.inputs if axis in axes.outputs)
        columns = tuple(axis for axis in axes.outputs if axis not in diagonal)
        others = {*axes.outputs, *axes.batch, *axes.index}
        rows = tuple(axis for axis in range(len(shape)) if axis not in others)
        batch = tuple(sorted(axes.batch))

        def count(axes):
            return math.prod(shape[axis] for axis in axes)

        return Layout(
            shape=tuple(shape),
            batch_axes=batch,
            order=(*batch, *axes.index, *diagonal, *rows, *columns),
            stack=Stack(count(batch), count(axes.index + diagonal), count(rows), count(columns)),
            fan_in=count(diagonal + rows),
            fan_out=count(axes.outputs),
        )

    def _axes(self) -> _Axes:
        return _Axes(self.in_axis, self.out_axis, self.batch_axis, self.index_axis)  # pyright: ignore[reportArgumentType]

    def _check_distinct(self, axes: _Axes) -> None:
        if not axes.are_distinct():
            raise ValueError(
                f"`fans` names an axis twice: {self}. Only an axis of a diagonal map is both input "
                "and output."
            )


FansOf = Fans | Tree | Callable[[Params], Tree] | None


class Stack(NamedTuple):
    """The shape of a leaf as a stack of block-diagonal matrices."""

    matrices: int
    blocks: int  # of each matrix
    rows: int  # of each block: its inputs
    columns: int  # of each block: its outputs


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf as a stack of matrices. Each matrix is block-diagonal and maps rows to columns.

    The entries of an index, of which one acts at a time, are blocks as well. In both cases the norm
    of the matrix is the largest norm among its blocks.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    order: tuple[int, ...]  # the leaf's axes in the order of the stack
    stack: Stack
    fan_in: int
    fan_out: int

    @property
    def prescription(self) -> float:
        """√(fan-out / fan-in), the norm of a map between features of order one."""
        return math.sqrt(self.fan_out / max(self.fan_in, 1))  # an empty leaf has fan-in 0

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch_axes)

    def split(self, leaf: jax.Array) -> jax.Array:
        """The leaf as its stack, (matrices, blocks, rows, columns)."""
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
    """A tree of `Layout`s of the form of `params`.

    Raises:
        TypeError, ValueError: `fans` is no tree of `Fans` for these parameters, or does not fit a
            leaf; a leaf of three axes has none.
    """
    if not jax.tree.leaves(params):
        return params  # without leaves, such as the placeholder of optax.tree_map_params
    given = fans(params) if callable(fans) else fans
    leaves: list[tuple[str, Any, tuple[int, ...]]] = []

    def visit(path, each, part):
        for inner, leaf in jax.tree.leaves_with_path(part):
            leaves.append((jax.tree_util.keystr((*path, *inner)), each, np.shape(leaf)))

    try:
        jax.tree_util.tree_map_with_path(
            visit, given, params, is_leaf=lambda node: node is None or _is_fans(node)
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`fans` must be a gnlin.width.Fans, or a tree of them (None for the default) of the "
            f"form of the parameters or a prefix of it; got {given!r} for "
            f"{jax.tree.structure(params)}"
        ) from error
    # Not within the `try`: an error of a single leaf has a message of its own.
    return jax.tree.unflatten(jax.tree.structure(params), [layout_of(*each) for each in leaves])


def layout_of(name: str, fans: Fans | None, shape: tuple[int, ...]) -> Layout:
    """The layout of one leaf, `name` in messages; without `fans` the default for its axes."""
    if fans is None:
        fans = _default(name, shape)
    if not _is_fans(fans):
        raise TypeError(
            f"`fans` must hold gnlin.width.Fans, or None for the default; got {fans!r} at {name}"
        )
    try:
        return fans.layout(shape)
    except ValueError as error:
        raise ValueError(f"{error} (at {name})") from None


def _default(name: str, shape: tuple[int, ...]) -> Fans:
    """A number, a bias, a matrix, or the kernel of a convolution, by the number of axes."""
    if len(shape) == 0:
        return Fans((), ())
    if len(shape) == 1:
        return Fans((), -1)
    if len(shape) == 3:
        raise ValueError(
            f"`fans` must name the three axes of {name}, of shape {shape}: "
            "gnlin.width.Fans(batch_axis=0) for a stack of matrices (in, out), Fans() for the "
            "kernel of a one-dimensional convolution, Fans(0, (1, 2)) for attention's (in, heads, "
            "width), Fans((0, 1), 2) for its output's (heads, width, out)"
        )
    return Fans()


def _integers(name: str, given: Any) -> tuple[int, ...]:
    """An axis, or a sequence of axes, as a tuple."""
    axes = (given,) if is_integer(given) else given
    sequence = isinstance(axes, Sequence) and not isinstance(axes, str)
    if not sequence or not all(map(is_integer, axes)):
        raise TypeError(f"`{name}` must be an integer or a tuple of integers; got {given!r}")
    return tuple(int(axis) for axis in axes)


def _is_fans(node: Any) -> bool:
    return isinstance(node, Fans)
