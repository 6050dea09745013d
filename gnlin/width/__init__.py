"""The spectral condition: how large weights and updates are for features to move at every width."""

from gnlin.width.condition import scale_by_spectral_condition
from gnlin.width.fans import Fans
from gnlin.width.multipliers import (
    SpectralNorms,
    scale_by_maximal_update_adam,
    scale_by_maximal_update_sgd,
    spectral_init,
    spectral_report,
)

__all__ = [
    "Fans",
    "SpectralNorms",
    "scale_by_maximal_update_adam",
    "scale_by_maximal_update_sgd",
    "scale_by_spectral_condition",
    "spectral_init",
    "spectral_report",
]
