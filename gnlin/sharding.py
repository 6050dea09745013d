"""Meshes with explicit axes, where the type of an array says how it is sharded.

There JAX asks for the sharding of each result that could have several. The passes through a model
are the user's, and have theirs. The algebra between them is ours. `tree` and `solve` say here that
a vector of all entries is on every device, or that XLA is to choose. Without such a mesh nothing
here does anything.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

_REPLICATED = PartitionSpec()


def unsharded(leaf: jax.Array) -> jax.Array:
    """The same array, whole on every device."""
    sharding = _explicit(leaf)
    if sharding is None:
        return leaf
    # JAX 0.10 wants an entry for each axis under `vmap`.
    everywhere = PartitionSpec(*[None] * jnp.ndim(leaf))
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, everywhere))


def sharded_like(leaf: jax.Array, like: Any) -> jax.Array:
    """The same array, sharded like another or like its shape."""
    sharding = _explicit(like)
    return leaf if sharding is None else jax.sharding.reshard(leaf, sharding)


def check_mesh(tree: Any) -> None:
    """Raise where arrays lie on a mesh with explicit axes, and the program is in none."""
    if not hasattr(jax.sharding, "auto_axes") or not jax.sharding.get_abstract_mesh().empty:
        return
    explicit = jax.sharding.AxisType.Explicit
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if explicit in mesh.axis_types:
            raise ValueError(
                f"parameters or data lie on a mesh with the explicit axes {mesh.axis_names}: call "
                "the update inside `with jax.set_mesh(mesh):`"
            )


def in_this_mesh(leaf: Any) -> Any:
    """The same array, whole on every device where it comes from another mesh.

    Inside `jax.sharding.auto_axes` the axes are of another kind, and JAX does not mix the two.
    """
    if not isinstance(leaf, jax.Array) or not hasattr(jax.sharding, "auto_axes"):
        return leaf
    mesh, now = jax.typeof(leaf).sharding.mesh, jax.sharding.get_abstract_mesh()
    if mesh.empty or now.empty or mesh == now:
        return leaf
    return jax.sharding.reshard(leaf, _REPLICATED)


def by_compiler(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, in which XLA chooses the shardings. The results are unsharded.

    Arguments are trees of arrays and of anything else. The function must not close over arrays.
    """
    leaves, structure = jax.tree.flatten(arguments)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    if all(_explicit(leaves[place]) is None for place in places):
        return function(*arguments)

    def inside(*arrays: jax.Array) -> Any:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return function(*jax.tree.unflatten(structure, whole))

    run = jax.sharding.auto_axes(inside, out_sharding=_REPLICATED)
    return run(*[leaves[place] for place in places])


def _explicit(leaf: Any) -> NamedSharding | None:
    """How an array is sharded over explicit axes; `None` where it is not."""
    of = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    sharding: Any = getattr(of, "sharding", None)
    spec, mesh = getattr(sharding, "spec", None), getattr(sharding, "mesh", None)
    if mesh is None or spec is None or all(axes is None for axes in spec):
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named = [axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
    explicit = jax.sharding.AxisType.Explicit
    return sharding if any(kinds[axis] == explicit for axis in named) else None
