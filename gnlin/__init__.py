"""Iterative linearisation and damped Gauss-Newton as Optax gradient transformations.

The folders are rooms, named in the order in which data flows. `problem` states the problem, its
linearisation and its curvature. `width` is the spectral condition. `structure` reads layers and
independent examples from the model's program. `kernel` is the neural tangent kernel. `solve` is one
linear system with several solvers. `transforms` are the optimisers. `drivers` runs one to
convergence. `compare`, the command line, stands on top and is never imported here. Below all of
them lie `tree`, `checks` and `jaxprs`.
"""

from typing import Any

from gnlin import kernel as kernel
from gnlin import width as width
from gnlin.drivers import MinimiseInfo, minimise
from gnlin.problem.curvature import QuadraticModel, System, ggn_vector_product, quadratic_model
from gnlin.problem.linearisation import Linearisation, linearise, linearised_value_and_grad
from gnlin.problem.objective import Objective
from gnlin.solve import (
    CG,
    Blocks,
    Dense,
    Dual,
    Eigenbasis,
    Jacobi,
    Kronecker,
    Nystrom,
    Preconditioner,
    Preparation,
    Solution,
    Solver,
    layers,
)
from gnlin.transforms.damping import DampingPolicy, GainRatio, TrustRegion
from gnlin.transforms.drift import measure_kernel_drift
from gnlin.transforms.gain import Trial
from gnlin.transforms.gauss_newton import gauss_newton, scale_by_gauss_newton
from gnlin.transforms.iterative_linearisation import iterative_linearisation, linearise_gradients
from gnlin.transforms.layer_periods import LayerPeriods
from gnlin.transforms.levenberg_marquardt import levenberg_marquardt
from gnlin.transforms.momentum import Momentum
from gnlin.transforms.period import PeriodRule, RelativeGap, Served
from gnlin.transforms.prox_linear import prox_linear
from gnlin.transforms.state import anchor, metrics, predict
from gnlin.transforms.step_length import Search, Step, StepRule, Subspace

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Blocks",
    "DampingPolicy",
    "Dense",
    "Dual",
    "Eigenbasis",
    "GainRatio",
    "Jacobi",
    "Kronecker",
    "LayerPeriods",
    "Linearisation",
    "MinimiseInfo",
    "Momentum",
    "Nystrom",
    "Objective",
    "PeriodRule",
    "Preconditioner",
    "Preparation",
    "QuadraticModel",
    "RelativeGap",
    "Search",
    "Served",
    "Solution",
    "Solver",
    "Step",
    "StepRule",
    "Subspace",
    "System",
    "Trial",
    "TrustRegion",
    "anchor",
    "gauss_newton",
    "ggn_vector_product",
    "iterative_linearisation",
    "layers",
    "levenberg_marquardt",
    "linearise",
    "linearise_gradients",
    "linearised_value_and_grad",
    "measure_kernel_drift",
    "metrics",
    "minimise",
    "predict",
    "prox_linear",
    "quadratic_model",
    "scale_by_gauss_newton",
]


def __getattr__(name: str) -> Any:
    """Names of a room, asked for one floor too high, are told where they are."""
    for room in (kernel, width):
        if name in room.__all__:
            raise AttributeError(f"gnlin.{name} is now {room.__name__}.{name}")
    raise AttributeError(f"module 'gnlin' has no attribute {name!r}")
