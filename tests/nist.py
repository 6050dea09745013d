"""The NIST StRD nonlinear regression problems in tests/data/nist: loader and models."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

DATA = Path(__file__).parent / "data" / "nist"


class Fit(NamedTuple):
    name: str
    starts: tuple[np.ndarray, np.ndarray]
    certified: np.ndarray
    y: np.ndarray
    x: np.ndarray  # (N,), or (N, 2) for two predictors
    sum_of_squares: float


def load(name: str) -> Fit:
    lines = (DATA / f"{name}.dat").read_text().splitlines()
    first, last = (
        int(n) for n in re.search(r"Data\s+\(lines (\d+) to (\d+)\)", "\n".join(lines)).groups()
    )
    rows = [re.match(r"\s*b\d+ =\s+(\S+)\s+(\S+)\s+(\S+)", line) for line in lines[: first - 1]]
    starts_and_certified = np.array([[float(v) for v in row.groups()] for row in rows if row])
    data = np.array([[float(v) for v in line.split()] for line in lines[first - 1 : last]])
    total = next(
        float(line.split(":")[1]) for line in lines if line.startswith("Residual Sum of Squares")
    )
    x = data[:, 1] if data.shape[1] == 2 else data[:, 1:]
    return Fit(
        name, tuple(starts_and_certified[:, :2].T), starts_and_certified[:, 2], data[:, 0], x, total
    )


def _gauss(b, x):
    peaks = b[2] * jnp.exp(-((x - b[3]) ** 2) / b[4] ** 2) + b[5] * jnp.exp(
        -((x - b[6]) ** 2) / b[7] ** 2
    )
    return b[0] * jnp.exp(-b[1] * x) + peaks


def _chwirut(b, x):
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def _hahn(b, x):
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (
        1 + b[4] * x + b[5] * x**2 + b[6] * x**3
    )


def _kirby(b, x):
    return (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)


def _lanczos(b, x):
    return b[0] * jnp.exp(-b[1] * x) + b[2] * jnp.exp(-b[3] * x) + b[4] * jnp.exp(-b[5] * x)


MODELS: dict[str, Callable] = {
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Hahn1": _hahn,
    "Kirby2": _kirby,
    "Lanczos3": _lanczos,
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2.0),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * jnp.exp(-b[2] * x[:, 1]),
}


def residuals(name: str) -> Callable:
    """``residuals(params, batch)`` with ``batch = {"x", "y"}``; Nelson's model is of log y."""
    model = MODELS[name]

    def residual(params, batch):
        observed = jnp.log(batch["y"]) if name == "Nelson" else batch["y"]
        return model(params, batch["x"]) - observed

    return residual


def correct_digits(params, certified) -> float:
    """Fewest correct significant digits over the parameters (NIST's LRE)."""
    error = np.abs(np.asarray(params) - certified) / np.abs(certified)
    return (
        float(np.min(-np.log10(np.maximum(error, 1e-16))))
        if np.all(np.isfinite(error))
        else -np.inf
    )
