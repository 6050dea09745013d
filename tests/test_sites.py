"""Layers inside loops, branches and stacks, embeddings, gains and shared weights.

The moments of a decoder under `jax.lax.scan` are compared with those of a twin that is written out,
with a probe added to each product. Its inputs are recorded, and its cotangents are gradients in the
probes.
"""

import operator

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from problems import third_party_model

import gnlin
from gnlin.solve.sampling import root_sample
from gnlin.structure.layers import layouts, read_layers

LAYERS, WIDTH, HEADS, VOCABULARY, HIDDEN = 3, 6, 2, 5, 8
TOKENS = np.asarray([[0, 2, 2, 4], [1, 1, 0, 3]])


def normal(*shape):
    return oracles.normal(*shape, seed=sum(shape)) / max(shape[-2:]) ** 0.5


def decoder_params():
    stack = {
        "gain": 1 + normal(LAYERS, WIDTH),
        "q": normal(LAYERS, WIDTH, HEADS, 3),
        "o": normal(LAYERS, HEADS, 3, WIDTH),
        "up": normal(LAYERS, WIDTH, HIDDEN),
        "up_bias": normal(LAYERS, HIDDEN),
        "down": normal(LAYERS, HIDDEN, WIDTH),
    }
    table, place = normal(VOCABULARY, WIDTH), normal(TOKENS.shape[1], WIDTH)
    return {"table": table, "place": place, "blocks": stack, "shift": normal(WIDTH)}


def plain(name, inputs, product):
    del name, inputs
    return product


def block(x, w, tap=plain):
    unit = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3)
    h = tap("gain", unit, unit * w["gain"][None, None])
    q = tap("q", h, jnp.einsum("btd,dhk->bthk", h, w["q"]))
    mixed = jnp.einsum("bthk,bshk->bhts", q, q)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(mixed), q)
    x = x + tap("o", mixed, jnp.einsum("bthk,hkd->btd", mixed, w["o"]))
    hidden = tap("up", x, x @ w["up"]) + w["up_bias"][None, None]
    return x + tap("down", jnp.tanh(hidden), jnp.tanh(hidden) @ w["down"])


def ends(p, tokens, blocks, tap=plain):
    x = tap("table", tokens, p["table"][tokens]) * 2.0
    x = tap("place", None, x + p["place"][None])
    x = tap("shift", None, blocks(x) - p["shift"][None, None])
    return tap("table", x, jnp.einsum("btd,vd->btv", x, p["table"]))


def decoder(p, tokens, remat=False, dtype=None):
    one = jax.checkpoint(block) if remat else block

    def turn(x, w):
        w = w if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), w)
        return one(x if dtype is None else x.astype(dtype), w).astype(x.dtype), None

    return ends(p, tokens, lambda x: jax.lax.scan(turn, x, p["blocks"])[0])


def indexed(p, tokens):
    def blocks(x):
        for layer in range(LAYERS):
            x = block(x, jax.tree.map(operator.itemgetter(layer), p["blocks"]))
        return x

    return ends(p, tokens, blocks)


def taps_of_the_twin(p, tokens, sample):
    """name ↦ (inputs, cotangents), each a list with an entry for each use."""
    probes: dict[str, list] = {}
    records: dict[str, list] = {}

    def run(probes, record):
        counts: dict[str, int] = {}

        def tap(name, inputs, product):
            number = counts[name] = counts.get(name, -1) + 1
            if record:
                probes.setdefault(name, []).append(jnp.zeros_like(product))
                records.setdefault(name, []).append(inputs)
                return product
            return product + probes[name][number]

        def blocks(x):
            for layer in range(LAYERS):
                x = block(x, jax.tree.map(operator.itemgetter(layer), p["blocks"]), tap)
            return x

        return ends(p, tokens, blocks, tap)

    run(probes, record=True)
    gradient = jax.grad(lambda probes: jnp.sum(run(probes, record=False) * sample))(probes)
    return {name: (records[name], gradient[name]) for name in records}


def product(inputs, cotangents, columns):
    """A and S by sums over applications, spare row and column of the bias included."""
    x = np.asarray(inputs).reshape(-1, np.asarray(inputs).size // (cotangents.size // columns))
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    s = np.pad(np.asarray(cotangents).reshape(-1, columns), ((0, 0), (0, 1)))
    return sum(np.outer(r, r) for r in x) / len(x), sum(np.outer(r, r) for r in s)


def one_hot(tokens, length):
    return np.diag(np.bincount(np.ravel(tokens), minlength=length + 1) / np.size(tokens))


def moments(model, params, batch):
    """State of `Kronecker` after one system, and the sample of that system."""
    objective = gnlin.Objective(model, lambda z, _: jnp.sum(jnp.square(z)) / 2)
    kronecker = gnlin.Kronecker(fraction=1.0)
    quadratic = gnlin.quadratic_model(objective, params, batch)
    system = quadratic.system(0.1)
    _, state = jax.jit(lambda s: (0, kronecker.prepare(system, params, s)[1]))(
        kronecker.init(params)[0]
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    return state, root_sample(system.output_hessian, quadratic.linear.outputs, key)


@pytest.mark.parametrize(
    "model",
    [decoder, lambda p, x: decoder(p, x, remat=True), indexed],
    ids=["scan", "scan of remat", "stack taken apart"],
)
def test_moments_are_those_of_a_twin_with_probes(x64, model):
    params = decoder_params()
    state, sample = moments(model, params, TOKENS)
    taps = taps_of_the_twin(params, TOKENS, sample)

    joined = model is not indexed  # a bias of one of several sites stands alone
    for name, columns in (("q", WIDTH), ("o", WIDTH), ("up", HIDDEN), ("down", WIDTH)):
        for layer in range(LAYERS):
            left, right = product(taps[name][0][layer], taps[name][1][layer], columns)
            found = state.left["blocks"][name][layer], state.right["blocks"][name][layer]
            if not joined:  # several sites share their trace otherwise between the sides
                ratio = np.trace(left[:-1, :-1]) / np.trace(found[0][:-1, :-1])
                found = found[0] * ratio, found[1] / ratio
            np.testing.assert_allclose(found[0], left, atol=1e-12)
            np.testing.assert_allclose(found[1], right, atol=1e-12)
    x, s = (np.stack(each) for each in taps["gain"])
    expected = np.sum(np.square(x * s), axis=(1, 2))
    np.testing.assert_allclose(state.left["blocks"]["gain"], expected.ravel(), atol=1e-12)
    if joined:
        assert not np.any(state.left["blocks"]["up_bias"])
    else:
        expected = np.sum(np.square(np.stack(taps["up"][1])), axis=(1, 2))
        np.testing.assert_allclose(state.left["blocks"]["up_bias"], expected.ravel(), atol=1e-12)
    expected = np.sum(np.square(taps["shift"][1][0]), axis=(0, 1))
    np.testing.assert_allclose(state.left["shift"], expected, atol=1e-12)

    # A matrix that is added has a row for each place, taken equally often.
    _, right = product(np.ones(8), taps["place"][1][0], WIDTH)
    np.testing.assert_allclose(state.right["place"], right, atol=1e-12)
    np.testing.assert_allclose(np.diag(state.left["place"]), [0.25] * 4 + [0], atol=1e-12)


def test_shared_weights_have_the_trace_of_the_sum(x64):
    """The table embeds tokens, and is the last layer."""
    params = decoder_params()
    state, sample = moments(decoder, params, TOKENS)
    (tokens, x), (first, last) = taps_of_the_twin(params, TOKENS, sample)["table"]
    columns, rows = product(x, np.asarray(last), VOCABULARY)
    terms = [
        (one_hot(tokens, VOCABULARY), product(np.ones(8), np.asarray(first), WIDTH)[1]),
        (rows, columns),
    ]
    # Without the spare row, which belongs to no bias here.
    traces = [tuple(np.trace(side[:-1, :-1]) for side in term) for term in terms]
    weights = [left * right for left, right in traces]
    for side, found in enumerate((state.left["table"], state.right["table"])):
        scaled = [
            w * term[side] / t[side] for w, term, t in zip(weights, terms, traces, strict=True)
        ]
        np.testing.assert_allclose(found, sum(scaled) / np.sqrt(sum(weights)), atol=1e-12)

    total = np.prod([np.trace(side["table"][:-1, :-1]) for side in (state.left, state.right)])
    np.testing.assert_allclose(total, sum(weights), rtol=1e-12)


def test_a_table_that_is_looked_up_has_its_counts(x64):
    params = {"table": normal(VOCABULARY, WIDTH), "w": normal(WIDTH, 2)}

    def model(p, tokens):
        return jnp.tanh(p["table"][tokens]) @ p["w"]

    state, sample = moments(model, params, TOKENS)
    np.testing.assert_allclose(state.left["table"], one_hot(TOKENS, VOCABULARY), atol=1e-12)
    cotangents = jax.grad(lambda rows: jnp.sum(jnp.tanh(rows) @ params["w"] * sample))(
        params["table"][TOKENS]
    )
    _, right = product(np.ones(8), np.asarray(cotangents), WIDTH)
    np.testing.assert_allclose(state.right["table"], right, atol=1e-12)


def test_groups_of_channels_have_their_own_block(x64):
    images, kernel = normal(2, 5, 5, 4), normal(3, 3, 2, 6)

    def model(p, images):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, p["k"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    state, sample = moments(model, {"k": kernel}, images)
    patches = np.stack(
        [
            images[n, i : i + 3, j : j + 3].reshape(9, 2, 2).transpose(1, 0, 2).reshape(2, 18)
            for n in range(2)
            for i in range(3)
            for j in range(3)
        ]
    )  # (R, groups, window · in)
    flat = np.concatenate([patches.reshape(-1, 18), np.ones((36, 1))], axis=1)
    np.testing.assert_allclose(state.left["k"], flat.T @ flat / 36, atol=1e-12)
    s = np.pad(np.asarray(sample).reshape(-1, 6), ((0, 0), (0, 1)))
    blocks = np.kron(np.eye(3), np.ones((3, 3)))[:7, :7]
    np.testing.assert_allclose(state.right["k"], s.T @ s * blocks, atol=1e-12)


def test_moments_of_a_branch_are_those_of_the_systems_that_take_it(x64):
    """A is a mean over these systems, and S over all."""
    params, inputs = {"w": normal(4, 3), "v": normal(4, 3)}, [normal(7, 4), -normal(7, 4)]

    def model(p, x):
        first = lambda p: x @ p["w"]  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, first, lambda p: (2 * x) @ p["v"], p)

    assert (inputs[0][0, 0] > 0) != (inputs[1][0, 0] > 0)
    objective = gnlin.Objective(model, lambda z, _: jnp.sum(jnp.square(z)) / 2)
    kronecker = gnlin.Kronecker(fraction=1.0)
    state, _ = kronecker.init(params)
    for x in inputs:
        quadratic = gnlin.quadratic_model(objective, params, x)
        _, state = kronecker.prepare(quadratic.system(0.1), params, state)
    taken = inputs[0] if inputs[0][0, 0] > 0 else inputs[1]
    left, _ = product(taken, np.ones((7, 3)), 3)
    late = taken is inputs[1]
    # Before the branch was first taken there was nothing to keep: the mean of one and of zeros.
    np.testing.assert_allclose(state.left["w"], left / 2 if late else left, atol=1e-12)


def test_a_branch_that_is_not_taken_has_no_moments(x64):
    params, x = {"a": normal(4, 3), "b": normal(4, 3)}, normal(7, 4)

    def model(p, x):
        first = lambda p: x @ p["a"]  # noqa: E731
        return jax.lax.cond(x[0, 0] > -100, first, lambda p: (2 * x) @ p["b"], p)

    state, sample = moments(model, params, x)
    left, right = product(x, np.asarray(sample), 3)
    np.testing.assert_allclose(state.left["a"], left, atol=1e-12)
    np.testing.assert_allclose(state.right["a"], right, atol=1e-12)
    assert not np.any(np.asarray(state.right["b"]))


# Networks as people write them: every leaf is read.


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(x)))), None


class ScannedFlax(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 8)(tokens)
        scan = nn.scan(nn.remat(ScannedBlock), variable_axes={"params": 0}, length=3,
                       split_rngs={"params": True})  # fmt: skip
        x, _ = scan()(x, None)
        return nn.Dense(5)(nn.LayerNorm()(x))


class Residual(nn.Module):
    """Statistics of inference, depthwise and grouped convolutions."""

    @nn.compact
    def __call__(self, x):
        def norm():
            return nn.BatchNorm(use_running_average=True)

        h = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        h = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(h)) + nn.Conv(8, (1, 1))(x))
        h = nn.Conv(12, (1, 1))(nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(h)))
        h = nn.Conv(4, (3, 3), feature_group_count=2)(nn.GroupNorm(2)(h))
        return nn.Dense(3)(h.mean((1, 2)))


def of_flax(module, batch):
    variables = third_party_model(jax.jit(module.init))(jax.random.key(0), batch)
    rest = {name: value for name, value in variables.items() if name != "params"}
    apply = third_party_model(lambda p, x: module.apply({"params": p, **rest}, x))
    return apply, variables["params"], batch


class Unit(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.first, self.last = eqx.nn.Linear(4, 6, key=key), eqx.nn.Linear(6, 4, key=key)
        self.norm = eqx.nn.LayerNorm(4)

    def __call__(self, x):
        return x + self.last(jax.nn.gelu(self.first(self.norm(x))))


def of_equinox():
    stack = eqx.filter_vmap(Unit)(jax.random.split(jax.random.key(0), 3))
    arrays, static = eqx.partition(stack, eqx.is_array)

    def model(p, x):
        def turn(h, part):
            return eqx.combine(part, static)(h), None

        return jax.vmap(lambda row: jax.lax.scan(turn, row, p)[0])(x)

    return third_party_model(model), arrays, jnp.ones((5, 4))


def experts(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    hidden = jnp.tanh(jnp.einsum("bd,edf->ebf", x, p["mix"]["in"]) + p["mix"]["bias"][:, None])
    return jnp.einsum("ebf,efd,be->bd", hidden, p["mix"]["out"], gates)


def one_by_one(p, x):
    for w, b in zip(p["mix"]["w"], p["mix"]["b"], strict=True):
        x = jnp.tanh(x @ w + b[None])
    (head,) = p["one"]
    return x @ head


def split_up(p, x):
    stacks = (jnp.split(p["mix"][name], 3) for name in "wb")
    for w, b in zip(*stacks, strict=True):
        x = jnp.tanh(x @ w[0] + b)
    return x @ jnp.split(p["one"], 1)[0][0]


STACK = {"w": (3, 4, 4), "b": (3, 4)}
F32 = np.float32


def attention(p, x):
    q, k = (jnp.einsum("btd,hdk->bhtk", x, p[name]) for name in "qk")
    return jnp.einsum("bhtk,hkd->btd", jnp.tanh(q * k), p["o"])


def scanned(layer, remat=False):
    """The last activations of a loop over a stack of layers ``(h, w) -> h``."""

    def model(p, x):
        return jax.lax.scan(lambda h, w: (layer(h, w), None), x, p)[0]

    return jax.checkpoint(model) if remat else model


def recurrent(p, x):
    def turn(h, x):
        return jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"][None]), None

    return jax.lax.scan(turn, jnp.zeros((2, 4)), x)[0]


def looked_up(mode):
    def model(p, tokens):
        return jnp.take(p["t"], tokens, axis=0, mode=mode, fill_value=0.0) @ p["w"]

    return model


def reset(p, x):
    """A carry that is known after a turn, though not before it."""

    def turn(c, w):
        return (jnp.tanh(c[0] @ w) + c[1], 0.0), c[1]

    def run(p, x):
        return jax.lax.scan(turn, (x, jnp.sum(p["b"])), p["w"])[0][0]

    return jax.checkpoint(run)(p, x)


def chosen_in_a_loop(h, w):
    def first():
        return jnp.tanh(h @ w["w"] + w["b"][None])

    return jax.lax.cond(jnp.sum(h) > 0, first, lambda: 0.1 * (h @ w["w"]))


def scaled_in_a_branch(p, x):
    def first(p):
        return (jnp.mean(x) * p["t"])[np.asarray([0, 2, 1, 2])]

    return jax.lax.cond(jnp.mean(x) > -9, first, lambda p: p["t"][np.asarray([0, 0, 1, 2])], p)


def dead_operand(p, x):
    def first(p):
        return x @ p["w"]

    return jax.lax.cond(jnp.sum(x) > 0, first, lambda p: 2 * x @ p["w"], p) + x @ p["v"]


def of(model, batch, **shapes):
    """A case: the model, parameters of these shapes, and a batch of this shape."""
    params = {
        name: (oracles.normal(*shape, seed=place) / 2).astype(F32)
        for place, (name, shape) in enumerate(shapes.items())
    }
    if isinstance(batch, tuple):
        batch = oracles.normal(*batch, seed=99).astype(F32)
    return model, params, batch


def nested(case, **inside):
    """The same with these leaves in a subtree."""
    model, params, batch = case
    return model, {**params, "mix": of(None, (), **inside)[1]}, batch


def f32_decoder(model):
    return model, jax.tree.map(lambda leaf: leaf.astype(F32), decoder_params()), TOKENS


FAR = np.asarray([0, 7, -1, 4])
CASES = {
    "decoder": lambda: f32_decoder(decoder),
    "decoder, remat": lambda: f32_decoder(lambda p, x: decoder(p, x, remat=True)),
    "decoder, remat, bfloat16": lambda: f32_decoder(
        lambda p, x: decoder(p, x, remat=True, dtype=jnp.bfloat16)
    ),
    "decoder, indexed": lambda: f32_decoder(indexed),
    "flax scan": lambda: of_flax(ScannedFlax(), jnp.asarray(TOKENS)),
    "a stack, one layer after the other": lambda: nested(
        of(one_by_one, (5, 4), one=(1, 4, 2)), **STACK
    ),
    "a stack that is split": lambda: nested(of(split_up, (5, 4), one=(1, 4, 2)), **STACK),
    "residual": lambda: of_flax(Residual(), jnp.ones((2, 8, 8, 3))),
    "equinox stack": of_equinox,
    "experts": lambda: nested(
        of(experts, (5, 4), router=(4, 2)),
        **{"in": (2, 4, 6), "bias": (2, 6), "out": (2, 6, 4)},
    ),
    "heads in front": lambda: of(attention, (3, 5, 8), q=(2, 8, 4), k=(2, 8, 4), o=(2, 4, 8)),
    "low rank, scanned": lambda: of(
        scanned(lambda h, w: jnp.tanh(h + (h @ w["a"]) @ w["b"])), (5, 8), a=(3, 8, 2), b=(3, 2, 8)
    ),
    "a scan of jitted functions, remat": lambda: of(
        scanned(lambda h, w: jax.nn.silu(h @ w["w"] * w["g"][None]), remat=True),
        (5, 4), w=(3, 4, 4), g=(3, 4),
    ),
    "recurrent": lambda: of(recurrent, (6, 2, 3), w=(4, 4), u=(3, 4), b=(4,)),
    "map": lambda: of(
        lambda p, x: jax.lax.map(lambda row: jnp.tanh(row @ p["w"]) @ p["w"].T, x),
        (6, 2, 3), w=(3, 4),
    ),
    "multiples": lambda: of(
        lambda p, x: jnp.tanh(x @ (0.3 * p["w"]) / 2 - p["b"][None]) @ (p["v"] / 3),
        (6, 3), w=(3, 4), b=(4,), v=(4, 2),
    ),
    "a leaf less a product": lambda: of(
        lambda p, x: p["b"][None] - x @ p["w"], (5, 4), b=(3,), w=(4, 3)
    ),
    "scalars": lambda: of(lambda p, x: x @ p["w"] * p["s"] + p["c"], (5, 4), w=(4, 3), s=(), c=()),
    "places of a mapped model": lambda: of(
        lambda p, x: jax.vmap(lambda x: jnp.tanh(x + p["place"]) @ p["w"])(x),
        (3, 5, 4), place=(5, 4), w=(4, 2),
    ),
    "rows far outside, clip": lambda: of(looked_up("clip"), FAR, t=(5, 4), w=(4, 2)),
    "rows far outside, fill": lambda: of(looked_up("fill"), FAR, t=(5, 4), w=(4, 2)),
    "rows far outside, wrap": lambda: of(looked_up("wrap"), FAR, t=(5, 4), w=(4, 2)),
    "a branch in a loop": lambda: of(scanned(chosen_in_a_loop), (5, 4), w=(3, 4, 4), b=(3, 4)),
    "a multiple in a branch": lambda: of(scaled_in_a_branch, (5, 4), t=(3, 4)),
    "an operand that no branch needs": lambda: of(dead_operand, (5, 4), w=(4, 3), v=(4, 3)),
    "a side of length 0": lambda: of(
        lambda p, x: x @ p["w"] + jnp.sum(x @ p["z"]), (5, 4), w=(4, 2), z=(4, 0)
    ),
}  # fmt: skip

# What is not read has the gradient, and the reason.
UNREAD = {
    "a carry that is reset": (
        lambda: of(reset, (5, 4), b=(3,), w=(3, 4, 4)), "used in reduce_sum",
    ),
    "repeated kernel": (
        lambda: of(
            lambda p, x: jax.lax.conv_general_dilated(
                x, jnp.broadcast_to(p["k"], (4, 1, 3)), (1,), "SAME",
                dimension_numbers=("NCH", "OIH", "NCH"), feature_group_count=4,
            ),
            (2, 4, 9), k=(3,),
        ),
        "used in conv_general_dilated",
    ),
    "a new axis is looked up": (
        lambda: of(lambda p, i: p["b"][None][i], np.asarray([0, 0, 0]), b=(4,)), "used in gather",
    ),
    "a repeated table": (
        lambda: of(
            lambda p, i: jnp.take(jnp.broadcast_to(p["b"], (3, 5)), i, axis=1),
            np.asarray([0, 2, 1]), b=(5,),
        ),
        "used in gather",
    ),
    "a vector as a kernel": (
        lambda: of(
            lambda p, x: jax.lax.conv_general_dilated(
                x, p["k"][None, None, None], (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
            ),
            (2, 3, 3, 4), k=(4,),
        ),
        "a vector as a kernel",
    ),
    "a sum of weights": (
        lambda: of(lambda p, x: x @ (p["w"] + p["w"].T @ p["w"]), (5, 4), w=(4, 4)), "used in ",
    ),
}  # fmt: skip


def gradient_of(use, cotangents):
    """Jᵀu at one leaf, from inputs and cotangents of its sites."""
    layout, total = use.layout, np.zeros(use.layout.shape)
    for site, cotangent in zip(use.sites, cotangents, strict=True):
        cotangent = np.asarray(cotangent, float)
        if site.kind in ("gain", "bias"):
            known = np.asarray(site.inputs, float)
            cotangent = cotangent * known.reshape(
                known.shape + (1,) * (cotangent.ndim - known.ndim)
            )
        if site.factor is not None:
            cotangent = cotangent * float(site.factor)
        s = np.asarray(site.arranged(jnp.asarray(cotangent), layout.shape, layout.stack))
        if site.kind in ("gain", "bias"):
            part = s.sum(axis=-2).reshape((*s.shape[: layout.stack], *layout.member))
        elif site.kind == "embedding":
            rows, part = np.ravel(site.inputs), np.zeros(layout.shape)
            known = rows < layout.shape[0]
            np.add.at(part, rows[known], s.reshape(rows.size, -1)[known])
        else:
            x = np.asarray(site.arranged_inputs(layout.shape, layout.stack), float)
            if site.groups > 1:  # the inputs of each group, behind those of the others
                x = x.reshape(-1, site.groups, x.shape[-1])
                s = s.reshape(len(x), site.groups, -1)
                part = np.einsum("rgi,rgo->igo", x, s)
            else:
                part = np.swapaxes(x, -2, -1) @ s
            if layout.is_transposed(site.fan_in, site.fan_out):
                part = np.swapaxes(part, -2, -1)
            part = part.reshape(*part.shape[: layout.stack], *layout.member)
        if site.taken:
            place = dict(site.taken)
            index = tuple(place.get(axis, slice(None)) for axis in range(layout.stack))
            total[index] += part.reshape(total[index].shape)
        else:
            total += part
    return total


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_is_read_and_its_sites_make_the_gradient(name):
    if name == "flax scan" and not hasattr(jax.sharding.NamedSharding, "update"):
        pytest.skip("the scan of newer versions of Flax wants a newer JAX")
    model, params, batch = CASES[name]()
    half = "bfloat16" in name
    outputs, jvp = jax.linearize(lambda p: model(p, batch), params)
    reading = read_layers(jvp, params)
    assert [use.why for use in reading.uses] == [""] * len(reading.uses)

    check_gradient(reading, jvp, params, outputs, 2e-2 if half else 2e-5)


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_says_why_and_has_its_gradient(name):
    make, why = UNREAD[name]
    model, params, batch = make()
    outputs, jvp = jax.linearize(lambda p: model(p, batch), params)
    reading = read_layers(jvp, params)
    assert reading.uses[0].why.startswith(why)
    check_gradient(reading, jvp, params, outputs, 2e-5)


def check_gradient(reading, jvp, params, outputs, tolerance):
    """Sites and the other leaves make the gradient for a cotangent without symmetries."""
    cotangent = jnp.cos(1 + jnp.arange(outputs.size, dtype=jnp.float32)).reshape(outputs.shape)
    cotangent = cotangent.astype(outputs.dtype)
    expected = jax.tree.leaves(jax.linear_transpose(jvp, params)(cotangent)[0])
    cotangents, others = jax.jit(reading.pull_back)(cotangent)
    # The gradient of a bias of attention's keys is rounding.
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in expected if leaf.size)
    for leaf, use in enumerate(reading.uses):
        if use.bias_of is not None:
            owner = reading.uses[use.bias_of]
            (site,), (of_site,) = owner.sites, cotangents[use.bias_of]
            s = site.arranged(of_site, owner.layout.shape, owner.layout.stack)
            found = np.asarray(s, float).sum(axis=-2).reshape(use.layout.shape)
        elif leaf in others:
            found = others[leaf]
        else:
            found = gradient_of(use, cotangents[leaf])
        size = np.max(np.abs(expected[leaf]), initial=0.0)
        scale = max(float(size), 1e-2 * largest)
        np.testing.assert_allclose(
            np.asarray(found, float) / scale, np.asarray(expected[leaf], float) / scale,
            atol=tolerance,
        )  # fmt: skip


def test_adapters_under_partition_are_read_in_their_stack():
    """The frozen weights are hidden; the adapters are a stack by themselves."""
    frozen, a, b = (
        oracles.normal(*shape, seed=1) / 3 for shape in ((3, 8, 8), (3, 8, 2), (3, 2, 8))
    )
    frozen, a, b = (leaf.astype(jnp.float32) for leaf in (frozen, a, b))

    def model(p, x):
        def turn(h, w):
            return jnp.tanh(h @ w[0] + h @ w[1] @ w[2]), None

        return jax.lax.scan(turn, x, (p["w"], p["a"], p["b"]))[0]

    params = {"w": frozen, "a": a, "b": b}
    objective = gnlin.Objective(model, lambda z, _: jnp.mean(jnp.square(z - 0.5)))
    labels = {"w": "frozen", "a": "trained", "b": "trained"}
    tx = optax.partition(
        {"trained": gnlin.gauss_newton(objective), "frozen": optax.set_to_zero()}, labels
    )
    state, batch = tx.init(params), oracles.normal(5, 8, seed=0).astype(jnp.float32)

    @jax.jit
    def step(params, state):
        grads = jax.grad(objective.value)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, all_params=params)
        return optax.apply_updates(params, updates), state

    before = objective.value(params, batch)
    for _ in range(3):
        params, state = step(params, state)
    assert objective.value(params, batch) < before / 2
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 3}
    assert shapes >= {(3, 9, 9), (3, 3, 3)}


# Layouts, from shapes alone.


@pytest.mark.parametrize(
    ("shapes", "stacks"),
    [
        ({"gain": (4, 6), "w": (4, 6, 8)}, [1, 1]),
        ({"w": (4, 6, 8), "v": (4, 8, 6)}, [1, 1]),
        ({"w": (4, 6, 8)}, [0]),  # a leaf alone may be heads of attention
        ({"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4)}, [0, 0, 0]),
        ({"ln": (8,), "q": (8, 2, 4), "up": (8, 16)}, [0, 0, 0]),
        ({"c1": (3, 3, 4, 8), "c2": (3, 3, 8, 8)}, [0, 0]),
        ({"kernel": (3, 3, 4, 8), "bias": (8,)}, [0, 0]),
        ({"a": (6, 8), "b": (8, 6)}, [0, 0]),
        (
            {"gain": (4, 6), "experts": {"w": (4, 2, 6, 8), "b": (4, 2, 8)}},
            [2, 2, 1],  # b, w, gain: a stack within a stack
        ),
    ],
)
def test_stacks_are_found_in_the_tree(shapes, stacks):
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    found = dict(zip(names, layouts(params), strict=True))
    flat, _ = jax.tree_util.tree_flatten_with_path(
        shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    assert sorted(each.stack for each in found.values()) == sorted(stacks)
    assert {each.shape for each in found.values()} == {shape for _, shape in flat}


def test_a_state_under_scan_is_as_large_as_without():
    params = decoder_params()
    blocks = [{name: leaf[i] for name, leaf in params["blocks"].items()} for i in range(LAYERS)]
    kronecker = gnlin.Kronecker()

    def size(params):
        return sum(leaf.size for leaf in jax.tree.leaves(kronecker.init(params)[0]))

    assert size(params) <= size({**params, "blocks": blocks})


# The table.


def test_the_table_names_what_is_not_read():
    def model(p, x):
        return jnp.sin(p["w"]) @ x + jnp.cumsum(p["b"])

    objective = gnlin.Objective(model, lambda z, _: jnp.sum(z**2))
    params = {"b": jnp.ones(3), "unused": jnp.ones((2, 2)), "w": jnp.ones((3, 4))}
    table = gnlin.layers(objective, params, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert [row.why_not for row in table] == ["used in cumsum", "not used", "a matrix in a gain"]
    assert [row.kind for row in table] == ["other"] * 3
    assert str(table).splitlines()[-1] == "0 of 3 leaves read, 0.0% of the parameters"
    assert len(table) == 3


@pytest.mark.parametrize("solver", [gnlin.CG(), gnlin.Eigenbasis(), "kronecker"], ids=str)
def test_the_table_is_of_factors(solver):
    objective = gnlin.Objective.least_squares(lambda p: p)
    with pytest.raises(TypeError, match=r"`solver` must be a gnlin\.Kronecker record.*`kronecker`"):
        gnlin.layers(objective, jnp.ones(3), solver=solver)
