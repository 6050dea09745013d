"""How far to go along the direction of a solver: step rules.

The default rule takes the best step in the plane of the direction and the last step, as the
linearised model sees it. `gauss_newton` hands a rule the `Search` of an update. The `Step` goes on
to the trial in `damping`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import chex
import jax
import jax.numpy as jnp

from gnlin import tree
from gnlin.checks import check_part, check_positive, shows_signature
from gnlin.problem.curvature import LOSS_MODELS, QuadraticModel, check_loss_model
from gnlin.problem.objective import Objective
from gnlin.solve.protocols import Stats
from gnlin.transforms.gain import resolution
from gnlin.transforms.memory import Last
from gnlin.tree import Batch, Params


class Search(NamedTuple):
    """One update, as a step rule sees it.

    Attributes:
        objective: the problem; at the parameters ``model.linear.anchor``.
        batch: the data of the curvature.
        model: the quadratic model of the loss on this data.
        damping: λ.
        direction: d, the solver's direction for the right-hand side; it leads uphill.
        rhs: the incoming updates u, the gradient where there were none.
        rate: the learning rate of this update.
        last: what is known of the last update, where the transform keeps a memory of it.
    """

    objective: Objective
    batch: Batch
    model: QuadraticModel
    damping: jax.Array
    direction: Params
    rhs: Params
    rate: chex.Numeric
    last: Last | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """The choice of a step rule.

    Attributes:
        step: δ, to be added to the parameters.
        change: predicted change of the loss by δ, damping aside.
        sound: whether all inputs of the choice were finite.
        stats: flat dictionary of scalars.
        state: the rule's next state, before it remembers the step that was taken; `None` leaves it.
        modelled: whether `change` is of the model, and no guess.
        length: ‖δ‖, where the rule has it at hand.
    """

    step: Params
    change: jax.Array
    sound: jax.Array | bool = True
    stats: Stats = dataclasses.field(default_factory=dict)
    state: Any = None
    modelled: jax.Array | bool = True
    length: jax.Array | None = None


@runtime_checkable
class StepRule(Protocol):
    """A frozen record that turns a direction into a step.

    Example:
        >>> import dataclasses, gnlin, jax.numpy as jnp, optax
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fraction:   # a fixed part of the solver's direction
        ...     length: float = 0.5
        ...     def init(self, params):
        ...         return (), {}
        ...     def choose(self, search, state):
        ...         length = -self.length * search.rate
        ...         step = optax.tree.scale(length, search.direction)
        ...         return gnlin.Step(step, search.model.change(step))
        ...     def remember(self, state, taken):
        ...         return state
        >>> objective = gnlin.Objective.least_squares(lambda p: p - 2.0)
        >>> tx = gnlin.gauss_newton(objective, damping=0.0, solver=gnlin.CG(), step=Fraction())
        >>> tx.update(None, tx.init(jnp.zeros(1)), jnp.zeros(1))[0]   # half of the way to 2
        Array([1.], dtype=float32)
    """

    def init(self, params: Params) -> tuple[Any, Stats]:
        """``(state, stats)`` before the first step."""
        ...

    def choose(self, search: Search, state: Any) -> Step:
        """The step, with `search.rate` applied."""
        ...

    def remember(self, state: Any, taken: Params) -> Any:
        """The next state, after the step that was taken: zeros where it was refused."""
        ...


def check_step_rule(step: Any) -> None:
    if step is None:
        raise TypeError(
            "`step` must be a step rule such as gnlin.Subspace(). For full steps write "
            "optax.chain(gnlin.scale_by_gauss_newton(objective, damping), "
            "optax.scale_by_learning_rate(1.0))"
        )
    check_part("step", step, ("init", "choose", "remember"), "a step rule", "gnlin.Subspace()")


def returned_step(step: Any) -> Step:
    if not isinstance(step, Step):
        raise TypeError(f"`step.choose` must return a gnlin.Step; got {type(step).__name__}")
    return step


@shows_signature
@dataclasses.dataclass(frozen=True)
class Subspace:
    r"""Step length, and momentum, from the linearised model.

    With d the direction of a solver and p the last step, α and β minimise

    .. math:: \ell\big(f(\theta) + J\delta\big) + (u - \nabla\ell)^\top \delta
              + \tfrac{\lambda}{2} \|\delta\|^2, \qquad \delta = -\alpha d + \beta p,

    where u are the incoming updates. For a convex loss this is a convex problem in two unknowns. It
    costs one push-forward of d and one of p (0.6 gradients each) and a few evaluations of the loss
    on known outputs.

    With ``loss_model="quadratic"`` the loss is its second-order expansion, and α and β are in
    closed form. The curvature of a softmax vanishes where predictions are confident. There the
    expansion promises too much, and the exact loss does not.

    Metrics: ``subspace/length``, α, and ``subspace/momentum``, β. They are negative where the
    direction leads uphill (that of another batch, for example), and as large as the direction is
    short.

    Args:
        momentum: whether p takes part. The state then has one vector.
        loss_model: ``"exact"`` or ``"quadratic"``.
        max_norm: longest ‖δ‖; a longer step is shortened to it. `None` for no bound.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Reference: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature, 2015, sections 6.4 and 7 (with the quadratic model).

    Example:
        >>> import gnlin
        >>> gnlin.Subspace(momentum=False)
        Subspace(momentum=False, loss_model='exact', max_norm=None)
    """

    momentum: bool = True
    loss_model: str = "exact"
    max_norm: float | None = None

    def __post_init__(self):
        if not isinstance(self.momentum, bool):
            raise TypeError(f"`momentum` must be True or False; got {self.momentum!r}")
        check_loss_model(self.loss_model)
        if self.max_norm is not None:
            check_positive("max_norm", self.max_norm)

    def init(self, params: Params) -> tuple[Any, Stats]:
        return (tree.zeros_like(params) if self.momentum else ()), _stats(jnp.zeros([2]))

    def remember(self, state: Any, taken: Params) -> Any:
        return taken if self.momentum else state

    def choose(self, search: Search, state: Any) -> Step:
        rhs, dtype = search.rhs, tree.accumulation_dtype(search.rhs)
        # δ = w₁ (−d) + w₂ p: the direction leads uphill.
        candidates = [tree.scale(-1, search.direction)]
        if self.momentum:
            candidates.append(state)
        directions, units = zip(*(_of_unit_size(each, dtype) for each in candidates), strict=True)
        span = _span(search, directions, dtype)
        weights, change = best_weights(search, span, self.loss_model)
        if self.max_norm is not None:
            length = jnp.sqrt(jnp.maximum(weights @ span.gram @ weights, 0))
            weights = weights * jnp.minimum(1, self.max_norm / jnp.where(length > 0, length, 1))
        step = tree.cast_like(_combined(weights, directions), rhs)
        usable = jnp.all(jnp.isfinite(weights)) & tree.all_finite(step)
        step, weights = tree.select(usable, (step, weights), tree.zeros_like((step, weights)))
        return Step(
            step,
            change=jnp.where(usable, change(weights), 0),
            sound=jnp.all(jnp.isfinite(span.slopes)),
            # In units of d and p. β is 0 where p takes no part.
            stats=_stats(jnp.append(weights / jnp.stack(units), 0)[:2]),
        )


class Span(NamedTuple):
    """One or two directions dᵢ, and all that the loss along them needs."""

    images: Sequence[Any]  # J dᵢ
    slopes: jax.Array  # (u − ∇ℓ)ᵀdᵢ: the gradient is in the loss already, other updates are not
    gram: jax.Array  # <dᵢ, dⱼ>


def _span(search: Search, directions: Sequence[Params], dtype) -> Span:
    images, slopes = [], []
    for direction in directions:
        images.append(search.model.linear.jvp(tree.cast_like(direction, search.rhs)))
        slopes.append(excess_slope(search, images[-1], tree.inner(search.rhs, direction), dtype))
    gram = jnp.stack([jnp.stack([tree.inner(a, b) for b in directions]) for a in directions])
    return Span(images, jnp.stack(slopes), gram)


def excess_slope(search: Search, image: Any, along_updates: jax.Array, dtype) -> jax.Array:
    """(u − ∇ℓ)ᵀd from uᵀd and Jd, because ∇ℓᵀd = <∂ℓ/∂z, Jd>."""
    along_gradient = tree.inner(search.model.cotangent, image)
    return along_updates.astype(dtype) - along_gradient.astype(dtype)


def best_weights(
    search: Search, span: Span, loss_model: str
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """``(w, w ↦ change of the loss)``: Σ wᵢ dᵢ is the step, with the learning rate applied."""
    dtype = span.gram.dtype
    loss = LOSS_MODELS[loss_model](search.objective, search.model.linear.outputs, search.batch)
    value = jnp.asarray(search.model.value, dtype)
    damping = jnp.asarray(search.damping, dtype)

    def change(weights):
        # Jδ is a combination of known outputs, so no evaluation passes through the network.
        after = loss(_combined(weights, span.images))[0].astype(dtype)
        return after - value + span.slopes @ weights

    def damped(weights):
        # ½ λ ‖δ‖², with ‖δ‖² from the inner products of the directions.
        return change(weights) + damping * weights @ span.gram @ weights / 2

    # The quadratic model's second evaluation only confirms the first.
    evaluations = 10 if loss_model == "exact" else 1
    finest = resolution(search.model.value).astype(dtype)
    weights = _minimise(damped, len(span.images), dtype, evaluations, finest)
    # The rate scales the whole step, and `change` is that of the scaled one.
    return weights * jnp.asarray(search.rate, dtype), change


def _of_unit_size(vector: Params, dtype) -> tuple[Params, jax.Array]:
    """``(v / max |v|, max |v|)``: at large λ the squares of a direction's entries would vanish."""
    size = tree.max_abs(vector)
    unit = jnp.where(size > 0, size, 1).astype(dtype)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, vector), unit


def _combined(weights: jax.Array, trees: Sequence[Any]) -> Any:
    """Σ wᵢ tᵢ, in the dtypes of the trees."""
    return jax.tree.map(
        lambda *parts: sum(w.astype(p.dtype) * p for w, p in zip(weights, parts, strict=True)),
        *trees,
    )


class _Newton(NamedTuple):
    """Newton's method in one or two unknowns."""

    weights: jax.Array  # the best so far
    value: jax.Array  # of the function there
    step: jax.Array  # Newton's from there
    decrement: jax.Array  # decrease that the slope promises for it
    length: jax.Array  # fraction of it that is tried
    count: jax.Array  # evaluations


def _minimise(
    function, count: int, dtype, evaluations: int, resolution: chex.Numeric = 0.0
) -> jax.Array:
    """Minimise a smooth convex function of one or two numbers that is 0 at zero, from there.

    A step that leads up by more than `resolution` is shortened. This is the resolution of the
    values of the function. Below it the slope decides, which is accurate for longer than the values
    are.
    """
    eps = float(jnp.finfo(dtype).eps)
    axes = jnp.eye(count, dtype=dtype)

    def newton(weights):
        """``(value, Newton's step, decrement)``."""
        # One trace gives value, slope and Hessian: its rows are pull-backs of the slope.
        (value, slope), pull_back = jax.vjp(jax.value_and_grad(function), weights)
        hessian = jax.vmap(lambda axis: pull_back((jnp.zeros_like(value), axis))[0])(axes)
        # Directions may differ in curvature by orders of magnitude, may be parallel, may be zero. A
        # diagonal of ones deals with the first, and the jitter with the second.
        size = jnp.abs(jnp.diagonal(hessian))
        scale = jnp.sqrt(jnp.where(size > jnp.finfo(dtype).tiny, size, 1))
        relative = hessian / jnp.outer(scale, scale)
        step = -_solve_unit_diagonal(relative, slope / scale, 10 * eps) / scale
        return value, jnp.where(jnp.all(jnp.isfinite(step)), step, 0), -slope @ step

    def unfinished(now):
        # The end comes where Newton promises less than a thousandth of the change so far.
        return (now.count < evaluations) & (now.decrement > 1e-3 * jnp.abs(now.value))

    def turn(now):
        trial = now.weights + now.length * now.step
        value, step, decrement = newton(trial)
        # Exact, where the evaluation at zero has rounding.
        value = jnp.where(now.count == 0, 0, value)
        good = value <= now.value + resolution  # false for NaN
        length = jnp.where(good, 1, now.length / 4)
        after = _Newton(trial, value, step, decrement, length, now.count + 1)
        before = now._replace(length=length, count=now.count + 1)
        return tree.select(good, after, before)

    zero = jnp.zeros([count], dtype)
    if evaluations == 1:
        return newton(zero)[1]
    # The first turn evaluates at zero: compiled once, and not once more before the loop.
    one = jnp.ones([], dtype)
    first = _Newton(zero, 0 * one, zero, jnp.inf * one, one, jnp.zeros([], jnp.int32))
    return jax.lax.while_loop(unfinished, turn, first).weights


def _solve_unit_diagonal(matrix: jax.Array, rhs: jax.Array, jitter: float) -> jax.Array:
    """Solve with a symmetric matrix of one or two rows that has ones on its diagonal.

    `jitter` is added to the diagonal.
    """
    diagonal = 1 + jitter
    if len(rhs) == 1:
        return rhs / diagonal
    # The eigenvectors are (1, 1) and (1, −1).
    along, across = (rhs[0] + rhs[1]) / 2, (rhs[0] - rhs[1]) / 2
    along, across = along / (diagonal + matrix[0, 1]), across / (diagonal - matrix[0, 1])
    return jnp.stack([along + across, along - across])


def _stats(weights: jax.Array) -> Stats:
    return {
        "subspace/length": jnp.asarray(weights[0], float),
        "subspace/momentum": jnp.asarray(weights[1], float),
    }
