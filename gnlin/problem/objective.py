"""The problem: a model and a convex loss of its outputs, with the checks on both.

Every other module reads the problem through `Objective.outputs_and_aux` and `Objective.loss_of`.
These two call the functions of the user and check their results.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import shows_signature
from gnlin.tree import Batch, Outputs, Params


@shows_signature
@dataclasses.dataclass(frozen=True)
class Objective:
    r"""The training problem :math:`\ell(f(\theta, \text{batch}), \text{batch})`.

    Both functions receive the whole batch. Masks, example weights, dropout keys and frozen batch
    statistics travel in it. The loss owns all averaging: nothing else in the package divides by a
    number of examples. Automatic differentiation supplies every derivative, so any convex loss
    serves.

    The record is hashable, so it may be a static argument of `jax.jit`. It is not callable, because
    `optax.inject_hyperparams` takes callables for schedules.

    Args:
        model: ``model(params, batch) -> outputs``, any pytree of real floating arrays, for instance
            logits (N, C) or (N, T, C). With `has_aux`, ``model(params, batch) -> (outputs, aux)``.
        loss: ``loss(outputs, batch) -> scalar``, convex in `outputs`.
        has_aux: whether `model` returns auxiliary data beside its outputs.
        is_bound: whether `model` and `loss` hold the data already, so that no `batch` is needed.
            `bind` and `least_squares` set it.

    Raises:
        TypeError: `model` or `loss` is no function.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective(
        ...     model=lambda params, batch: batch["x"] @ params["w"],
        ...     loss=lambda outputs, batch: 0.5 * jnp.mean((outputs - batch["y"]) ** 2),
        ... )
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 3.0])}
        >>> float(objective.value({"w": jnp.zeros(2)}, batch))
        2.5
    """

    model: Callable[..., Any]
    loss: Callable[..., Any]
    has_aux: bool = dataclasses.field(default=False, kw_only=True)
    is_bound: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        for name in ("model", "loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"`{name}` must be a function; got {getattr(self, name)!r}")

    @classmethod
    def least_squares(cls, residuals: Callable[..., Any]) -> "Objective":
        r"""Objective :math:`\tfrac12\sum_i r_i(\theta)^2` over all leaves of the residuals.

        Args:
            residuals: ``residuals(params, batch) -> pytree``. With the one argument
                ``residuals(params)`` the objective is already bound to its data. Arguments with a
                default are data, unless named ``batch``.

        Raises:
            TypeError: `residuals` is no function.

        Example:
            >>> import gnlin, jax.numpy as jnp
            >>> rosenbrock = gnlin.Objective.least_squares(
            ...     lambda p: jnp.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]]))
            >>> float(rosenbrock.value(jnp.array([-1.0, 1.0])))
            2.0
        """
        if not callable(residuals):
            raise TypeError(f"`residuals` must be a function; got {residuals!r}")
        if _positional_count(residuals) == 1:
            return cls(_WithoutBatch(residuals), half_sum_of_squares, is_bound=True)
        return cls(residuals, half_sum_of_squares)

    def value(self, params: Params, batch: Batch = None) -> jax.Array:
        """Loss at `params`, a scalar; auxiliary data is dropped.

        Optax's line searches take it as it is:
        ``tx.update(..., value_fn=objective.value, batch=batch)``.
        """
        outputs, _ = self.outputs_and_aux(params, batch)
        return self.loss_of(outputs, batch)

    def value_and_grad(self, params: Params, batch: Batch = None) -> tuple[Any, Params]:
        """Loss and gradient; the first is ``(loss, aux)`` with `has_aux`, as in JAX."""

        def value_and_aux(params):
            outputs, aux = self.outputs_and_aux(params, batch)
            return self.loss_of(outputs, batch), aux

        (value, aux), grads = jax.value_and_grad(value_and_aux, has_aux=True)(params)
        return ((value, aux), grads) if self.has_aux else (value, grads)

    def bind(self, batch: Batch) -> "Objective":
        """The same objective with its data closed over; it needs no `batch` and ignores one.

        Bound objectives serve drivers that pass parameters alone (`jaxopt.OptaxSolver`,
        `optax.lookahead`). Where the data is a traced argument, bind inside the compiled function.

        Raises:
            ValueError: the objective is bound already.
        """
        if self.is_bound:
            raise ValueError(
                "`bind`: this objective is bound to its data already; "
                "bind the one without data instead."
            )
        return dataclasses.replace(
            self, model=_Bound(self.model, batch), loss=_Bound(self.loss, batch), is_bound=True
        )

    # The functions of the user, checked.

    def outputs_and_aux(self, params: Params, batch: Batch = None) -> tuple[Outputs, Any]:
        """``(outputs, aux)`` of the model; `aux` is `None` without `has_aux`."""
        self.check_params(params)
        self.check_batch(batch)
        outputs, aux = _call("model", self.model, params, batch), None
        if self.has_aux:
            if not (isinstance(outputs, tuple) and len(outputs) == 2):
                raise TypeError("`model` must return the pair (outputs, aux) when has_aux=True")
            outputs, aux = outputs
        for path, leaf in jax.tree.leaves_with_path(outputs):
            dtype = jnp.result_type(leaf)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"`model` must return real floating arrays; outputs{jax.tree_util.keystr(path)}"
                    f" has dtype {dtype}. Return other data as aux (has_aux=True)."
                )
        return outputs, aux

    def loss_of(self, outputs: Outputs, batch: Batch = None) -> jax.Array:
        """The loss as a function of the outputs."""
        value = jnp.asarray(_call("loss", self.loss, outputs, batch))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"`loss` must return one real scalar; got shape {value.shape} and dtype "
                f"{value.dtype}. Average or sum over examples inside `loss`."
            )
        return value

    def check_params(self, params: Params) -> None:
        check_params(params, allow_holes=getattr(self.model, "fills_holes", False))

    def check_batch(self, batch: Batch) -> None:
        if batch is None and not self.is_bound:
            raise ValueError(
                "`batch` is missing: pass batch=... "
                "(to update: tx.update(grads, opt_state, params, batch=batch)), "
                "or close over the data with objective.bind(batch)."
            )


def half_sum_of_squares(residuals: Outputs, batch: Batch = None) -> jax.Array:
    r""":math:`\tfrac12\sum_i r_i^2`, accumulated in at least float32."""
    del batch
    return tree.inner(residuals, residuals) / 2


# Data inside an objective.


# Compared by identity, for a batch of arrays has no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class _Bound:
    """A function of (argument, batch) with its batch closed over."""

    function: Callable[..., Any]
    batch: Batch

    def __call__(self, argument, batch=None):
        del batch
        return self.function(argument, self.batch)


# Compared by its function: `jax.jit` then compiles once for objectives of the same residuals.
@dataclasses.dataclass(frozen=True)
class _WithoutBatch:
    """A function of one argument that takes a batch and ignores it."""

    function: Callable[..., Any]

    def __call__(self, argument, batch=None):
        del batch
        return self.function(argument)


def without_binding(objective: Objective, batch: Batch) -> tuple[Objective, Batch]:
    """``(objective as a function of data, the data)``, with the data that `bind` closed over."""
    model, loss = objective.model, objective.loss
    if not (isinstance(model, _Bound) and isinstance(loss, _Bound)):
        return objective, batch
    free = dataclasses.replace(objective, model=model.function, loss=loss.function, is_bound=False)
    return free, model.batch


# Checks.


def check_objective(objective: Any) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"`objective` must be a gnlin.Objective(model, loss); got {objective!r}")


def check_not_bound(name: str, objective: Objective, data: Batch) -> None:
    if objective.is_bound and data is not None:
        raise ValueError(
            f"`{name}` needs an objective without data of its own; this one is bound to its batch. "
            f"Leave `{name}` out, or pass the objective as it was before `bind`"
        )


def check_params(params: Params, *, allow_holes: bool = False) -> None:
    """Raise unless `params` is a tree of real floating leaves; holes must be allowed for."""
    if params is None:
        raise ValueError(
            "`params` is missing: call tx.update(grads, opt_state, params, batch=batch)."
        )
    # A hole is an empty subtree, and would be passed over below.
    if not allow_holes and tree.has_holes(params):
        raise ValueError(
            "`params` has optax.MaskedNode holes (from optax.masked or optax.partition), so the "
            "model cannot be evaluated. Pass the whole tree: "
            "tx.update(grads, opt_state, params, batch=batch, all_params=params)."
        )
    for path, leaf in jax.tree.leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        # A Python number has no dtype that updates could keep.
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} is {leaf!r}; make it an array, jnp.asarray({leaf!r}).")
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} has dtype {dtype}; every parameter must be a real floating array. "
                "Keep integers in the batch, and split complex numbers into two real leaves."
            )


def check_like_params(name: str, value: Any, params: Params, remedy: str) -> None:
    """Raise unless `value` has the tree structure and the shapes of `params`."""
    # The structure first: `jax.tree.map` on two different ones has an error of its own.
    same = jax.tree.structure(value) == jax.tree.structure(params)
    if same and jax.tree.map(jnp.shape, value) == jax.tree.map(jnp.shape, params):
        return
    raise ValueError(
        f"`{name}` does not match `params`; {remedy}.\n"
        f"  {name}: {_shapes(value)}\n  params: {_shapes(params)}"
    )


def _positional_count(function: Callable[..., Any]) -> int | None:
    """Number of positional parameters that have no default or are named ``batch``.

    `None` where the signature cannot be read.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    # An argument with a default is data, as ``lambda p, x=x: ...`` has it; `batch` is not.
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and (p.default is p.empty or p.name == "batch") for p in parameters)


def _call(name: str, function: Callable[..., Any], argument: Any, batch: Batch) -> Any:
    """Call `model` or `loss`; a shape or type error inside it then names the shapes it met."""
    try:
        return function(argument, batch)
    except (TypeError, ValueError, KeyError) as error:
        # A traced value that is used as a Python one has a message of its own.
        if isinstance(error, jax.errors.JAXTypeError):
            raise
        first = "params" if name == "model" else "outputs"
        raise ValueError(
            f"`{name}({first}, batch)` failed: {type(error).__name__}: {error}\n"
            f"  {first}: {_shapes(argument)}\n  batch: {_shapes(batch)}\n"
            f"Make the names and shapes in `batch` agree with each other and with those that "
            f"`{name}` expects."
        ) from error


def _shapes(data: Any) -> str:
    """``['w'] float32[3, 4], ...`` for the arrays of a tree."""
    described = [
        f"{jax.tree_util.keystr(path) or 'array'} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(data)
        if hasattr(leaf, "dtype")
    ]
    return ", ".join(described) or "(no arrays)"
