"""What a number given as an argument may be."""

import math
import sys
from typing import Any

import numpy as np
from jax.core import Tracer


def check_number(name: str, value: Any, *, finite: bool = True, positive: bool = False) -> None:
    """Raise unless `value` is a finite number ≥ 0. Traced arrays pass: their values are not known yet."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or hasattr(value, "dtype")):
        raise TypeError(f"`{name}` must be a number; got {value!r}")
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"`{name}` must be a single number; got an array of shape {shape}")
    if isinstance(value, Tracer):
        return
    if positive and not float(value) > 0:
        raise ValueError(f"`{name}` must be positive; got {value!r}")
    if not 0 <= float(value) <= (sys.float_info.max if finite else math.inf):
        raise ValueError(
            f"`{name}` must be {'finite and ' if finite else ''}at least 0; got {value!r}"
        )


def check_positive(name: str, value: Any) -> None:
    check_number(name, value, positive=True)


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_integer(name: str, value: Any, least: int = 1) -> None:
    if not is_integer(value) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}")
