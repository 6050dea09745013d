"""One damped linear system, several solvers."""

from gnlin.solve.cg import CG
from gnlin.solve.dense import Dense
from gnlin.solve.system import RadiusSolver, Solution, Solver, System

__all__ = ["CG", "Dense", "RadiusSolver", "Solution", "Solver", "System"]
