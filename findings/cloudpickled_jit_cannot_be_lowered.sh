#!/usr/bin/env bash
# A function of `jax.jit` that went through cloudpickle can be called, and not be lowered; since JAX 0.12 it breaks `jax.eval_shape`, too.
#
# Version: jax 0.12.0.1 and 0.6.0 with the jaxlib that pip takes for them, cloudpickle 3.1.3, Python 3.13 or 3.12, CPU.
#
# Behaviour. Dask, Ray, loky and concurrent.futures with cloudpickle send functions to other processes. A compiled function arrives there, and
# calling it gives the right value. So do `jax.grad`, `jax.vmap`, `jax.make_jaxpr` and another `jax.jit` of it. The attributes that were
# set from Python are lost on the way, and its own methods need them: `lower`, `trace`, `eval_shape` and `clear_cache` raise
# AttributeError: 'jaxlib._jax.PjitFunction' object has no attribute '_fun'. In JAX 0.6 `jax.eval_shape(f, ...)` works, because it traces
# `f` as any function. In JAX 0.12 it asks the compiled function for its own method, and raises the same error. A job that asks for the
# shapes of its parameters before it allocates them then fails in the worker alone, where the process that sent it has no trouble.
# The remedy is to send the plain function, or to hide the compiled one: `jax.eval_shape(lambda *a: f(*a), ...)`.
#
# Seen: jax 0.12.0.1  call ok, grad ok, eval_shape AttributeError, lower AttributeError, eval_shape of a lambda ok
#       jax 0.6.0     call ok, grad ok, eval_shape ok,             lower AttributeError, eval_shape of a lambda ok
#
# This script fails if one of these changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in python3.13 python3.12 "$HOME"/.pyenv/versions/3.13.*/bin/python python3; do
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>"$work/found" && break
done

cat >"$work/seen.py" <<'PYTHON'
import cloudpickle
import jax


def double(x):
    return 2 * x


there = cloudpickle.loads(cloudpickle.dumps(jax.jit(double)))
tries = {
    "call": lambda: there(1.0),
    "grad": lambda: jax.grad(there)(1.0),
    "eval_shape": lambda: jax.eval_shape(there, 1.0),
    "lower": lambda: there.lower(1.0),
    "eval_shape of a lambda": lambda: jax.eval_shape(lambda x: there(x), 1.0),
}
seen = {}
for name, attempt in tries.items():
    try:
        attempt()
        seen[name] = "ok"
    except AttributeError as error:
        assert "_fun" in str(error), error
        seen[name] = "AttributeError"
print(jax.__version__, seen)
shape = "AttributeError" if jax.__version__.startswith("0.12") else "ok"
expected = ["ok", "ok", shape, "AttributeError", "ok"]
assert list(seen.values()) == expected, f"this has changed: {seen}"
PYTHON

for version in 0.12.0.1 0.6.0; do
    "$python" -m venv "$work/venv-$version"
    "$work/venv-$version/bin/pip" install --quiet "jax==$version" cloudpickle==3.1.3
    JAX_PLATFORMS=cpu "$work/venv-$version/bin/python" "$work/seen.py"
done
