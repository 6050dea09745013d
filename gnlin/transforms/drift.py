"""The drift of the kernel of the model that is trained: a measure of the features it has learnt.

While the features J are fixed the kernel J Jᵀ is constant. Two numbers measure how many features
were learnt. The alignment with the kernel at the start says how far it has turned. The distance
from it says how much it has changed in all.

`measure_kernel_drift` surrounds an optimiser. The kernel comes from `gnlin/kernel/ntk.py`, its
comparison from `gnlin/kernel/alignment.py`, and `state` reads the metrics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnlin import tree
from gnlin.checks import check_integer, check_transformation, shows_signature, shows_update
from gnlin.kernel.alignment import kernel_alignment, kernel_distance
from gnlin.kernel.ntk import empirical_ntk
from gnlin.kernel.rows import number_of_examples
from gnlin.problem.masking import problem_of_update
from gnlin.problem.objective import (
    Objective,
    check_not_bound,
    check_objective,
    check_params,
    without_binding,
)
from gnlin.transforms.iterative_linearisation import linearised_state
from gnlin.tree import Batch, Params


class KernelDriftState(NamedTuple):
    inner: optax.OptState
    count: jax.typing.ArrayLike
    reference: jax.Array  # (n, n), the kernel that others are compared with
    metrics: dict[str, jax.Array]


@shows_signature
def measure_kernel_drift(
    inner: optax.GradientTransformation,
    objective: Objective,
    probe: Batch,
    every: int,
    *,
    reference: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measure how far the kernel of the model that `inner` trains has moved, on the same examples.

    The trace kernel on the n examples of the probe is compared with a reference. This happens at
    the first update, and at every `every`-th after it. Updates are those of `inner`.

    The kernel is that of the model *being trained*. It is taken at the anchor where `inner` holds
    one for this update, so linearised training has no drift. Elsewhere it is taken at the
    parameters. With `LayerPeriods` it is that of the network at the anchor and the layers that are
    not linearised.

    Compile the step. An update that is not compiled traces the kernel each time, whether or not it
    is measured.

    A measurement costs a forward pass, C pull-backs and the products of `empirical_ntk` on the
    probe. Divide this by `every`. The state has n² numbers. The probe is a constant of the compiled
    step.

    Metrics: ``kernel/alignment`` and ``kernel/centred_alignment`` (`kernel_alignment` without and
    with centring), ``kernel/distance`` (`kernel_distance`), ``kernel/age`` (updates since they were
    measured).

    Args:
        inner: the optimiser.
        objective: the problem.
        probe: a batch.
        every: updates from one measurement to the next.
        reference: (n, n), as ``empirical_ntk(objective, params, probe, pairs="trace")`` gives it;
            `None` for the kernel at the first update.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` takes the arguments of `inner`, and
            ``all_params``.
        ``all_params``.

    Raises:
        ValueError, TypeError: `every` is no integer of at least 1. Or `probe` is missing, or the
            model cannot be evaluated on it. Or `reference` is not (n, n), or is needed since
            parameters are masked. At update: `params` is missing.

    References: Fort et al., arXiv 2010.15110; Lee et al., arXiv 1902.06720.

    Example:
        >>> import gnlin, jax, jax.numpy as jnp, optax
        >>> objective = gnlin.Objective(
        ...     lambda p, x: jnp.tanh(x @ p), lambda z, x: jnp.sum((z - 1) ** 2))
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> tx = gnlin.measure_kernel_drift(optax.sgd(0.1), objective, x, every=10)
        >>> params = jnp.zeros((2, 3)); state = tx.init(params); update = jax.jit(tx.update)
        >>> for _ in range(11):
        ...     grads = objective.value_and_grad(params, x)[1]
        ...     updates, state = update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> round(float(gnlin.metrics(state)["kernel/alignment"]), 2)
        0.43
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    check_objective(objective)
    check_not_bound("probe", objective, probe)
    if probe is None and not objective.is_bound:
        raise ValueError("`probe` is missing: pass the examples of the kernel that is followed")
    check_integer("every", every)

    def examples_of(params) -> int:
        if jax.tree.leaves(params) and not tree.has_holes(params):
            outputs = jax.eval_shape(lambda p: objective.outputs_and_aux(p, probe)[0], params)
            return number_of_examples(outputs)
        # Without all parameters there are no outputs to count.
        if reference is None:
            return _length(without_binding(objective, probe)[1])
        return jnp.shape(reference)[0] if jnp.ndim(reference) else 0

    def init_fn(params):
        check_params(params, allow_holes=True)
        examples, dtype = examples_of(params), tree.accumulation_dtype(params)
        first = jnp.zeros([examples, examples], dtype)
        if reference is not None:
            _check_shape(reference, examples)
            first = jnp.array(reference, dtype)
        kinds = "alignment", "centred_alignment", "distance"
        metrics = {f"kernel/{kind}": jnp.asarray(0.0, float) for kind in kinds}
        metrics["kernel/age"] = jnp.zeros([], jnp.int32)
        return KernelDriftState(inner.init(params), jnp.zeros([], jnp.int32), first, metrics)

    @shows_update
    def update_fn(updates, state, params: Params = None, *, all_params=None, **extra_args):
        problem = problem_of_update(objective, params, all_params, state, init_fn)
        updates, inner_state = inner.update(
            updates, state.inner, params, all_params=all_params, **extra_args
        )
        found = linearised_state(inner_state)
        # The anchor of this update; a mask hides leaves of it, too.
        trained = params if found is None else tree.fill_holes(found.anchor, params)

        def measure(trained):
            kernel = empirical_ntk(problem, trained, probe, pairs="trace")
            _check_shape(state.reference, kernel.shape[0])
            first = state.reference
            if reference is None:
                # The first measurement is the reference; until then the state has zeros.
                first = jnp.where(state.count == 0, kernel, first)
            values = {
                "kernel/alignment": kernel_alignment(kernel, first, centred=False),
                "kernel/centred_alignment": kernel_alignment(kernel, first),
                "kernel/distance": kernel_distance(kernel, first),
            }
            return first, {**tree.cast(values, float), "kernel/age": jnp.zeros([], jnp.int32)}

        def keep(_):
            age = state.metrics["kernel/age"] + 1
            return state.reference, {**state.metrics, "kernel/age": age}

        first, metrics = jax.lax.cond(state.count % every == 0, measure, keep, trained)
        count = optax.safe_increment(state.count)
        return updates, KernelDriftState(inner_state, count, first, metrics)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_shape(reference: jax.Array, examples: int) -> None:
    if jnp.shape(reference) != (examples, examples):
        raise ValueError(
            f"`reference` must be a kernel between the {examples} examples of the probe, of shape "
            f"{(examples, examples)}; got {jnp.shape(reference)}"
        )


def _length(probe: Batch) -> int:
    # Leaves without axes, such as a rate, number no examples.
    lengths = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(probe) if jnp.ndim(leaf)}
    if len(lengths) != 1:
        raise ValueError(
            "`reference` is needed where parameters are masked and the leaves of the probe differ "
            "in length: the number of examples cannot be read from "
            f"{jax.tree.map(jnp.shape, probe)}"
        )
    return lengths.pop()
