import dataclasses
import importlib.metadata
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnlin.compare.entrants import peers, requirements
from gnlin.compare.runs.cost import flops
from gnlin.compare.runs.meter import metered
from gnlin.compare.tasks.handwriting import digits
from gnlin.compare.tasks.regression import diabetes


@pytest.fixture(autouse=True)
def _third_party():
    """The peers are written for the usual promotion of dtypes and shapes."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def narrow(task, size):
    """The same task with few examples, full batch, and a narrow network."""

    def init(key):
        widths = [
            leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(task.init, key)) if leaf.ndim == 2
        ]
        sizes = [widths[0][0], 6, widths[-1][1]]
        keys = jax.random.split(key)
        weights = [
            jax.random.normal(k, s) / np.sqrt(s[0])
            for k, s in zip(keys, itertools.pairwise(sizes), strict=True)
        ]
        return [{"w": w, "b": jnp.zeros(w.shape[1])} for w in weights]

    train = jax.tree.map(lambda leaf: leaf[:size], task.train)
    return dataclasses.replace(task, init=init, train=train, batch_size=None)


REGRESSION, CLASSIFICATION = narrow(diabetes(), 30), narrow(digits(), 24)
PARAMETERS = sum(leaf.size for leaf in jax.tree.leaves(REGRESSION.init(jax.random.key(0))))


def check(build, task, options, count=8, fall=0.7):
    """The loss falls; gradient-equivalents of each step of a run that is compiled whole, the tuned
    number traced.
    """
    fixed = {name: value for name, value in options.items() if isinstance(value, str)}
    tuned = {name: jnp.float32(value) for name, value in options.items() if name not in fixed}
    params, key, batch = (
        task.init(jax.random.key(0)),
        jax.random.key(1),
        jax.tree.map(jnp.asarray, task.train),
    )
    state = jax.eval_shape(
        lambda tuned: build(task, {**fixed, **tuned}).init(params, batch, key), tuned
    )
    meter = metered(
        lambda tuned, *rest: build(task, {**fixed, **tuned}).step(*rest),
        tuned,
        params,
        state,
        batch,
        key,
    )

    @jax.jit
    def run(tuned):
        def one(carry, key):
            (params, state), more = meter.call(tuned, *carry, batch, key)
            return (params, state), (task.objective.value(params, batch), more)

        carry = params, build(task, {**fixed, **tuned}).init(params, batch, key)
        return jax.lax.scan(one, carry, jax.random.split(key, count))[1]

    losses, more = run(tuned)
    assert np.isfinite(losses).all()
    assert losses[-1] < fall * float(task.objective.value(params, batch))
    return (meter.flops + np.asarray(more)) / flops(task.objective.value_and_grad, params, batch)


# Least squares.


def test_optimistix_levenberg_marquardt():
    costs = check(peers.optimistix_lm, REGRESSION, {"damping": 0.1, "solver": "cg"})
    assert (
        (costs > 5) & (costs < 1.6 * 100)
    ).all()  # products with JᵀJ, two and more, and a hundred at most


def test_optimistix_gauss_newton():
    costs = check(peers.optimistix_gn, REGRESSION, {"learning_rate": 0.25})
    np.testing.assert_allclose(
        costs, len(REGRESSION.train["y"]), rtol=0.2
    )  # a dense Jacobian, by rows


def test_jaxopt_levenberg_marquardt():
    costs = check(peers.jaxopt_lm, REGRESSION, {"damping": 0.1})
    assert ((costs > 5) & (costs < 3 * PARAMETERS)).all()


def test_jaxopt_gauss_newton():
    costs = check(peers.jaxopt_gn, REGRESSION, {})
    assert ((costs > 5) & (costs < 10 * 1.6 * PARAMETERS)).all()  # its bound on conjugate gradients


def test_least_squares_only():
    for unfit in (requirements.least_squares_unfit, requirements.jaxopt_unfit):
        assert unfit(REGRESSION) is None
        assert "least squares" in str(unfit(CLASSIFICATION))


def test_too_large_for_jaxopt():
    wide = dataclasses.replace(REGRESSION, init=lambda key: {"w": jnp.zeros(12000)})
    assert "120000 iterations" in str(
        requirements.jaxopt_unfit(
            dataclasses.replace(wide, residuals=lambda params, batch: batch["y"])
        )
    )


# Either loss.


@pytest.mark.parametrize(
    "unfit", [requirements.somax_unfit, requirements.somax_egn_unfit, requirements.kfac_unfit]
)
def test_fit_either_loss_and_not_another(unfit):
    assert unfit(REGRESSION) is None
    assert unfit(CLASSIFICATION) is None
    summed = dataclasses.replace(
        CLASSIFICATION.objective, loss=lambda z, batch: 2 * CLASSIFICATION.objective.loss(z, batch)
    )
    assert "cross-entropy" in str(unfit(dataclasses.replace(CLASSIFICATION, objective=summed)))


def test_residuals_without_examples_do_not_fit_kfac():
    assert "axis 0" in str(
        requirements.kfac_unfit(
            dataclasses.replace(REGRESSION, residuals=lambda params, batch: {"a": params, "b": 0})
        )
    )


@pytest.mark.parametrize(
    ("build", "control", "task"),
    [
        (peers.somax_sgn, "constant", REGRESSION),
        (peers.somax_sgn, "trust-region", CLASSIFICATION),
        (peers.somax_egn, "constant", REGRESSION),
        (peers.somax_egn, "constant", CLASSIFICATION),
    ],
    ids=["sgn-squared", "sgn-trust-region-softmax", "egn-squared", "egn-softmax"],
)
def test_somax(build, control, task):
    costs = check(build, task, {"learning_rate": 0.5, "damping": 0.1, "control": control})
    outputs = task.objective.model(task.init(jax.random.key(0)), task.train).size
    if build is peers.somax_sgn:
        assert (
            (costs > 19) & (costs < 33)
        ).all()  # twenty products, one to one and a half gradients each
    else:
        assert (
            (costs > 0.8 * outputs) & (costs < 2 * outputs)
        ).all()  # a row of the Jacobian for each output


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFICATION], ids=["squared", "softmax"])
def test_kfac(task):
    if (
        reason := requirements.kfac_absent()
    ) is not None:  # no release runs on this JAX, and the extra cannot ask for its source
        pytest.skip(reason)
    costs = check(peers.kfac, task, {"damping": 0.1}, count=12)
    often = np.median(costs)
    assert 3 < often < 10  # the gradient, its sampled twin, and products with the curvature
    assert max(costs) < 30  # inverses weigh much in so small a network
    # Inverses at steps 0, 5, 10; damping is adapted in steps 4 and 9.
    assert np.flatnonzero(costs > 1.001 * often).tolist() == [0, 4, 5, 9, 10]


# What is not there.


@pytest.mark.parametrize(
    ("absent", "remedy"),
    [
        (requirements.somax_absent, "pip install python-somax"),
        (requirements.kfac_absent, 'pip install "kfac-jax @ git+https://'),
        (requirements.optimistix_absent, "pip install optimistix"),
        (requirements.jaxopt_absent, "pip install jaxopt"),
    ],
)
def test_remedy_where_a_library_is_absent(absent, remedy, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert f"is not installed: {remedy}" in str(absent())
    assert "\n" not in str(absent())


def test_remedy_where_a_library_does_not_run(monkeypatch):
    def broken(name):
        raise AttributeError(name)

    requirements._error.cache_clear()
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: None if name == "somax" else "0.0.8"
    )
    monkeypatch.setattr(importlib, "import_module", broken)
    assert f"kfac-jax 0.0.8 does not run on JAX {jax.__version__} (AttributeError): pip" in str(
        requirements.kfac_absent()
    )
    assert "--upgrade python-somax" in str(requirements.somax_absent())
    requirements._error.cache_clear()


def test_the_other_somax_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert "pip uninstall somax" in str(requirements.somax_absent())


def test_peers_of_the_test_environment_are_there():
    assert requirements.optimistix_absent() is None
    assert requirements.jaxopt_absent() is None
