"""The kernel J Jᵀ: rows of the Jacobian, their products, what kernels say, and training while they stand still."""

from gnlin.kernel.alignment import (
    effective_rank,
    kernel_alignment,
    kernel_distance,
    kernel_spectrum,
)
from gnlin.kernel.lazy import LazyTraining, lazy_training
from gnlin.kernel.ntk import empirical_ntk, ntk_vector_product

__all__ = [
    "LazyTraining",
    "effective_rank",
    "empirical_ntk",
    "kernel_alignment",
    "kernel_distance",
    "kernel_spectrum",
    "lazy_training",
    "ntk_vector_product",
]
