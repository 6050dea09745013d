"""Iterative linearisation and damped Gauss-Newton as Optax gradient transformations.

Reading order, which is also the direction in which data flows: `objective` (the problem), `linearise` (its model
expanded at an anchor), `curvature` (Gauss-Newton products), `layers` (what a linearisation says of the network's
structure) with `by_example` and `gram` (kernel matrices), `solve` (one linear system, several solvers), then the
transforms `iterative_linearisation`, `prox_linear`, `damping`, `subspace`, `gauss_newton` and `levenberg_marquardt`,
then `minimise` (a driver) and `telemetry` (what the state says). `compare`, the command line, is never imported here.
"""

from gnlin.curvature import QuadraticModel, ggn_vector_product, quadratic_model
from gnlin.damping import GainRatio, TrustRegion
from gnlin.gauss_newton import gauss_newton, scale_by_gauss_newton
from gnlin.iterative_linearisation import iterative_linearisation, linearise_gradients
from gnlin.levenberg_marquardt import levenberg_marquardt
from gnlin.linearise import Linearisation, linearise, linearised_value_and_grad
from gnlin.minimise import MinimiseInfo, minimise
from gnlin.objective import Objective
from gnlin.prox_linear import prox_linear
from gnlin.solve import CG, Blocks, Dense, Dual, Jacobi, Kronecker, Nystrom, Solution, System
from gnlin.subspace import Subspace
from gnlin.telemetry import anchor, metrics, predict

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Blocks",
    "Dense",
    "Dual",
    "GainRatio",
    "Jacobi",
    "Kronecker",
    "Linearisation",
    "MinimiseInfo",
    "Nystrom",
    "Objective",
    "QuadraticModel",
    "Solution",
    "Subspace",
    "System",
    "TrustRegion",
    "anchor",
    "gauss_newton",
    "ggn_vector_product",
    "iterative_linearisation",
    "levenberg_marquardt",
    "linearise",
    "linearise_gradients",
    "linearised_value_and_grad",
    "metrics",
    "minimise",
    "predict",
    "prox_linear",
    "quadratic_model",
    "scale_by_gauss_newton",
]
