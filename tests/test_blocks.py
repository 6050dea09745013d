"""Blocks against dense NumPy solves with the block-diagonal part of G, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from problems import classifier, full_steps

import gnlin

CG = gnlin.CG(max_iterations=200, rtol=1e-13)
DAMPING = 0.3


@functools.cache
def _problem():
    """In float64; one, so that a program compiled for it serves all tests."""
    params = {
        "first": {"w": oracles.normal(3, 4, seed=1), "b": oracles.normal(4, seed=2)},
        "last": (oracles.normal(4, 2, seed=3), None),
    }
    batch = {"x": oracles.normal(6, 3, seed=0), "y": jax.nn.one_hot(jnp.arange(6) % 2, 2)}

    def model(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["first"]["w"] + params["first"]["b"][None])
        return hidden @ params["last"][0]

    def loss(outputs, batch):
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * batch["y"], axis=-1))

    return gnlin.Objective(model, loss), params, batch


def _by_leaf(params):
    names = iter("abcdefgh")
    return jax.tree.map(lambda _: next(names), params)


# The second entry: blocks of the leaves first.b, first.w, last[0], in that order.
LABELS = {
    "one block": ("all", [0, 0, 0]),
    "one per leaf": (_by_leaf, [0, 1, 2]),
    "by top-level key": (lambda params: {name: name for name in params}, [0, 0, 1]),
    "prefix tree": ({"first": {"w": 1, "b": 2}, "last": 1}, [0, 1, 1]),
    "mask": ({"first": {"w": True, "b": False}, "last": (True, None)}, [0, 1, 1]),
}
each_labelling = pytest.mark.parametrize(("labels", "blocks"), LABELS.values(), ids=LABELS.keys())


def _flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def _solve(solver, scaling, rhs, state):
    """Direction, statistics and state of a solve; the gradient for a `rhs` of `None`."""
    objective, params, batch = _problem()

    @jax.jit
    def solve(params, batch, scaling, rhs, state):
        model = gnlin.quadratic_model(objective, params, batch)
        rhs = model.gradient() if rhs is None else rhs
        solution, state = solver.solve(model.system(DAMPING, scaling), rhs, state)
        return solution.direction, solution.stats, state

    return solve(params, batch, scaling, rhs, state)


def _expected(matrix, diagonal, blocks, params, rhs):
    member = np.repeat(blocks, [leaf.size for leaf in jax.tree.leaves(params)])
    matrix = np.where(member[:, None] == member, matrix, 0)
    return np.linalg.solve(matrix + DAMPING * np.diag(diagonal), _flat(rhs))


@each_labelling
@pytest.mark.parametrize(
    ("inner", "scaled"), [(gnlin.Dense(), False), (CG, True)], ids=["dense", "cg scaled"]
)
def test_block_diagonal_solve(x64, labels, blocks, inner, scaled):
    objective, params, batch = _problem()
    rhs = jax.tree.map(lambda leaf: jnp.sin(7.0 * leaf) + 0.3, params)
    scaling = jax.tree.map(lambda leaf: 1.0 + leaf**2, params) if scaled else None
    expected = _expected(
        oracles.ggn_matrix(objective, params, batch),
        1 + _flat(params) ** 2 if scaled else np.ones(len(_flat(params))),
        blocks,
        params,
        rhs,
    )
    solver = gnlin.Blocks(inner, labels)
    carry, stats = solver.init(params)
    step, new_stats, new_carry = _solve(solver, scaling, rhs, carry)
    np.testing.assert_allclose(_flat(step), expected, rtol=1e-8, atol=1e-10)
    assert jax.tree.structure((carry, stats)) == jax.tree.structure((new_carry, new_stats))
    assert new_stats[f"{type(inner).__name__.lower()}/converged"]


def test_a_solver_for_each_label_and_what_is_reported(x64):
    objective, params, batch = _problem()
    solvers = {
        "w": gnlin.CG(max_iterations=2, rtol=0.0),
        "b": gnlin.CG(max_iterations=3, rtol=0.0),
        "out": gnlin.Dense(),
    }
    labels = {"first": {"w": "w", "b": "b"}, "last": "out"}
    tx = full_steps(objective, DAMPING, solver=gnlin.Blocks(solvers, labels))
    _, state = jax.jit(lambda p, s: tx.update(None, s, p, batch=batch))(params, tx.init(params))
    found = gnlin.metrics(state)
    assert int(found["cg/iterations"]) == 5
    assert not found["cg/converged"]
    assert found["dense/converged"]
    alone = []  # one block of three solved, and its residual
    for label, solver in solvers.items():
        idle = {name: solver if name == label else _Idle() for name in solvers}
        blocks = gnlin.Blocks(idle, labels)
        alone.append(_solve(blocks, None, None, blocks.init(params)[0])[1])
    np.testing.assert_allclose(
        found["cg/residual"], max(each["cg/residual"] for each in alone[:2]), rtol=1e-6
    )
    assert [int(each["cg/iterations"]) for each in alone[:2]] == [2, 3]


class _Idle:
    def init(self, params):
        del params
        return (), {}

    def solve(self, system, rhs, carry):
        del system
        return gnlin.Solution(rhs, {}), carry


BLOCKS = gnlin.Blocks(
    gnlin.CG(max_iterations=4, warm_start=0.5),
    lambda params: {"hidden": "hidden", "readout": {"w": "out", "b": "out"}},
)
TRANSFORMS = {
    "scale_by_gauss_newton": lambda objective: gnlin.scale_by_gauss_newton(
        objective, 0.1, solver=BLOCKS
    ),
    "gauss_newton": lambda objective: gnlin.gauss_newton(
        objective, damping=gnlin.GainRatio(0.1), solver=BLOCKS
    ),
    "levenberg_marquardt": lambda objective: gnlin.levenberg_marquardt(objective, solver=BLOCKS),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("scale_by_gauss_newton", jnp.bfloat16),
        ("gauss_newton", jnp.bfloat16),
        ("gauss_newton", jnp.float32),
        ("levenberg_marquardt", jnp.float32),
    ],
)
def test_transforms_under_scan(name, dtype):
    problem = classifier()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), problem.params)
    tx, sign = TRANSFORMS[name](problem.objective), -0.3 if name.startswith("scale") else 1.0

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, batch=problem.batches[0])
        params = jax.tree.map(lambda p, u: (p + sign * u).astype(dtype), params, updates)
        return (params, state), problem.objective.value(params, problem.batches[0])

    _, losses = jax.jit(lambda start: jax.lax.scan(step, start, length=6))(
        (params, tx.init(params))
    )
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * problem.objective.value(params, problem.batches[0])


def test_kronecker_factors_within_blocks():
    problem = classifier()
    labels = {"hidden": "hidden", "readout": "out"}
    solvers = {
        "hidden": gnlin.Kronecker(),
        "out": gnlin.CG(max_iterations=2, preconditioner=gnlin.Kronecker()),
    }
    tx = gnlin.gauss_newton(problem.objective, solver=gnlin.Blocks(solvers, labels))
    state = tx.init(problem.params)
    update = jax.jit(lambda p, s, b: tx.update(None, s, p, batch=b))
    updates, after = update(problem.params, state, problem.batches[0])
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert gnlin.metrics(after)["accepted"]
    assert jnp.isfinite(ravel_pytree(updates)[0]).all()


def test_a_block_costs_what_lies_between_it_and_the_outputs():
    """Products for the last of four layers touch nothing below it."""
    sizes = (32, 32, 32, 32, 8)
    params = [
        0.1 * oracles.normal(i, o, seed=i).astype(jnp.float32) for i, o in itertools.pairwise(sizes)
    ]
    x = oracles.normal(64, 32, seed=9).astype(jnp.float32)

    def model(params, batch):
        for w in params[:-1]:
            batch = jnp.tanh(batch @ w)
        return batch @ params[-1]

    objective = gnlin.Objective(model, lambda z, batch: jnp.sum(z**2) / 2)

    def products(solver, labels):
        def run(params, x):
            model = gnlin.quadratic_model(objective, params, x)
            system = model.system(1.0)
            blocks = solver(labels)
            return blocks.solve(system, params, blocks.init(params)[0])[0].direction

        analysis = jax.jit(run).lower(params, x).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    def one(labels):
        return gnlin.Blocks({"on": _TwoProducts(), "off": _Idle()}, labels)

    last, whole = products(one, ["off", "off", "off", "on"]), products(one, "on")
    layer = 2 * 64 * 32
    forward = layer * (3 * 32)  # what lies below the last layer is still evaluated once
    assert last <= forward + 2 * 2 * layer * 8 + 20 * 64 * 32 * 3
    assert whole > 2 * last


class _TwoProducts:
    def init(self, params):
        del params
        return (), {}

    def solve(self, system, rhs, state):
        return gnlin.Solution(system.matvec(system.matvec(rhs)), {}), state


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            {"hidden": "a"},
            ValueError,
            "`labels` must be a tree of labels of the form of `params`, or a prefix",
        ),
        (None, ValueError, "`labels` must be a tree of labels of the form of `params`"),
        (lambda params: {"w": 1}, ValueError, r"`labels` must be .*; got {'w': 1} for PyTreeDef"),
        (np.zeros(2), TypeError, "`labels` must be strings, numbers or flags; got array"),
    ],
    ids=["missing", "None", "function", "array"],
)
def test_labels_that_do_not_fit(labels, error, message):
    with pytest.raises(error, match=message):
        gnlin.Blocks(CG, labels).init(classifier().params)


def test_solvers_that_do_not_fit():
    for solver in ("cg", gnlin.CG, {"a": 3}):
        with pytest.raises(TypeError, match=r"`solver` must be a (solver record|record, not its)"):
            gnlin.Blocks(solver, "a")
    with pytest.raises(
        ValueError, match=r"`solver` must have a record for every label; got \['b'\], without 'a'"
    ):
        gnlin.Blocks({"b": CG}, "a").init(classifier().params)
