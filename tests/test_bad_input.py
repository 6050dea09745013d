"""Every mistake is an error that names the argument and says what to do, with or without `jit`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import classifier, linear_regression

import gnlin

PROBLEM, _ = linear_regression()
OBJECTIVE = PROBLEM.objective
BATCH = PROBLEM.batches[0]

TRANSFORMS = {
    "linearise_gradients": lambda objective: gnlin.linearise_gradients(objective, 3),
    "iterative_linearisation": lambda objective: gnlin.iterative_linearisation(
        optax.sgd(0.1), objective, 3
    ),
    "prox_linear": lambda objective: gnlin.prox_linear(optax.sgd(0.1), objective, 2),
    "scale_by_gauss_newton": lambda objective: gnlin.scale_by_gauss_newton(objective, 0.1),
    "gauss_newton": lambda objective: gnlin.gauss_newton(objective, damping=gnlin.GainRatio(0.1)),
    "levenberg_marquardt": lambda objective: gnlin.levenberg_marquardt(objective),
}

each_transform = pytest.mark.parametrize("build", TRANSFORMS.values(), ids=TRANSFORMS.keys())
with_and_without_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def update(build, objective, params, *, wrap=lambda f: f, state_of=None, **extras):
    """One update in which the arrays are traced if `wrap` is `jax.jit`."""
    tx = build(objective)
    opt_state = tx.init(params if state_of is None else state_of)
    return wrap(lambda params, opt_state, extras: tx.update(params, opt_state, params, **extras))(
        params, opt_state, extras
    )


# What update is given.


@with_and_without_jit
@each_transform
def test_missing_batch(build, wrap):
    with pytest.raises(
        ValueError, match=r"`batch` is missing: pass batch=.*objective\.bind\(batch\)"
    ):
        update(build, OBJECTIVE, PROBLEM.params, wrap=wrap)


@with_and_without_jit
@each_transform
def test_missing_params(build, wrap):
    tx = build(OBJECTIVE)
    with pytest.raises(
        ValueError, match=r"`params` is missing: call tx\.update\(grads, opt_state, params"
    ):
        wrap(lambda opt_state: tx.update(PROBLEM.params, opt_state, batch=BATCH))(
            tx.init(PROBLEM.params)
        )


@each_transform
@pytest.mark.parametrize("chained", [False, True], ids=["alone", "chained"])
def test_state_and_parameters_the_wrong_way_round(build, chained):
    tx = optax.chain(build(OBJECTIVE), optax.scale(1.0)) if chained else build(OBJECTIVE)
    opt_state, params = tx.init(PROBLEM.params), PROBLEM.params
    if chained:
        params = (params, params)  # a list of layers, so that the chain finds a state for each
    with pytest.raises(TypeError, match=r"the order is tx\.update\(grads, opt_state, params"):
        tx.update(PROBLEM.params, params, opt_state, batch=BATCH)


def test_parameters_may_have_a_field_called_metrics():
    class Network(NamedTuple):
        w: Any
        metrics: Any

    params = Network(jnp.ones(3), jnp.ones([]))
    objective = gnlin.Objective(lambda p, batch: batch["x"] @ p.w + p.metrics[None], OBJECTIVE.loss)
    tx = gnlin.gauss_newton(objective)
    updates, _ = tx.update(None, tx.init(params), params, batch=BATCH)
    assert isinstance(updates, Network)


@each_transform
def test_a_batch_without_its_name(build):
    tx = build(OBJECTIVE)
    with pytest.raises(TypeError, match=r"too many .*\. Write tx\.update\(updates, state, params"):
        tx.update(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.params, BATCH)


@with_and_without_jit
@pytest.mark.parametrize("name", ["scale_by_gauss_newton", "gauss_newton"])
@pytest.mark.parametrize("grads", [{"w": jnp.zeros(7)}, {"v": jnp.zeros(3)}], ids=["shape", "name"])
def test_gradients_of_other_parameters(name, grads, wrap):
    tx = TRANSFORMS[name](OBJECTIVE)
    message = (
        r"`updates` does not match `params`; pass the gradient at `params`\.\n"
        r"  updates: \['[wv]'\] float32"
    )
    with pytest.raises(ValueError, match=message):
        wrap(lambda grads: tx.update(grads, tx.init(PROBLEM.params), PROBLEM.params, batch=BATCH))(
            grads
        )


@with_and_without_jit
@pytest.mark.parametrize("name", ["linearise_gradients", "iterative_linearisation"])
@pytest.mark.parametrize(
    "others", [{"w": jnp.zeros(7)}, {"v": jnp.zeros(3)}], ids=["shape", "name"]
)
def test_state_of_other_parameters(name, others, wrap):
    with pytest.raises(
        ValueError, match=r"`opt_state` does not match `params`; call tx\.init\(params\)"
    ):
        update(TRANSFORMS[name], OBJECTIVE, PROBLEM.params, wrap=wrap, state_of=others, batch=BATCH)


@each_transform
def test_init_without_params(build):
    with pytest.raises(ValueError, match="`params` is missing"):
        build(OBJECTIVE).init(None)


@with_and_without_jit
@each_transform
def test_masked_parameters_without_the_whole_tree(build, wrap):
    params = {"w": jnp.ones(3), "b": jnp.zeros([])}
    objective = gnlin.Objective(lambda p, batch: batch["x"] @ p["w"] + p["b"][None], OBJECTIVE.loss)
    tx = optax.masked(build(objective), {"w": True, "b": False})
    opt_state = tx.init(params)
    with pytest.raises(
        ValueError, match=r"(?s)`params` has optax\.MaskedNode holes.*all_params=params"
    ):
        wrap(lambda params, opt_state: tx.update(params, opt_state, params, batch=BATCH))(
            params, opt_state
        )


@each_transform
def test_whole_tree_with_holes_of_its_own(build):
    """`mask_compatible_extra_args=True` would mask `all_params` too."""
    params = {"w": jnp.ones(3), "b": jnp.zeros([])}
    objective = gnlin.Objective(lambda p, batch: batch["x"] @ p["w"] + p["b"][None], OBJECTIVE.loss)
    tx = optax.masked(build(objective), {"w": True, "b": False}, mask_compatible_extra_args=True)
    with pytest.raises(
        ValueError, match=r"`all_params` has .*holes.*mask_compatible_extra_args=False"
    ):
        tx.update(params, tx.init(params), params, batch=BATCH, all_params=params)


def test_a_parameter_that_is_no_array():
    with pytest.raises(
        TypeError, match=r"params\['w'\] is 1.0; make it an array, jnp.asarray\(1.0\)"
    ):
        gnlin.gauss_newton(OBJECTIVE, damping=0.1).init({"w": 1.0})


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3), jnp.ones(3, jnp.complex64), jnp.ones(3, bool)],
    ids=lambda a: str(a.dtype),
)
@each_transform
def test_parameters_that_are_not_real_floats(build, leaf):
    params = {"w": jnp.ones(3), "extra": (leaf,)}
    remedy = (
        rf"params\['extra'\]\[0\] has dtype {leaf.dtype}.*real floating.*batch.*two real leaves"
    )
    with pytest.raises(TypeError, match=remedy):
        build(OBJECTIVE).init(params)
    with pytest.raises(TypeError, match=remedy):
        update(build, OBJECTIVE, params, state_of=PROBLEM.params, batch=BATCH)


# What the objective returns.


@with_and_without_jit
@each_transform
def test_loss_that_is_no_scalar(build, wrap):
    per_example = gnlin.Objective(
        OBJECTIVE.model, lambda outputs, batch: (outputs - batch["y"]) ** 2
    )
    with pytest.raises(
        ValueError, match=r"`loss` must return one real scalar; got shape \(8,\).*[Aa]verage or sum"
    ):
        update(build, per_example, PROBLEM.params, wrap=wrap, batch=BATCH)


def test_loss_of_integers():
    counting = gnlin.Objective(OBJECTIVE.model, lambda outputs, batch: jnp.sum(outputs > 0))
    with pytest.raises(ValueError, match=r"`loss` must return one real scalar; .*int32"):
        counting.value(PROBLEM.params, BATCH)


@with_and_without_jit
@each_transform
def test_outputs_of_integers(build, wrap):
    labels = gnlin.Objective(
        lambda params, batch: {"label": jnp.sign(batch["x"] @ params["w"]).astype(jnp.int32)},
        lambda outputs, batch: jnp.sum(outputs["label"].astype(jnp.float32)),
    )
    with pytest.raises(
        TypeError, match=r"`model` must return real floating arrays; outputs\['label'\].*int32.*aux"
    ):
        update(build, labels, PROBLEM.params, wrap=wrap, batch=BATCH)


@each_transform
def test_aux_that_is_no_pair(build):
    single = gnlin.Objective(OBJECTIVE.model, OBJECTIVE.loss, has_aux=True)
    with pytest.raises(
        TypeError, match=r"`model` must return the pair \(outputs, aux\) when has_aux=True"
    ):
        update(build, single, PROBLEM.params, batch=BATCH)


def test_aux_that_was_not_announced():
    pair = gnlin.Objective(
        lambda params, batch: (OBJECTIVE.model(params, batch), "aux"), OBJECTIVE.loss
    )
    with pytest.raises(TypeError, match="aux"):
        pair.value(PROBLEM.params, BATCH)


@with_and_without_jit
@each_transform
def test_more_examples_than_targets(build, wrap):
    batch = {"x": jnp.ones([32, 3]), "y": jnp.ones(16)}
    with pytest.raises(
        ValueError,
        match=r"(?s)`loss\(outputs, batch\)` failed.*float32\[32\].*\['y'\] float32\[16\].*agree",
    ):
        update(build, OBJECTIVE, PROBLEM.params, wrap=wrap, batch=batch)


@with_and_without_jit
@each_transform
def test_wrong_number_of_features(build, wrap):
    batch = {"x": jnp.ones([8, 5]), "y": jnp.ones(8)}
    expected = (
        r"(?s)`model\(params, batch\)` failed.*\['w'\] float32\[3\].*\['x'\] float32\[8, 5\].*agree"
    )
    with pytest.raises(ValueError, match=expected):
        update(build, OBJECTIVE, PROBLEM.params, wrap=wrap, batch=batch)


def test_wrong_shapes_inside_a_network():
    problem = classifier()
    batch = {**problem.batches[0], "x": jnp.ones([8, 5])}
    with pytest.raises(
        ValueError, match=r"(?s)`model\(params, batch\)` failed.*\['hidden'\]\[0\] float32\[3, 4\]"
    ):
        problem.objective.value(problem.params, batch)


# What factories are given.


@pytest.mark.parametrize(
    "objective", [OBJECTIVE.value, None, "mse"], ids=["function", "None", "string"]
)
@each_transform
def test_objective_that_is_none(build, objective):
    with pytest.raises(
        TypeError, match=r"`objective` must be a gnlin\.Objective\(model, loss\); got"
    ):
        build(objective)


@pytest.mark.parametrize("name", ["model", "loss"])
def test_objective_of_what_is_no_function(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a function; got 3"):
        gnlin.Objective(**{"model": OBJECTIVE.model, "loss": OBJECTIVE.loss, name: 3})


def test_residuals_that_are_no_function():
    with pytest.raises(TypeError, match="`residuals` must be a function; got 3"):
        gnlin.Objective.least_squares(3)


DAMPED = {
    "scale_by_gauss_newton": lambda damping: gnlin.scale_by_gauss_newton(OBJECTIVE, damping),
    "gauss_newton": lambda damping: gnlin.gauss_newton(OBJECTIVE, damping=damping),
}
each_damped = pytest.mark.parametrize("build", DAMPED.values(), ids=DAMPED.keys())

BAD_DAMPING = st.floats(max_value=-1e-30) | st.sampled_from(
    [float("nan"), float("inf"), -float("inf")]
)


@each_damped
@given(damping=BAD_DAMPING)
def test_damping_out_of_range(build, damping):
    with pytest.raises(ValueError, match="`damping` must be finite and at least 0; got"):
        build(damping)


@each_damped
@pytest.mark.parametrize("damping", ["0.1", True, [0.1]], ids=str)
def test_damping_that_is_no_number(build, damping):
    with pytest.raises(TypeError, match="`damping` must be a number"):
        build(damping)


@given(damping=BAD_DAMPING | st.just(0.0))
def test_first_damping_out_of_range(damping):
    with pytest.raises(ValueError, match="`damping` must be"):
        gnlin.levenberg_marquardt(OBJECTIVE, damping=damping)
    with pytest.raises(ValueError, match="`initial` must be"):
        gnlin.GainRatio(damping)
    with pytest.raises(ValueError, match="`radius` must be"):
        gnlin.TrustRegion(damping)


@given(accept=st.floats(max_value=-1e-9) | st.floats(min_value=1.0) | st.just(float("nan")))
def test_acceptance_out_of_range(accept):
    with pytest.raises(ValueError, match=r"`accept` must lie in \[0, 1\); got"):
        gnlin.GainRatio(1.0, accept=accept)
    with pytest.raises(ValueError, match=r"`accept` must lie in \[0, 1\); got"):
        gnlin.TrustRegion(accept=accept)


def test_trust_region_needs_a_solver_that_finds_the_damping():
    with pytest.raises(TypeError, match=r"`damping=TrustRegion.*gnlin.Dense\(\).*got CG"):
        gnlin.levenberg_marquardt(OBJECTIVE, damping=gnlin.TrustRegion())


def test_limits_of_damping():
    for limits in ({"minimum": 2.0, "maximum": 1.0}, {"minimum": 2.0}, {"maximum": 0.5}):
        with pytest.raises(ValueError, match="`initial` must lie between `minimum` and `maximum`"):
            gnlin.GainRatio(1.0, **limits)
    with pytest.raises(ValueError, match="`maximum` must be positive"):
        gnlin.GainRatio(1.0, maximum=0.0)


def test_limits_of_damping_fit_its_dtype():
    """λ neither vanishes nor overflows, from where it would not come back."""
    policy = gnlin.GainRatio(1e-2, minimum=1e-60, maximum=1e60)

    def after(state, ratio):
        ratio = jnp.asarray(ratio)
        return policy.judge(state, gnlin.Trial(ratio, ratio, ratio, ratio, jnp.inf))[0]

    low = high = policy.init(jnp.ones(1))[0]
    for _ in range(150):
        low, high = after(low, 1.0), after(high, -1.0)
    assert 0 < float(low.damping) < 1e-30
    assert 1e30 < float(high.damping) < float("inf")
    assert float(after(low, -1.0).damping) > float(low.damping)
    assert float(after(high, 1.0).damping) < float(high.damping)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), "1", None])
def test_learning_rate(rate):
    with pytest.raises(
        (ValueError, TypeError),
        match=r"`learning_rate` must be (a number|finite and at least 0); got",
    ):
        gnlin.gauss_newton(OBJECTIVE, learning_rate=rate)


@pytest.mark.parametrize("step", [0.5, "exact", gnlin.Subspace])
def test_step_rule(step):
    with pytest.raises(
        TypeError,
        match=r"`step` must be a (step rule such as gnlin\.Subspace\(\)|record, not its class)",
    ):
        gnlin.gauss_newton(OBJECTIVE, step=step)


def test_state_of_other_parameters_is_named():
    transform = gnlin.gauss_newton(OBJECTIVE)
    others = jax.tree.map(
        lambda leaf: jnp.zeros((*leaf.shape[:-1], leaf.shape[-1] + 1)), PROBLEM.params
    )
    with pytest.raises(ValueError, match="`opt_state`"):
        transform.update(None, transform.init(others), PROBLEM.params, batch=BATCH)


def test_preconditioner_that_is_to_solve():
    with pytest.raises(
        TypeError, match=r"`solver` must solve systems; .* gnlin\.CG\(preconditioner=Nystrom\("
    ):
        gnlin.gauss_newton(OBJECTIVE, solver=gnlin.Nystrom())  # pyright: ignore[reportArgumentType]


def test_preconditioner_must_return_a_function():
    transform = gnlin.scale_by_gauss_newton(
        OBJECTIVE, 0.1, solver=gnlin.CG(preconditioner=lambda system: 1.0)
    )
    with pytest.raises(
        TypeError, match="`preconditioner`, a function of the System, must return the function"
    ):
        transform.update(None, transform.init(PROBLEM.params), PROBLEM.params, batch=BATCH)


@pytest.mark.parametrize("damping", [gnlin.GainRatio, jnp.ones(3)], ids=["class", "array"])
def test_damping_is_one_number(damping):
    with pytest.raises(
        (ValueError, TypeError), match=r"`damping` must be (a number, a schedule|a single number)"
    ):
        gnlin.gauss_newton(OBJECTIVE, damping=damping)


PERIODIC = {
    "linearise_gradients": lambda period: gnlin.linearise_gradients(OBJECTIVE, period),
    "iterative_linearisation": lambda period: gnlin.iterative_linearisation(
        optax.sgd(0.1), OBJECTIVE, period
    ),
}
each_periodic = pytest.mark.parametrize("build", PERIODIC.values(), ids=PERIODIC.keys())


@each_periodic
@given(period=st.integers(max_value=0))
def test_period_below_one(build, period):
    with pytest.raises(
        ValueError, match=r"`period` must be at least 1; got .*None to never re-linearise"
    ):
        build(period)


@each_periodic
@pytest.mark.parametrize("period", [1.5, 2.0, True, "3", float("inf")], ids=str)
def test_period_that_is_no_integer(build, period):
    with pytest.raises(
        TypeError, match=r"`period` must be an integer of at least 1, None .*, a schedule, .*; got"
    ):
        build(period)


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, None], ids=str)
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1; got"):
        gnlin.prox_linear(optax.sgd(0.1), OBJECTIVE, steps)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(gnlin.linearise_gradients, OBJECTIVE, 2),
        functools.partial(gnlin.iterative_linearisation, optax.sgd(0.1), OBJECTIVE, 2),
        functools.partial(gnlin.prox_linear, optax.sgd(0.1), OBJECTIVE, 2),
    ],
    ids=["linearise_gradients", "iterative_linearisation", "prox_linear"],
)
def test_unknown_loss_model(build):
    with pytest.raises(
        ValueError, match=r"`loss_model` must be one of .*exact.*quadratic.*; got 'cubic'"
    ):
        build(loss_model="cubic")


@pytest.mark.parametrize("line_search", [0.5, "backtracking"])
def test_line_search_that_is_no_sequence(line_search):
    with pytest.raises(
        TypeError,
        match=rf"`line_search` must be a sequence.*such as \(1.0, 0.5\); got {line_search!r}",
    ):
        gnlin.iterative_linearisation(optax.sgd(0.1), OBJECTIVE, 2, line_search=line_search)


def test_a_name_that_the_batch_lacks():
    with pytest.raises(
        ValueError, match=r"(?s)`model\(params, batch\)` failed: KeyError: 'x'.*batch: \['z'\]"
    ):
        OBJECTIVE.value(PROBLEM.params, {"z": jnp.ones(3)})


def test_an_objective_is_bound_once():
    with pytest.raises(ValueError, match="`bind`: this objective is bound"):
        OBJECTIVE.bind(BATCH).bind(BATCH)


def test_residuals_with_an_optional_batch_need_one():
    objective = gnlin.Objective.least_squares(
        lambda p, batch=None: p if batch is None else p - batch
    )
    with pytest.raises(ValueError, match="`batch` is missing"):
        objective.value(jnp.ones(2))
    assert objective.value(jnp.ones(2), 3 * jnp.ones(2)) == 4
    captured = gnlin.Objective.least_squares(lambda p, y=2.0: p - y)
    assert captured.value(jnp.ones(2)) == 1


def test_all_params_of_another_form():
    tx = optax.masked(gnlin.scale_by_gauss_newton(OBJECTIVE, 0.1), {"w": True, "b": False})
    params = {"w": jnp.ones(3), "b": jnp.zeros([])}
    with pytest.raises(ValueError, match="`all_params` must be the whole tree of parameters"):
        tx.update(params, tx.init(params), params, batch=BATCH, all_params={"w": jnp.ones(3)})


def test_acceleration_of_a_model_without_forward_mode():
    square = jax.custom_vjp(lambda p: p**2)
    square.defvjp(lambda p: (p**2, p), lambda p, u: (2 * p * u,))
    tx = gnlin.levenberg_marquardt(
        gnlin.Objective.least_squares(square), geodesic_acceleration=0.75
    )
    with pytest.raises(TypeError, match="`geodesic_acceleration` needs forward-mode derivatives"):
        tx.update(None, tx.init(jnp.ones(2)), jnp.ones(2))


@pytest.mark.parametrize(
    "line_search", [(), (0.0,), (1.0, -0.5), (float("nan"),), (float("inf"),)], ids=str
)
def test_line_search_out_of_range(line_search):
    with pytest.raises(ValueError, match="`line_search` must be a non-empty sequence of positive"):
        gnlin.iterative_linearisation(optax.sgd(0.1), OBJECTIVE, 2, line_search=line_search)


@pytest.mark.parametrize(
    "build",
    [
        lambda inner: gnlin.iterative_linearisation(inner, OBJECTIVE, 2),
        lambda inner: gnlin.prox_linear(inner, OBJECTIVE, 2),
    ],
    ids=["iterative_linearisation", "prox_linear"],
)
def test_inner_that_is_no_transformation(build):
    with pytest.raises(TypeError, match=r"`inner` must be an optax\.GradientTransformation"):
        build(0.1)


def test_unknown_scaling():
    with pytest.raises(
        ValueError, match='`scaling` must be "identity" or "marquardt"; got \'diagonal\''
    ):
        gnlin.levenberg_marquardt(OBJECTIVE, scaling="diagonal")


@pytest.mark.parametrize("size", [-0.75, float("nan")], ids=str)
def test_acceleration_out_of_range(size):
    with pytest.raises(
        ValueError, match="`geodesic_acceleration` must be finite and at least 0; got"
    ):
        gnlin.levenberg_marquardt(OBJECTIVE, geodesic_acceleration=size)


@pytest.mark.parametrize(
    "build",
    [
        lambda solver: gnlin.scale_by_gauss_newton(OBJECTIVE, 0.1, solver=solver),
        lambda solver: gnlin.gauss_newton(OBJECTIVE, damping=gnlin.GainRatio(0.1), solver=solver),
        lambda solver: gnlin.levenberg_marquardt(OBJECTIVE, solver=solver),
    ],
    ids=["scale_by_gauss_newton", "gauss_newton", "levenberg_marquardt"],
)
def test_solver_that_is_none(build):
    with pytest.raises(TypeError, match=r"`solver` must be a solver record such as gnlin\.CG\(\)"):
        build("cg")
    with pytest.raises(TypeError, match=r"`solver` must be a record, not its class; write CG\("):
        build(gnlin.CG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "`max_iterations` must be an integer of at least 1; got 0"),
        ({"max_iterations": 2.0}, "`max_iterations` must be an integer of at least 1; got 2.0"),
        ({"max_iterations": True}, "`max_iterations` must be an integer of at least 1; got True"),
        ({"rtol": -1}, "`rtol` must be a number of at least 0; got -1"),
        ({"rtol": float("nan")}, "`rtol` must be a number of at least 0; got nan"),
        ({"progress_tol": -1e-3}, "`progress_tol` must be a number of at least 0"),
        ({"warm_start": 2}, "`warm_start` must be a fraction between 0 and 1; got 2"),
        ({"warm_start": True}, "`warm_start` must be a fraction between 0 and 1; got True"),
        ({"warm_start": float("nan")}, "`warm_start` must be a fraction between 0 and 1; got nan"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_cg_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        gnlin.CG(**options)


def test_preconditioner_that_is_no_function():
    with pytest.raises(TypeError, match="`preconditioner` must be a function of the System"):
        gnlin.CG(preconditioner="jacobi")


@pytest.mark.parametrize(
    ("factory", "arguments", "option"),
    [
        (gnlin.Objective, (OBJECTIVE.model, OBJECTIVE.loss), "has_auxiliary"),
        (gnlin.linearise_gradients, (OBJECTIVE, 2), "loss_modle"),
        (gnlin.iterative_linearisation, (optax.sgd(0.1), OBJECTIVE, 2), "reset"),
        (gnlin.prox_linear, (optax.sgd(0.1), OBJECTIVE, 2), "losses"),
        (gnlin.scale_by_gauss_newton, (OBJECTIVE, 0.1), "slover"),
        (gnlin.gauss_newton, (OBJECTIVE,), "momentum"),
        (gnlin.levenberg_marquardt, (OBJECTIVE,), "initial_damping"),
        (gnlin.width.scale_by_spectral_condition, (), "steps"),
        (gnlin.width.Fans, (), "fan_in"),
        (gnlin.CG, (), "maxiter"),
        (gnlin.Dense, (), "jitter"),
        (gnlin.GainRatio, (1.0,), "acceptance"),
        (gnlin.TrustRegion, (), "size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misspelt_option(factory, arguments, option):
    with pytest.raises(
        TypeError, match=rf"unexpected keyword argument '{option}'\. Write {factory.__name__}\("
    ):
        factory(*arguments, **{option: 0.5})


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (
            lambda: gnlin.gauss_newton(1.0, OBJECTIVE),
            r"Write gauss_newton\(objective, \*, learning_rate=.auto., damping=GainRatio\(\.\.\.\)",
        ),
        (
            lambda: gnlin.levenberg_marquardt(OBJECTIVE, initial_damping=0.1),
            r"Write levenberg_marquardt\(objective, \*, damping=None",
        ),
        (
            lambda: gnlin.scale_by_gauss_newton(OBJECTIVE),
            r"'damping'\. Write scale_by_gauss_newton",
        ),
        (lambda: gnlin.CG(max_steps=3), r"'max_steps'\. Write CG\(max_iterations=50, rtol"),
        (
            lambda: gnlin.kernel.empirical_ntk(OBJECTIVE, None, outputs="trace"),
            r"'outputs'\. Write empirical_ntk\(objective, .* pairs='full'",
        ),
        (
            lambda: gnlin.prox_linear(OBJECTIVE, steps=3),
            r"Write prox_linear\(inner, objective, steps",
        ),
    ],
)
def test_a_call_that_does_not_fit_shows_the_one_that_does(call, shown):
    with pytest.raises(TypeError, match=shown):
        call()


def test_names_of_a_room_are_told_where_they_are():
    with pytest.raises(AttributeError, match=r"gnlin\.Fans is now gnlin\.width\.Fans"):
        _ = gnlin.Fans
    with pytest.raises(AttributeError, match="no attribute 'sgd'"):
        _ = gnlin.sgd


@pytest.mark.parametrize(
    "build",
    [
        lambda: gnlin.scale_by_gauss_newton(OBJECTIVE, 0.1, solver=gnlin.Kronecker()),
        lambda: gnlin.levenberg_marquardt(OBJECTIVE, solver=gnlin.Kronecker()),
        lambda: gnlin.levenberg_marquardt(
            OBJECTIVE, solver=gnlin.Blocks({"a": gnlin.Dense(), "b": gnlin.Kronecker()}, "a")
        ),
        lambda: gnlin.scale_by_gauss_newton(
            OBJECTIVE, 0.1, solver=gnlin.Dual(otherwise=gnlin.Kronecker())
        ),
    ],
)
def test_a_direction_without_a_length_is_no_solution(build):
    with pytest.raises(TypeError, match=r"gives a direction without a length.*gauss_newton\("):
        build()


class Lacking:
    """A record with none of the methods."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda part: gnlin.gauss_newton(OBJECTIVE, step=part),
            "`step` .* lacks init, choose, remember",
        ),
        (lambda part: gnlin.gauss_newton(OBJECTIVE, solver=part), "`solver` .* lacks init, solve"),
        (
            lambda part: gnlin.gauss_newton(OBJECTIVE, damping=part),
            "`damping` .* lacks init, damping, judge",
        ),
        (
            lambda part: gnlin.levenberg_marquardt(OBJECTIVE, damping=part),
            "`damping` .* lacks init, damping, judge",
        ),
        (lambda part: gnlin.linearise_gradients(OBJECTIVE, part), "`period` must be an integer"),
        (lambda part: gnlin.CG(preconditioner=part), "`preconditioner` .* init, prepare"),
    ],
)
def test_a_part_that_lacks_a_method_is_refused_by_name(build, message):
    with pytest.raises(TypeError, match=message):
        build(Lacking())


def test_a_part_that_lacks_one_method_is_told_which():
    class Rule(Lacking):
        def init(self, params):
            return (), {}

        def choose(self, search, state):
            raise AssertionError

    with pytest.raises(TypeError, match=r"lacks remember$"):
        gnlin.gauss_newton(OBJECTIVE, step=Rule())
    with pytest.raises(TypeError, match=r"`period` must be a period rule .* lacks after$"):
        gnlin.linearise_gradients(OBJECTIVE, Rule())


def test_parts_of_another_role_are_refused():
    tx = gnlin.linearise_gradients
    with pytest.raises(TypeError, match=r"`period` must be a period rule .* lacks after$"):
        tx(OBJECTIVE, gnlin.Subspace())
    with pytest.raises(TypeError, match=r"`period` must be a period rule .* lacks after$"):
        tx(OBJECTIVE, gnlin.GainRatio(1.0))
    with pytest.raises(TypeError, match=r"`damping` must be .* lacks damping, judge$"):
        gnlin.gauss_newton(OBJECTIVE, damping=gnlin.Subspace())
    with pytest.raises(TypeError, match=r"leave it out for the default; got None"):
        gnlin.gauss_newton(OBJECTIVE, damping=None)


def test_a_period_rule_whose_state_says_nothing():
    class Rule:
        def init(self, params):
            return (), {}

        def after(self, state, served):
            raise AssertionError

    with pytest.raises(TypeError, match=r"`period` must have an `init` .* field `moves`"):
        gnlin.linearise_gradients(OBJECTIVE, Rule()).init(PROBLEM.params)


@pytest.mark.parametrize("first", [{}, {"rule/gone": 0.0}], ids=["new", "other"])
def test_statistics_that_change_their_names(first):
    class Rule:
        def init(self, params):
            return (), first

        def choose(self, search, state):
            zeros = jax.tree.map(jnp.zeros_like, search.direction)
            return gnlin.Step(zeros, jnp.asarray(-1.0), stats={"rule/new": 0.0})

        def remember(self, state, taken):
            return state

    tx = gnlin.gauss_newton(OBJECTIVE, step=Rule())
    with pytest.raises(TypeError, match=r"the same names .* \['rule/new'\] are new"):
        tx.update(None, tx.init(PROBLEM.params), PROBLEM.params, batch=BATCH)


def test_a_part_whose_init_needs_values():
    """The form of its state cannot be foretold, so it is not checked."""

    @dataclasses.dataclass(frozen=True)
    class Rule:
        def init(self, params):
            return jnp.zeros([int(jax.tree.leaves(params)[0].sum()) + 1]), {}

        def choose(self, search, state):
            return gnlin.Subspace(momentum=False).choose(search, ())

        def remember(self, state, taken):
            return state

    stats = gnlin.Subspace().init(PROBLEM.params)[1]
    rule = type("Whole", (Rule,), {"init": lambda self, p: (Rule.init(self, p)[0], stats)})()
    tx = gnlin.gauss_newton(OBJECTIVE, step=rule)
    _, state = tx.update(None, tx.init(PROBLEM.params), PROBLEM.params, batch=BATCH)
    assert gnlin.metrics(state)["accepted"]


def test_a_state_that_does_not_fit_says_where():
    tx = gnlin.linearise_gradients(OBJECTIVE, gnlin.RelativeGap(0.1))
    other = gnlin.linearise_gradients(OBJECTIVE, 3).init(PROBLEM.params)
    with pytest.raises(
        ValueError, match=r"`opt_state` .* opt_state\.period\.exceeded is not there"
    ):
        tx.update(None, other, PROBLEM.params, batch=BATCH)
    as_dicts = {"count": 0, "anchor": PROBLEM.params}
    with pytest.raises(ValueError, match=r"`opt_state` does not match `params`"):
        tx.update(None, as_dicts, PROBLEM.params, batch=BATCH)


def test_no_step_rule_names_the_textbooks_method():
    with pytest.raises(TypeError, match=r"optax\.chain\(gnlin\.scale_by_gauss_newton\("):
        gnlin.gauss_newton(OBJECTIVE, step=None)


def test_a_policy_where_no_step_is_judged():
    with pytest.raises(TypeError, match="`damping` must be a number or a schedule here"):
        gnlin.scale_by_gauss_newton(OBJECTIVE, gnlin.GainRatio(0.1))
    with pytest.raises(TypeError, match="TrustRegion gives a radius"):
        gnlin.gauss_newton(OBJECTIVE, damping=gnlin.TrustRegion())
    with pytest.raises(TypeError, match="`damping` must be the first λ or a policy"):
        gnlin.levenberg_marquardt(OBJECTIVE, damping=lambda count: 0.1)


# The driver.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_steps": 0},
            ValueError,
            "`max_steps` must be an integer of at least 1; got 0",
        ),
        (
            {"max_steps": 2.5},
            ValueError,
            "`max_steps` must be an integer of at least 1; got 2.5",
        ),
        ({"tol": -1e-3}, ValueError, "`tol` must be finite and at least 0; got -0.001"),
        ({"tol": float("nan")}, ValueError, "`tol` must be finite and at least 0; got nan"),
        ({"tol": "small"}, TypeError, "`tol` must be a number; got 'small'"),
        ({"batch": None}, ValueError, "`batch` is missing"),
        ({"objective": OBJECTIVE.value}, TypeError, "`objective` must be"),
        ({"params": {"w": jnp.arange(3)}}, TypeError, r"params\['w'\] has dtype int32"),
        ({"params": None}, ValueError, "`params` is missing"),
        ({"tx": 0.1}, TypeError, "`tx` must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_minimise(options, error, message):
    good = {
        "objective": OBJECTIVE,
        "params": PROBLEM.params,
        "tx": optax.sgd(0.1),
        "batch": BATCH,
        "max_steps": 3,
        "tol": 1e-3,
    }
    with pytest.raises(error, match=message):
        gnlin.minimise(**{**good, **options})


# Functions that take no transform.


@pytest.mark.parametrize(
    "call",
    [
        lambda **given: gnlin.linearise(OBJECTIVE, PROBLEM.params, **given),
        lambda **given: gnlin.ggn_vector_product(OBJECTIVE, PROBLEM.params, **given),
        lambda **given: gnlin.quadratic_model(OBJECTIVE, PROBLEM.params, **given),
        lambda **given: gnlin.linearised_value_and_grad(OBJECTIVE)(
            PROBLEM.params, PROBLEM.params, **given
        ),
        lambda **given: gnlin.predict(OBJECTIVE, (), PROBLEM.params, **given),
        lambda **given: OBJECTIVE.value(PROBLEM.params, **given),
        lambda **given: OBJECTIVE.value_and_grad(PROBLEM.params, **given),
    ],
    ids=[
        "linearise",
        "ggn_vector_product",
        "quadratic_model",
        "linearised_value_and_grad",
        "predict",
        "value",
        "value_and_grad",
    ],
)
def test_functions_without_their_batch(call):
    call(batch=BATCH)
    with pytest.raises(ValueError, match=r"`batch` is missing.*objective\.bind\(batch\)"):
        call()


def test_state_without_an_anchor():
    with pytest.raises(ValueError, match="`opt_state` holds no anchor"):
        gnlin.anchor(optax.adam(1e-3).init(PROBLEM.params))


def test_state_with_two_anchors():
    tx = optax.chain(
        gnlin.linearise_gradients(OBJECTIVE, 2), gnlin.linearise_gradients(OBJECTIVE, 3)
    )
    with pytest.raises(ValueError, match="`opt_state` holds 2 anchors"):
        gnlin.anchor(tx.init(PROBLEM.params))


class Returns:
    """A part of every kind, whose one method `method` returns `value`."""

    def __init__(self, method, value):
        setattr(self, method, lambda *arguments: value)

    def init(self, params):
        return (), {}

    def damping(self, state, count):
        return jnp.asarray(0.1, float)

    solve = prepare = choose = remember = judge = after = init


@pytest.mark.parametrize(
    ("build", "method", "value", "message"),
    [
        ("solver", "init", ((),), r"`solver\.init` must return a tuple of 2; got tuple"),
        (
            "solver",
            "solve",
            ((), gnlin.Solution((), {})),
            r"`solver\.solve` must return a Solution",
        ),
        ("damping", "judge", ((), {}), r"`damping\.judge` must return a tuple of 3; got tuple"),
        ("step", "choose", 3.0, r"`step\.choose` must return a gnlin\.Step; got float"),
        ("step", "init", {}, r"`step\.init` must return a tuple of 2; got dict"),
    ],
)
def test_a_method_that_returns_something_else(build, method, value, message):
    tx = gnlin.gauss_newton(OBJECTIVE, **{build: Returns(method, value)})
    with pytest.raises(TypeError, match=message):
        tx.update(None, tx.init(PROBLEM.params), PROBLEM.params, batch=BATCH)


def test_a_preconditioner_that_returns_something_else():
    solver = gnlin.CG(preconditioner=Returns("prepare", ((), lambda vector: vector)))
    tx = gnlin.scale_by_gauss_newton(OBJECTIVE, 0.1, solver=solver)
    with pytest.raises(TypeError, match=r"`preconditioner\.prepare` must return a Preparation"):
        tx.update(None, tx.init(PROBLEM.params), PROBLEM.params, batch=BATCH)
