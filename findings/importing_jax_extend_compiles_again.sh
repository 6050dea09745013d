#!/usr/bin/env bash
# Importing jax.extend in JAX 0.12 makes JAX forget all that it has compiled.
#
# Version: jax 0.12.0.1 with the jaxlib that pip takes for it, Python 3.12 or newer, CPU. JAX 0.6.0 does not do this.
#
# Behaviour. The options of JAX that may change a program are part of the key under which compiled functions are found. In 0.12 the modules
# of Pallas add two such options, and `jax.extend.core` imports them. So a first `import jax.extend.core` makes all keys longer, and no
# earlier one is found again. A function that was compiled before is traced and compiled once more at its next call. Nothing is said.
# Libraries import `jax.extend` where they need it, inside a function, to keep their own import quick. If that function runs while a step is
# traced, the first call compiles the step, and the second call compiles all of it again. `JAX_EXPLAIN_CACHE_MISSES=1` has the line
#     number of tracing context values differs: now 53 and before 51
# The remedy is to import `jax.extend` before anything is compiled. It takes 25 to 60 ms.
#
# Seen: entries in the cache of one function after two calls, with the import between them: 2. With the import before them: 1.
#
# This script fails if the import between the calls no longer compiles the function again.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in python3.13 python3.12 "$HOME"/.pyenv/versions/3.13.*/bin/python python3; do
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>"$work/found" && break
done
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.12.0.1

for order in before between; do
    JAX_PLATFORMS=cpu "$work/venv/bin/python" - "$order" <<'PYTHON'
import sys

import jax

order = sys.argv[1]
if order == "before":
    import jax.extend.core
double = jax.jit(lambda x: 2 * x)
double(1.0)
if order == "between":
    import jax.extend.core
double(1.0)
entries = double._cache_size()
print(f"jax {jax.__version__}, import {order} the calls: {entries}")
assert entries == (2 if order == "between" else 1), entries
PYTHON
done
