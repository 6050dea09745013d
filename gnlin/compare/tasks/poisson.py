"""A boundary value problem that a network solves by itself: the test of curvature."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnlin import Objective
from gnlin.compare.tasks.task import Quality, Task

INTERIOR, WALL, GRID, HIDDEN = 256, 64, 50, 32

Layers = list[dict[str, jax.Array]]


def poisson_pinn() -> Task:
    """Poisson's equation on a square by a physics-informed network, MLP 2-32-1, least squares, full
    batch, float64.

    Data: −Δu = f on the unit square with u = 0 on the walls, where f = 2π²u and u = sin(πx)
    sin(πy). The equation is posed at 256 points, the boundary condition at 64, 16 on each wall. All
    are drawn uniformly by ``numpy.random.default_rng(0)``. The residuals are −Δu − f at the first,
    divided by √256, and u at the second, divided by √64. So the loss is half the sum of the two
    mean squares. Held out is u itself, on the centres of 50 × 50 cells. It is judged by
    ‖u_network − u‖ / ‖u‖.
    Network: inputs moved to the square [−1, 1]², a tanh hidden layer, linear output; 129
    parameters, weights are normal / √fan-in, biases zero. Second derivatives let the curvature
    range over many orders of magnitude, where methods without curvature get stuck. Methods with it
    get past that, and need float64 there.
    Budget: 50 000 gradients; target is a training loss of 1e-5.
    """
    generator = np.random.default_rng(0)
    interior = generator.uniform(size=(INTERIOR, 2))
    along = generator.uniform(size=WALL)
    # Wall k: coordinate k // 2 is k % 2, and the other one runs.
    which = np.arange(WALL) % 4
    fixed = (which % 2).astype(float)
    wall = np.where(
        (which < 2)[:, None], np.stack([fixed, along], axis=1), np.stack([along, fixed], axis=1)
    )
    centres = (np.arange(GRID) + 0.5) / GRID
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    return Task(
        name="poisson-pinn",
        objective=Objective.least_squares(residuals),
        init=init,
        train={"interior": interior, "source": 2 * np.pi**2 * solution(interior), "wall": wall},
        held_out={"x": grid, "u": solution(grid)},
        quality=Quality(
            "relative L2 error",
            Objective(at_points, relative_error),
            solved=1e-4,
            higher_is_better=False,
        ),
        batch_size=None,
        work=50_000,
        target=1e-5,
        residuals=residuals,
        double=True,
    )


def solution(points: np.ndarray) -> np.ndarray:
    """sin(πx) sin(πy) at points (N, 2)."""
    return np.sin(np.pi * points).prod(axis=1)


def init(key: jax.Array) -> Layers:
    """Weights drawn as normal / √fan-in, (fan-in, fan-out), and zero biases, in float64."""
    shapes = [(2, HIDDEN), (HIDDEN, 1)]
    return [
        {
            "w": jax.random.normal(each, shape, jnp.float64) / math.sqrt(shape[0]),
            "b": jnp.zeros(shape[1], jnp.float64),
        }
        for each, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def network(params: Layers, points: jax.Array) -> jax.Array:
    """Values (N,) of u at points (N, 2) of the unit square."""
    hidden = 2 * points - 1
    for layer in params[:-1]:
        hidden = jnp.tanh(jnp.dot(hidden, layer["w"]) + layer["b"][None])
    return (jnp.dot(hidden, params[-1]["w"]) + params[-1]["b"][None])[:, 0]


def laplacian(function, points: jax.Array) -> jax.Array:
    """Δ of a function of points (N, D), forward over forward.

    Each value of the function must depend on its own point alone.
    """

    def second_derivative(direction):
        tangent = jnp.broadcast_to(direction[None], points.shape)

        def slope(points):
            return jax.jvp(function, (points,), (tangent,))[1]

        return jax.jvp(slope, (points,), (tangent,))[1]

    directions = jnp.eye(points.shape[1], dtype=points.dtype)
    return jnp.stack([second_derivative(direction) for direction in directions]).sum(axis=0)


def residuals(params: Layers, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """−Δu − f in the interior and u on the walls, divided by the roots of the numbers of points."""
    interior, source, wall = batch["interior"], batch["source"], batch["wall"]
    equation = -laplacian(lambda points: network(params, points), interior) - source
    return {
        "interior": equation / math.sqrt(len(interior)),
        "wall": network(params, wall) / math.sqrt(len(wall)),
    }


def at_points(params: Layers, batch: dict[str, Any]) -> jax.Array:
    """The network's u at held-out points."""
    return network(params, batch["x"])


def relative_error(values: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """‖values − u‖ / ‖u‖."""
    return jnp.linalg.norm(values - batch["u"]) / jnp.linalg.norm(batch["u"])
