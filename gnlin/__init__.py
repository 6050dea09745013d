"""Iterative linearisation and damped Gauss-Newton as Optax gradient transformations.

Reading order, which is also the direction in which data flows: `objective` (the problem),
`linearise` (its model expanded at an anchor), `curvature` (Gauss-Newton products), `layers` (what a
linearisation says of the network's structure) with `by_example`, `rows` (of the Jacobian) and
`gram` (their products), `batches` (parts of a batch, with `traces`), `kernel` (the neural tangent
kernel) and `alignment` (how kernels compare), `solve` (one linear system, several solvers), then
the transforms: `period` (how long an anchor is kept), `iterative_linearisation`, `drift` (how far
the kernel moves), `prox_linear`, `damping`, `subspace`, `gauss_newton` and `levenberg_marquardt`;
the spectral condition, with `fans` (what is a matrix), `spectral` and `parametrisation`; `lazy`
(linearised training in closed form), `minimise` (a driver) and `telemetry` (what the state says).
`compare`, the command line, is never imported here.
"""

from gnlin import kernel as kernel
from gnlin import width as width
from gnlin.drivers import MinimiseInfo, minimise
from gnlin.problem.curvature import QuadraticModel, ggn_vector_product, quadratic_model
from gnlin.problem.linearisation import Linearisation, linearise, linearised_value_and_grad
from gnlin.problem.objective import Objective
from gnlin.solve import CG, Blocks, Dense, Dual, Jacobi, Kronecker, Nystrom, Solution, System
from gnlin.transforms.damping import GainRatio, TrustRegion
from gnlin.transforms.drift import measure_kernel_drift
from gnlin.transforms.gauss_newton import gauss_newton, scale_by_gauss_newton
from gnlin.transforms.iterative_linearisation import iterative_linearisation, linearise_gradients
from gnlin.transforms.levenberg_marquardt import levenberg_marquardt
from gnlin.transforms.period import LayerPeriods, RelativeGap
from gnlin.transforms.prox_linear import prox_linear
from gnlin.transforms.state import anchor, metrics, predict
from gnlin.transforms.step_length import Subspace

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Blocks",
    "Dense",
    "Dual",
    "GainRatio",
    "Jacobi",
    "Kronecker",
    "LayerPeriods",
    "Linearisation",
    "MinimiseInfo",
    "Nystrom",
    "Objective",
    "QuadraticModel",
    "RelativeGap",
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
    "measure_kernel_drift",
    "metrics",
    "minimise",
    "predict",
    "prox_linear",
    "quadratic_model",
    "scale_by_gauss_newton",
]
