"""The spectral condition: the size of weights and updates at which features move at any width."""

from gnlin.width.condition import scale_by_spectral_condition
from gnlin.width.fans import Fans
from gnlin.width.initial import spectral_init
from gnlin.width.multipliers import scale_by_maximal_update_adam, scale_by_maximal_update_sgd
from gnlin.width.report import SpectralNorms, spectral_report

__all__ = [
    "Fans",
    "SpectralNorms",
    "scale_by_maximal_update_adam",
    "scale_by_maximal_update_sgd",
    "scale_by_spectral_condition",
    "spectral_init",
    "spectral_report",
]
