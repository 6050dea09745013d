"""Strict JAX for every test below this folder.

Shapes and dtypes must be said, never guessed: rank promotion raises, and so does dtype promotion.
What Optax and others compute for themselves is written for the usual rules: see
`problems.third_party`. The default precision stays float32; a test in double precision asks for the
fixture `x64`. Doctests elsewhere see JAX as a user does.
"""

import os

# A worker for each core is enough: threads of OpenBLAS besides them wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Most of the time here is compilation. LLVM's optimisations change neither results nor the counts
# of operations.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax
import pytest
from hypothesis import settings
from problems import enable_x64

# The same examples in every run; what compiles takes as long as it takes.
settings.register_profile("gnlin", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("gnlin")


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Double precision for the duration of one test, whether or not it fails."""
    with enable_x64(True):
        yield


# Files that take more than 15 seconds of a core. The others, with all docstrings, are the fast
# subset: they touch every room.
SLOW = {
    "test_amortised",
    "test_blocks",
    "test_compare",
    "test_contract",
    "test_cost",
    "test_dual",
    "test_exactness",
    "test_examples",
    "test_kernel",
    "test_levenberg_marquardt",
    "test_optax_wrappers",
    "test_peers",
    "test_period",
    "test_precondition",
    "test_reference",
    "test_sites",
    "test_report",
    "test_sharding",
    "test_subspace",
    "test_tasks_hard",
    "test_width_condition",
}


def pytest_collection_modifyitems(items):
    """Mark the tests of slow files, and begin with them: a late one would leave a core idle."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.stem not in SLOW)
