"""The gain ratio and the rules that follow it, beside the tables of the references."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import references.damping
from problems import tolerance
from references.damping import Adaptive, Nielsen, Outcome, more

import gnlin
from gnlin.transforms.damping import RadiusState
from gnlin.transforms.gain import gain_ratio

# Loss before the step and after it, promised change, size of the step: the gain ratio.
TRIALS = {
    "half of the promise": (1.0, 0.99, -0.02, 1.0, 0.5),
    "uphill": (1.0, 1.01, -0.02, 1.0, -0.5),
    "small and no rounding": (1.0, 1 - 1e-9, -2e-9, 1.0, 0.5),
    "rounding": (1.0, 1 + 2**-52, -(2.0**-52), 1.0, 1.0),
    "rounding of the loss alone": (1.0, 1.0, -1e-9, 1.0, 0.0),
    "no step": (1.0, 1.0, 0.0, 0.0, -np.inf),
    "no promise": (1.0, 0.9, 0.1, 1.0, -np.inf),
    "not finite": (1.0, np.inf, -0.1, 1.0, -np.inf),
}


@pytest.mark.parametrize("name", TRIALS)
def test_gain_ratio(x64, name):
    value, new_value, change, size, expected = TRIALS[name]
    step = np.full(3, size)
    ratio = gain_ratio(*map(jnp.asarray, (value, new_value, change, size > 0)))
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    np.testing.assert_allclose(ratio, references.damping.gain_ratio(value, new_value, change, step))


def trial(ratio, decrease=0.0, slope=-1.0, length=1.0, radius=np.inf):
    return gnlin.Trial(*map(jnp.asarray, (ratio, decrease, slope, length, radius)))


def test_damping_follows_nielsen(x64):
    rule = Adaptive(1.0, accept=0.1, minimum=0.02, maximum=500.0)
    policy, expected = gnlin.GainRatio(*rule), Nielsen(rule.initial)
    state, _ = policy.init(None)
    ratios = [0.5, 0.11, 0.1, -3.0, np.nan, -np.inf, 0.3, 0.0, 0.0, 0.9, 1.0, 7.0, 0.95, 1.0, 1.0]
    for count, ratio in enumerate([*ratios, *[0.0] * 6]):
        np.testing.assert_allclose(policy.damping(state, count), expected.damping, rtol=1e-14)
        state, accepted, _ = policy.judge(state, trial(ratio))
        assert accepted == (ratio > rule.accept)
        expected = expected.after(ratio, rule)


RATIOS = [-np.inf, -99.0, -1.0, 0.0, 0.1, 0.25, 0.26, 0.5, 0.74, 0.75, 1.0, 3.0]


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_radius_follows_more(x64, first):
    """Steps that end inside and at the radius, and failures that are slight, great and infinite."""
    policy, radius = gnlin.TrustRegion(accept=0.1), 4.0
    lengths, changes = (0.01, 1.0, 3.95, 3.97, 4.0), (-2.0, 0.3, 40.0, np.inf)
    for ratio, change, length in itertools.product(RATIOS, changes, lengths):
        state = RadiusState(jnp.asarray(0.0 if first else radius))
        outcome = trial(ratio, -change, -2.0, length, radius)
        after, accepted, metrics = policy.judge(state, outcome)
        expected = more(Outcome(ratio, change, -2.0, length, radius), first=first)
        np.testing.assert_allclose(after.radius, expected, **tolerance(jnp.float64))
        assert accepted == (ratio > 0.1)
        assert metrics["radius"] == radius
