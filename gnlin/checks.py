"""Checks on arguments: numbers, parts that users write themselves, and how a factory is called."""

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_number(name: str, value: Any, *, finite: bool = True, positive: bool = False) -> None:
    """Raise unless `value` is a finite number ≥ 0. A traced array has no value to check."""
    # To Python True is an integer. Arrays of NumPy and JAX are known by their dtype.
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be a number; got {value!r}")
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"`{name}` must be a single number; got an array of shape {shape}")
    if isinstance(value, Tracer):
        return
    # Written so that NaN fails, too.
    if positive and not float(value) > 0:
        raise ValueError(f"`{name}` must be positive; got {value!r}")
    if not 0 <= float(value) <= (sys.float_info.max if finite else math.inf):
        kind = "finite and at least 0" if finite else "at least 0"
        raise ValueError(f"`{name}` must be {kind}; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    check_number(name, value, positive=True)


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int = 1) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}")


def check_fraction(name: str, value: Any, *, zero: bool = True, one: bool = True) -> None:
    """Raise unless `value` lies between 0 and 1; `zero` and `one` say whether the ends count."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be a number; got {value!r}")
    if isinstance(value, Tracer):
        return
    low, high = (value >= 0 if zero else value > 0), (value <= 1 if one else value < 1)
    if not (low and high):  # also of a NaN
        interval = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"`{name}` must lie in {interval}; got {value!r}")


def check_transformation(name: str, tx: Any) -> None:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as optax.adam(1e-3); got {tx!r}"
        )


def check_part(name: str, part: Any, methods: Sequence[str], kind: str, example: str) -> None:
    """Raise unless `part`, the argument called `name`, is a record with these methods.

    Args:
        name: of the argument.
        part: a solver, a step rule, a policy, written by anybody.
        methods: names of the methods that will be called.
        kind: of the part, in words.
        example: code for one that serves.
    """
    if isinstance(part, type):
        raise TypeError(f"`{name}` must be a record, not its class; write {part.__name__}(...)")
    missing = [method for method in methods if not callable(getattr(part, method, None))]
    if missing:
        raise TypeError(
            f"`{name}` must be {kind} such as {example}, with the methods {', '.join(methods)}"
            f"{'; leave it out for the default' if part is None else ''}; "
            f"got {part!r}, which lacks {', '.join(missing)}"
        )


def returned(call: str, value: Any, *kinds: type) -> Any:
    """The tuple that a method of a part returned; raise unless its items are of these kinds."""
    if type(value) is not tuple or len(value) != len(kinds):
        raise TypeError(f"`{call}` must return a tuple of {len(kinds)}; got {type(value).__name__}")
    for place, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        if not isinstance(item, kind):
            raise TypeError(
                f"`{call}` must return a {kind.__name__} as item {place}; got {type(item).__name__}"
            )
    return value


def check_state(opt_state: Any, init: Callable[[Any], Any], params: Any) -> None:
    """Raise unless `opt_state` has the form that `init` gives it for these parameters.

    A part whose `init` needs values, and not shapes alone, cannot be checked.
    """
    try:
        expected = jax.eval_shape(init, params)
    except jax.errors.JAXTypeError:
        return
    check_restored(opt_state, [type(expected)])
    found, wanted = _shapes_by_path(opt_state), _shapes_by_path(expected)
    if found == wanted and jax.tree.structure(opt_state) == jax.tree.structure(expected):
        return
    differing = next(
        (path for path in {**wanted, **found} if found.get(path) != wanted.get(path)), ""
    )
    raise ValueError(
        "`opt_state` does not match `params`; call tx.init(params) of this transform with them. "
        "A run goes on with the transform, and the settings of its solver, that it began with. "
        f"opt_state{differing} is {found.get(differing, 'not there')}, and should be "
        f"{wanted.get(differing, 'not there')}"
    )


def check_restored(opt_state: Any, kinds: Sequence[type]) -> None:
    """Raise if a state is in `opt_state` as a dictionary of its fields.

    A checkpoint that is restored without a target gives such dictionaries. In them no state would
    be found.
    """
    names = {frozenset(getattr(kind, "_fields", ())): kind.__name__ for kind in kinds}
    lost: list[str] = []

    def is_lost(node: Any) -> bool:
        name = names.get(frozenset(node), "") if isinstance(node, Mapping) and node else ""
        lost.extend([name] if name else [])
        return bool(name)

    jax.tree.leaves(opt_state, is_leaf=is_lost)
    if lost:
        raise ValueError(
            f"`opt_state` has a dictionary in place of a {lost[0]}: it was restored without its "
            "form. Restore onto the form of all that was saved, with "
            "jax.eval_shape(tx.init, params) in the place of the state"
        )


def _shapes_by_path(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"an array of shape {jnp.shape(leaf)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def check_metrics(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an update; raise unless their names are those of `init`."""
    if metrics.keys() != before.keys():
        new, gone = sorted(metrics.keys() - before.keys()), sorted(before.keys() - metrics.keys())
        raise TypeError(
            "the statistics of a solver, a rule or a policy must have the same names in `init` and "
            f"later; {new} are new and {gone} are missing"
        )
    return dict(metrics)


T = TypeVar("T", bound=Callable[..., Any])


def shows_signature(called: T) -> T:
    """Make the error of a call that does not fit show the call that does.

    The caller of an old signature, or of a misspelt option, then reads the right one. It decorates
    functions and records.
    """
    if isinstance(called, type):
        record: Any = called
        # `__init__` is replaced and not the class, which stays one for `isinstance`.
        record.__init__ = _showing(record.__init__, record.__name__)
        return record
    return _showing(called, getattr(called, "__name__", "call"))


def shows_update(update: T) -> T:
    """The same for the update of a transformation, whose data are given by name."""
    return _showing(update, "tx.update")


def _showing(function: T, name: str) -> T:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            # Before the call, so that a TypeError from inside the function stays as it is.
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}. Write {name}({_written(signature)})") from None
        return function(*args, **kwargs)

    return cast(T, call)


def _written(signature: inspect.Signature) -> str:
    """``objective, *, damping=GainRatio(...)``: parameters without annotations."""
    parts = []
    for parameter in signature.parameters.values():
        if parameter.name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = parameter.default
        if default is parameter.empty:
            parts.append(parameter.name)
        elif dataclasses.is_dataclass(default):
            parts.append(f"{parameter.name}={type(default).__name__}(...)")
        else:
            parts.append(f"{parameter.name}={default!r}")
    return ", ".join(parts)
