"""One damped linear system, several solvers. Start with `protocols`."""

from gnlin.solve.blocks import Blocks
from gnlin.solve.cg import CG
from gnlin.solve.dense import Dense
from gnlin.solve.dual import Dual
from gnlin.solve.jacobi import Jacobi
from gnlin.solve.kronecker import Kronecker
from gnlin.solve.nystrom import Nystrom
from gnlin.solve.protocols import Preconditioner, Preparation, RadiusSolver, Solution, Solver

__all__ = [
    "CG",
    "Blocks",
    "Dense",
    "Dual",
    "Jacobi",
    "Kronecker",
    "Nystrom",
    "Preconditioner",
    "Preparation",
    "RadiusSolver",
    "Solution",
    "Solver",
]
