"""Fit a curve to the last digits.

    python examples/least_squares.py

The data is the thermal expansion of copper, Hahn1 of the NIST reference data. The curve is a
quotient of cubics.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gnlin

DATA = Path(__file__).parents[1] / "tests" / "data" / "nist" / "Hahn1.dat"


def load(path):
    """Read ``(starts, certified, batch)`` from a file of NIST's Statistical Reference Datasets."""
    lines = path.read_text().splitlines()
    first, last = map(int, re.search(r"Data\s+\(lines (\d+) to (\d+)\)", "\n".join(lines)).groups())
    rows = [re.match(r"\s*b\d+ =\s+(\S+)\s+(\S+)\s+(\S+)", line) for line in lines]
    numbers = [[float(number) for number in row.groups()] for row in rows if row]
    *starts, certified = np.array(numbers).T
    y, x = np.array([line.split() for line in lines[first - 1 : last]], float).T
    return starts, certified, {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def residuals(b, batch):
    x = batch["x"]  # temperature
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    below = 1 + b[4] * x + b[5] * x**2 + b[6] * x**3
    return above / below - batch["y"]


def main():
    jax.config.update("jax_enable_x64", True)
    starts, certified, batch = load(DATA)
    objective = gnlin.Objective.least_squares(residuals)
    tx = gnlin.levenberg_marquardt(objective, scaling="marquardt", solver=gnlin.Dense())
    # Rounding alone leaves this gradient at about 6e-4: it is a sum over powers of x up to 6e8.
    params, info = gnlin.minimise(
        objective, jnp.asarray(starts[0]), tx, batch=batch, max_steps=200, tol=1e-2
    )

    # Number of digits that agree, up to the eleven that NIST certifies.
    digits = np.minimum(-np.log10(np.maximum(np.abs(params / certified - 1), 1e-11)), 11)
    print(f"{'':<4}{'certified':>18}{'fitted':>18}{'digits':>9}")
    for i, row in enumerate(zip(certified, params, digits, strict=True), start=1):
        print("b{:<3}{:>18.10e}{:>18.10e}{:>9.1f}".format(i, *row))
    print(f"residual sum of squares {2 * info.value:.10e}", end=" ")
    print(f"after {info.steps} steps, converged: {info.converged}")


if __name__ == "__main__":
    main()
