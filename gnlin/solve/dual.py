"""The damped system solved in function space, for fewer outputs than parameters.

A transform calls `Dual.solve`. The kernel matrix comes from `gnlin.kernel.gram`, `_factorise` makes
the formulas of `Dual` of it, and `_solve` refines their result. Batches with too many outputs go to
another solver, such as `cg`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from gnlin import tree
from gnlin.checks import check_integer, shows_signature
from gnlin.kernel.gram import inverse_of, kernel_matrix
from gnlin.problem.curvature import System
from gnlin.sharding import check_mesh
from gnlin.solve.protocols import Solution, Solver, Stats, check_solver
from gnlin.tree import Params


class DualState(NamedTuple):
    last: Any  # p, the last solution; () without momentum
    otherwise: Any  # state of the other solver


@shows_signature
@dataclasses.dataclass(frozen=True)
class Dual:
    r"""Direct solve in function space, for M = N·C outputs (a few thousand) and any number of
    parameters.

    With the kernel matrix :math:`K = J D^{-1} J^\top` (M × M) the system
    :math:`(J^\top H J + \lambda D) x = b` is solved for whatever b:

    .. math:: b = J^\top y + b', \qquad x = n + D^{-1} J^\top w, \qquad
              n = \tfrac1\lambda D^{-1} b', \qquad (HK + \lambda I)\, w = y - H J n.

    This holds for every y. `Dual` takes the least-squares fit, :math:`(K + \mu I) y = J D^{-1} b`
    with μ at the level of rounding. It leaves in b' only the part that no output sees, so nothing
    cancels as λ → 0. With y = 0 this is Woodbury's formula, which then loses all digits. Iterative
    refinement follows while the residual is above √ε and each refinement halves it. H need not be
    invertible.

    K is built layer by layer from activations and cotangents. Where the linearisation shows that
    each example's outputs depend on its own inputs, that takes C pull-backs. Otherwise (batch
    normalisation, embeddings) it takes one pull-back and one push-forward for each of the M
    outputs. For dense layers of width w the work in gradients is about

    .. math:: 5 + \frac{C}{3} + \frac{MC}{3w} + \frac{M^2 C}{6P},

    and that of k iterations of `CG` is :math:`1 + \tfrac43 k`. So function space is for few outputs
    per example, wide networks and small λ. A scaling D costs another :math:`MC/3`. Memory is about
    :math:`6 M^2` numbers.

    With `momentum` the direction is damped towards μ times the last solution p (SPRING):

    .. math:: (J^\top H J + \lambda D)\, x = b + \lambda \mu D p.

    This adds μp to n above. In directions that this batch does not see, x has the part that earlier
    batches found.

    Statistics: ``dual/residual`` (relative), ``dual/converged`` (residual at most √ε),
    ``dual/refinements`` and ``dual/pull_backs``, through the whole network, for K. A residual that
    is not even halved gives a zero step.

    Args:
        momentum: μ in [0, 1); with 0 the state holds no solution.
        max_outputs: largest M; memory and time grow as its square and cube.
        otherwise: solver for batches with more outputs than that, such as `CG`, whose iterates are
            the same in function space as in the space of parameters. `None` is an error.

    Raises:
        ValueError, TypeError: an argument is out of its range; at update: too many outputs.

    References: Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, section 2.2 and
    appendix A.3; Goldshlager, Abrahamsen & Lin, A Kaczmarz-inspired approach to accelerate the
    optimization of neural network wavefunctions (SPRING), arXiv 2401.10190.

    Example:
        >>> import gnlin, jax.numpy as jnp
        >>> objective = gnlin.Objective.least_squares(lambda p: jnp.array([[3.0, 4.0]]) @ p - 1.0)
        >>> tx = gnlin.scale_by_gauss_newton(objective, damping=1e-4, solver=gnlin.Dual())
        >>> params = jnp.zeros(2)
        >>> updates, _ = tx.update(None, tx.init(params), params)
        >>> [round(-float(x), 3) for x in updates]   # the shortest that solves the equation
        [0.12, 0.16]
    """

    momentum: float = 0.0
    max_outputs: int = 4096
    otherwise: Solver | None = None

    def __post_init__(self):
        # Only with momentum does the state hold p, and a traced μ cannot decide its form.
        if isinstance(self.momentum, bool | Tracer) or not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1); got {self.momentum!r}")
        check_integer("max_outputs", self.max_outputs)
        if self.otherwise is not None:
            check_solver("otherwise", self.otherwise)

    @property
    def direction_only(self) -> bool:
        """Whether the direction of `otherwise` has no length of its own."""
        return getattr(self.otherwise, "direction_only", False)

    def init(self, params: Params) -> tuple[DualState, Stats]:
        last = tree.zeros_like(params, tree.accumulation_dtype(params)) if self.momentum else ()
        state, stats = ((), {}) if self.otherwise is None else self.otherwise.init(params)
        return DualState(last, state), {**stats, **_stats(0.0, False)}

    def solve(
        self, system: System, rhs: Params, state: "DualState"
    ) -> tuple[Solution, "DualState"]:
        check_mesh(rhs)
        dtype = tree.accumulation_dtype(rhs)
        start = tree.scale(self.momentum, state.last) if self.momentum else None
        stats = {} if self.otherwise is None else self.otherwise.init(rhs)[1]
        count = tree.size(jax.eval_shape(system.jvp, rhs))
        if not isinstance(count, int):
            raise ValueError(
                f"the batch has {count} outputs, and the kernel matrix of `Dual` wants a number: "
                "export a step of one batch size, or take another solver, such as gnlin.CG()"
            )
        other_state = state.otherwise
        if count <= self.max_outputs:
            found, usable, own = _solve(system, rhs, start)
            stats = {**stats, **own}
        elif self.otherwise is not None:
            # The other solver knows no momentum, so it gets the whole right-hand side.
            total = _with_start(system, tree.cast(rhs, dtype), start)
            total = tree.cast_like(total, rhs)
            solution, other_state = self.otherwise.solve(system, total, other_state)
            found = tree.cast(solution.direction, dtype)
            stats = {**_stats(0.0, False), **solution.stats}
            usable = tree.all_finite(found)
        else:
            needed = 6 * count**2 * dtype.itemsize / 2**30
            raise ValueError(
                f"`max_outputs` is {self.max_outputs}, but the batch has {count} outputs, whose "
                f"kernel matrix and its factors take {needed:.3g} GiB: take a smaller batch (or a "
                "smaller `curvature_batch`), gnlin.CG() as the solver or as `otherwise`, or raise "
                "`max_outputs`"
            )
        direction = tree.select(usable, found, tree.zeros_like(found))
        last = tree.select(usable, found, state.last) if self.momentum else ()
        return Solution(tree.cast_like(direction, rhs), stats), DualState(last, other_state)


def _with_start(system: System, b: Params, start: Params | None) -> Params:
    """The right-hand side b + λDμp."""
    return b if start is None else tree.add_scaled(b, system.damping, system.scaled(start))


def _solve(system: System, rhs: Params, start: Params | None) -> tuple[Params, jax.Array, Stats]:
    """``(x, whether it is usable, statistics)``, x in the accumulation dtype."""
    dtype = tree.accumulation_dtype(rhs)
    size = tree.max_abs(rhs)
    # In these units intermediate results stay in range, whatever the size of the gradient.
    unit = jnp.where(size > 0, size, jnp.ones_like(size))
    b = tree.scale(1 / unit, tree.cast(rhs, dtype))
    start = start if start is None else tree.scale(1 / unit, start)
    total = _with_start(system, b, start)
    total_norm = tree.norm(total)
    # x is rounded to the dtypes of the parameters, and a residual cannot be smaller than that.
    rounding = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(rhs)), default=0.0)
    target = max(float(jnp.finfo(dtype).eps) ** 0.5, 8 * rounding)
    noise = max(100 * float(jnp.finfo(dtype).eps), 4 * rounding) * total_norm
    direct, pull_backs = _factorise(system, rhs, noise)

    def measured(x):
        # Of x as it will be returned, rounded. The product is that of the model, not that of K.
        residual = tree.subtract(total, tree.cast(system.matvec(tree.cast_like(x, rhs)), dtype))
        return residual, jnp.where(
            total_norm > 0, tree.norm(residual) / jnp.where(total_norm > 0, total_norm, 1), 0
        )

    def unfinished(now):
        return (now.relative > target) & now.halved & (now.count < MAX_REFINEMENTS)

    def refine(now):
        # Without p, which is in x already.
        x = tree.add(now.x, direct(now.residual, None))
        residual, relative = measured(x)
        after = _Refinement(x, residual, relative, relative < now.relative / 2, now.count + 1)
        # A refinement that makes it worse is dropped, and ends the loop.
        before = now._replace(halved=jnp.asarray(False), count=now.count + 1)
        return tree.select(relative < now.relative, after, before)

    x = direct(b, start)
    first = _Refinement(x, *measured(x), jnp.asarray(True), jnp.zeros([], jnp.int32))
    final = jax.lax.while_loop(unfinished, refine, first)
    x = tree.scale(unit, final.x)
    # A direction that leaves half of b unexplained is rounding errors, not a solution.
    usable = tree.all_finite(tree.cast_like(x, rhs)) & (final.relative < 0.5)
    converged = usable & (final.relative <= target)
    return (
        x,
        usable,
        _stats(jnp.where(usable, final.relative, 1.0), converged, final.count, pull_backs),
    )


# Each takes some four gradients. Where three have not brought the residual down to √ε, λ is below
# the resolution of K.
MAX_REFINEMENTS = 3


class _Refinement(NamedTuple):
    x: Params
    residual: Params  # b + λμDp − Ax, of x rounded
    relative: jax.Array  # norm of the residual over that of the right-hand side
    halved: jax.Array  # by the last refinement
    count: jax.Array


def _factorise(
    system: System, like: Params, noise: jax.Array
) -> tuple[Callable[[Params, Params | None], Params], int]:
    """``((b, μp) ↦ x, pull-backs that K took)``: the formulas of `Dual`, in the accumulation dtype.

    The part of b that no output sees counts as 0 where its norm is at most `noise`. It is then
    rounding, which 1/λ would amplify.
    """
    dtype = tree.accumulation_dtype(like)
    outputs, inverse = jax.eval_shape(system.jvp, like), inverse_of(system.scaling)
    damping = jnp.asarray(system.damping, dtype)
    # λ = 0 leaves no finite solution for b', which is dropped then.
    inverse_damping = jnp.where(damping > 0, 1 / jnp.where(damping > 0, damping, 1), 0)
    matrix, pull_backs = kernel_matrix(system.jvp, system.vjp, like, system.scaling)

    def forward(vector):
        return tree.flatten(system.jvp(tree.cast_like(vector, like)), dtype)

    def backward(cotangent):
        return tree.cast(system.vjp(tree.unflatten(cotangent, outputs)), dtype)

    def hessian(cotangent):
        return tree.flatten(system.output_hessian(tree.unflatten(cotangent, outputs)), dtype)

    def undamped(vector):  # D⁻¹v
        return (
            vector
            if inverse is None
            else jax.tree.map(lambda d, v: d.astype(dtype) * v, inverse, vector)
        )

    eps, identity = jnp.finfo(dtype).eps, jnp.eye(len(matrix), dtype=dtype)
    # HK: `vmap` goes over the rows of K, which are its columns.
    curved = jax.vmap(hessian)(matrix).T
    # The ridge is μ, and λ counts as `least` at least. K and HK are known to ε of their norms,
    # which their traces bound.
    of_kernel, of_curved = jnp.trace(matrix), jnp.trace(curved)
    ridge = jnp.where(of_kernel > 0, 3 * eps * of_kernel, 1)
    least = jnp.where(of_curved > 0, eps * of_curved, 1)
    # K is symmetric and HK is not.
    fit = jax.scipy.linalg.cho_factor(matrix + ridge * identity)
    inner = jax.scipy.linalg.lu_factor(curved + jnp.maximum(damping, least) * identity)

    def direct(b, start):
        y = jax.scipy.linalg.cho_solve(fit, forward(undamped(b)))
        # Rounded to the dtypes of the outputs: b' has to be left by the y that is pulled back.
        y = tree.flatten(tree.unflatten(y, outputs), dtype)
        unseen = tree.subtract(b, backward(y))  # b'
        # n, to which momentum adds μp.
        null = tree.scale(
            jnp.where(tree.norm(unseen) > noise, inverse_damping, 0), undamped(unseen)
        )
        null = null if start is None else tree.add(null, start)
        # (HK + λI) w = y − HJn
        w = jax.scipy.linalg.lu_solve(inner, y - hessian(forward(null)))
        return tree.add(null, undamped(backward(w)))

    return direct, pull_backs


def _stats(residual, converged, refinements=0, pull_backs=0) -> Stats:
    return {
        "dual/residual": jnp.asarray(residual, float),
        "dual/converged": jnp.asarray(converged, bool),
        "dual/refinements": jnp.asarray(refinements, jnp.int32),
        "dual/pull_backs": jnp.asarray(pull_backs, jnp.int32),
    }
