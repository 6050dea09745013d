"""One damped linear system, several solvers."""

from gnlin.solve.cg import CG
from gnlin.solve.dense import Dense
from gnlin.solve.kronecker import Kronecker
from gnlin.solve.system import Preconditioner, RadiusSolver, Solution, Solver, System

__all__ = ["CG", "Dense", "Kronecker", "Preconditioner", "RadiusSolver", "Solution", "Solver", "System"]
