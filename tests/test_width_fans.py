"""Leaves of every kind as matrices: in the transform, the initial weights and the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import norm, normal, scaled

import gnlin
from gnlin.width.fans import layout_of, layouts

Fans = gnlin.width.Fans


# The norm of a leaf, and its prescription.

LEAVES = {
    # name: (shape, fans, leaf ↦ its maps as matrices (fan-in, fan-out), prescription)
    "matrix": ((4, 9), None, lambda w: [w], 1.5),
    "bias": ((9,), None, lambda w: [w[None]], 3.0),
    "scalar": ((), None, lambda w: [w[None, None]], 1.0),
    "gain": ((9,), Fans(-1, -1), lambda w: [np.diag(w)], 1.0),
    "convolution": ((3, 2, 4, 6), None, lambda w: [w.reshape(24, 6)], 0.5),
    "convolution-1d": ((3, 4, 6), Fans(), lambda w: [w.reshape(12, 6)], 0.5**0.5),
    "depthwise": (
        (2, 2, 1, 6),
        Fans(-1, -1),
        lambda w: [w[..., i].reshape(4, 1) for i in range(6)],
        0.5,
    ),
    "oihw": ((6, 4, 3, 2), Fans(1, 0), lambda w: [w.reshape(6, 24).T], 0.5),
    "transposed": ((9, 4), Fans(1, 0), lambda w: [w.T], 1.5),
    "embedding": ((7, 9), Fans((), -1, index_axis=0), lambda w: [row[None] for row in w], 3.0),
    "experts": ((3, 4, 9), Fans(index_axis=0), list, 1.5),
    "heads": ((4, 3, 3), Fans(0, (1, 2)), lambda w: [w.reshape(4, 9)], 1.5),
    "heads-out": ((2, 2, 9), Fans((0, 1), 2), lambda w: [w.reshape(4, 9)], 1.5),
}
NAMES = LEAVES.keys()
LEAF_FANS = {name: fans for name, (_, fans, _, _) in LEAVES.items()}


def leaf_norms(name, leaf):
    return max(map(norm, LEAVES[name][2](np.asarray(leaf))))


def test_every_kind_of_leaf_has_its_prescribed_norm():
    """The largest among its separate maps, and the direction is untouched."""
    leaves = {name: jnp.asarray(normal(0, *LEAVES[name][0]), jnp.float32) for name in NAMES}
    new, state = scaled(leaves, LEAF_FANS, calls=2)
    before = {name: leaf_norms(name, leaves[name]) for name in NAMES}
    for name, (_, _, _, prescription) in LEAVES.items():
        np.testing.assert_allclose(
            leaf_norms(name, new[name]), prescription, rtol=1e-4, err_msg=name
        )
        np.testing.assert_allclose(
            new[name] * before[name], leaves[name] * prescription, rtol=1e-3, err_msg=name
        )
    ratios = [before[name] / LEAVES[name][3] for name in NAMES]
    np.testing.assert_allclose(gnlin.metrics(state)["spectral/largest"], max(ratios), rtol=1e-4)
    np.testing.assert_allclose(gnlin.metrics(state)["spectral/smallest"], min(ratios), rtol=1e-4)


def test_reports_and_initial_weights_follow_the_same_axes():
    @jax.jit
    def draw(key):
        return {
            name: gnlin.width.spectral_init(key, shape, fans=fans)
            for name, (shape, fans, _, _) in LEAVES.items()
        }

    weights = draw(jax.random.key(0))
    updates = {name: jnp.asarray(normal(1, *LEAVES[name][0]), jnp.float32) for name in NAMES}
    reports = jax.jit(lambda *trees: gnlin.width.spectral_report(*trees, LEAF_FANS))(
        weights, updates
    )
    for name, (_, _, maps, prescription) in LEAVES.items():
        report = reports[f"['{name}']"]
        np.testing.assert_allclose(report.prescription, prescription, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            (report.fan_out / report.fan_in) ** 0.5, prescription, rtol=1e-6, err_msg=name
        )
        np.testing.assert_allclose(report.weight_ratio, 1, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            report.update, leaf_norms(name, updates[name]), rtol=1e-5, err_msg=name
        )
        np.testing.assert_allclose(
            report.update_ratio * prescription, report.update, rtol=1e-5, err_msg=name
        )
        for each in maps(np.asarray(weights[name])):
            singular = np.linalg.svd(each, compute_uv=False)
            np.testing.assert_allclose(
                singular[singular > 0], prescription, rtol=1e-5, err_msg=name
            )


def test_stacked_layers_are_scaled_one_by_one():
    sizes = np.array([1e-6, 1.0, 30.0])
    tree = {
        "w": jnp.asarray(normal(0, 3, 4, 9) * sizes[:, None, None], jnp.float32),
        "b": jnp.asarray(normal(1, 3, 9) * sizes[:, None], jnp.float32),
    }
    fans = {"w": Fans(batch_axis=0), "b": Fans((), -1, batch_axis=0)}
    new, _ = scaled(tree, fans, calls=2)
    for i in range(3):
        np.testing.assert_allclose(new["w"][i] * norm(tree["w"][i]), tree["w"][i] * 1.5, rtol=1e-3)
        np.testing.assert_allclose(norm(new["b"][i][None]), 3, rtol=1e-5)
    report = jax.jit(lambda *trees: gnlin.width.spectral_report(*trees, fans))(tree, new)["['w']"]
    assert report.update.shape == (3,)
    np.testing.assert_allclose(report.update_ratio, 1, rtol=1e-4)


def test_fans_are_a_tree_a_prefix_or_a_function():
    params = {
        "blocks": [jnp.ones((3, 4, 4)), jnp.ones((2, 5, 5))],
        "out": jnp.ones((4, 2)),
        "none": None,
    }
    whole = {"blocks": [Fans(batch_axis=0)] * 2, "out": None, "none": None}
    prefix = {"blocks": Fans(batch_axis=0), "out": None, "none": None}

    def function(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: Fans(batch_axis=0) if "blocks" in jax.tree_util.keystr(path) else None,
            params,
        )

    expected = layouts(whole, params)
    assert expected["blocks"][1].stack == (2, 1, 5, 5)
    assert expected["out"].stack == (1, 1, 4, 2)
    for fans in (prefix, function):
        assert layouts(fans, params) == expected


def test_layouts_are_invertible():
    leaf = np.arange(120).reshape(2, 3, 4, 5)
    layout = layout_of("leaf", Fans(in_axis=3, out_axis=(1, 3), batch_axis=2), leaf.shape)
    assert layout.stack == (4, 5, 2, 3)
    np.testing.assert_array_equal(layout.join(layout.split(leaf)), leaf)
    assert layout.spread(np.arange(4)).shape == (1, 1, 4, 1)


# Errors.


BUILDERS = {
    "scale_by_spectral_condition": gnlin.width.scale_by_spectral_condition,
    "scale_by_maximal_update_sgd": gnlin.width.scale_by_maximal_update_sgd,
    "scale_by_maximal_update_adam": gnlin.width.scale_by_maximal_update_adam,
}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


@each_builder
@pytest.mark.parametrize(
    ("fans", "error", "message"),
    [
        (
            None,
            ValueError,
            r"`fans` must name the three axes of \['w'\], of shape \(2, 3, 4\): "
            r"gnlin\.width\.Fans\(",
        ),
        (
            {"v": Fans()},
            ValueError,
            r"`fans` must be a gnlin\.width\.Fans, or a tree of them .* got \{'v'",
        ),
        (
            {"w": "kernel"},
            TypeError,
            r"`fans` must hold gnlin\.width\.Fans, or None .*; got 'kernel' at \['w'\]",
        ),
        (
            Fans(3),
            ValueError,
            r"`fans` names axes that an array of shape \(2, 3, 4\) does not have: .*\(at \['w'\]\)",
        ),
        (Fans(1, 2, batch_axis=-2), ValueError, r"`fans` names an axis twice: .*\(at \['w'\]\)"),
    ],
    ids=["three-axes", "other-tree", "string", "range", "twice"],
)
def test_fans_that_do_not_fit(build, fans, error, message):
    with pytest.raises(error, match=message):
        build(fans).init({"w": jnp.ones((2, 3, 4))})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.5,), TypeError, r"`in_axis` must be an integer or a tuple of integers; got 1\.5"),
        ((0, "last"), TypeError, "`out_axis` must be .*; got 'last'"),
        ((0, 1, True), TypeError, "`batch_axis` must be .*; got True"),
        ((0, 1, 1), ValueError, "`fans` names an axis twice"),
        (((0, 0), 1), ValueError, "`fans` names an axis twice"),
        ((0, 1, (), 0), ValueError, "`fans` names an axis twice"),
    ],
)
def test_axes_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        Fans(*arguments)


@each_builder
def test_missing_updates_and_parameters(build):
    tx = build()
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.init(None)
    with pytest.raises(ValueError, match="`updates` is missing"):
        tx.update(None, tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match="params has dtype int32"):
        tx.init(jnp.arange(3))


def test_report_of_other_updates():
    with pytest.raises(
        ValueError, match=r"`updates` does not match `params`; pass what tx\.update returned"
    ):
        gnlin.width.spectral_report({"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))})
