"""Parameters that `optax.masked` and `optax.partition` hide: the problem of the other ones.

Both wrappers hand the transform a tree with `optax.MaskedNode` holes, and the model cannot be
evaluated there. The holes are filled with constants from the whole tree, ``all_params``. Every
update of `gnlin.transforms` begins here; `linearisation` comes next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from gnlin import tree
from gnlin.checks import check_state
from gnlin.problem.objective import Objective, check_params
from gnlin.tree import Params


def problem_of_update(
    objective: Objective,
    params: Params,
    all_params: Params | None,
    opt_state: Any,
    init: Callable[[Params], Any],
) -> Objective:
    """The problem of one update, with its arguments checked: every `update` begins here.

    Args:
        objective: the problem.
        params: θ, with holes where a mask hides leaves.
        all_params: the whole tree, where there are holes.
        opt_state: the state of the transform.
        init: its first function, for the form of the state.

    Raises:
        ValueError, TypeError: as `visible_problem`; `opt_state` is not that of these parameters.
    """
    if any(map(_is_state, jax.tree.leaves(params, is_leaf=_is_state))):
        raise TypeError(
            "`params` is a state of an optimiser: the order is "
            "tx.update(grads, opt_state, params, batch=batch)."
        )
    problem = visible_problem(objective, params, all_params)
    check_state(opt_state, init, params)
    return problem


def _is_state(node: Any) -> bool:
    """Whether it is a state of one of the transforms, which all have metrics."""
    ours = type(node).__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours and "metrics" in getattr(node, "_fields", ())


def visible_problem(objective: Objective, params: Params, all_params: Params | None) -> Objective:
    """The objective as a function of the leaves that are visible.

    Without holes the objective is returned as it is.

    Raises:
        ValueError, TypeError: `params` is missing or cannot be trained; it has holes and
            `all_params` does not fill them.
    """
    if params is None or all_params is None or not tree.has_holes(params):
        # This check also refuses missing parameters, and holes without `all_params`.
        objective.check_params(params)
        return objective
    if tree.has_holes(all_params):
        raise ValueError(
            "`all_params` has optax.MaskedNode holes, so the model cannot be evaluated. Leave "
            "mask_compatible_extra_args=False in optax.masked: True masks `all_params`, too."
        )
    check_params(all_params)
    check_params(params, allow_holes=True)
    try:
        # Only for its errors: the model fills the holes itself, each time it is called.
        tree.fill_holes(params, all_params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`all_params` must be the whole tree of parameters that was masked: {error}"
        ) from error
    return with_constants(objective, all_params)


def with_constants(objective: Objective, constants: Params) -> Objective:
    """The objective as a function of the leaves that are holes elsewhere than in `constants`."""
    return dataclasses.replace(objective, model=_Filled(objective.model, constants))


# Compared by identity, for arrays have no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class _Filled:
    """A model of some leaves, where `constants` holds the others."""

    model: Callable[..., Any]
    constants: Params
    fills_holes: ClassVar[bool] = True  # `Objective.check_params` then allows for holes

    def __call__(self, visible, batch=None):
        return self.model(tree.fill_holes(visible, self.constants), batch)
