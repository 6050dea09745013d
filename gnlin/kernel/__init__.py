"""The kernel J Jᵀ of a linearised model.

* `rows`: rows of J, by one pull-back for each output of an example.
* `products`: products of rows, leaf by leaf.
* `gram`: kernel matrices of linearisations, for solvers.
* `assembly`: kernels of two batches, within a bound on memory.
* `ntk`: the empirical neural tangent kernel, and products with it.
* `alignment`: comparison of kernels.
* `lazy`: training while the kernel stands still, in closed form.
"""

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
