"""One damped linear system, several solvers.

* `protocols`: a solver, a preconditioner, and the records that they return. Start here.
* `cg`: conjugate gradients, for systems of any size.
* `kronecker`: factors for each layer, a solver by itself and a preconditioner.
* `factors`: moments of one layer.
* `factorisation`, `sides`: the inverse of the damped product of moments.
* `direction`: the product of this inverse with a vector.
* `inverses`, `low_rank`: inverses of many small matrices at once, and of large ones.
* `eigenbasis`: Adam in the eigenbasis of these factors.
* `layer_table`: the layers of a model, as `kronecker` sees them.
* `jacobi`, `nystrom`: preconditioners.
* `dense`, `dual`: direct solves, in the space of the parameters and in that of the outputs.
* `blocks`: a system for each group of parameters.
* `sampling`: samples with the covariance H.
"""

from gnlin.solve.blocks import Blocks
from gnlin.solve.cg import CG
from gnlin.solve.dense import Dense
from gnlin.solve.dual import Dual
from gnlin.solve.eigenbasis import Eigenbasis
from gnlin.solve.jacobi import Jacobi
from gnlin.solve.kronecker import Kronecker
from gnlin.solve.layer_table import LayerRow, LayerTable, layers
from gnlin.solve.nystrom import Nystrom
from gnlin.solve.protocols import Preconditioner, Preparation, RadiusSolver, Solution, Solver

__all__ = [
    "CG",
    "Blocks",
    "Dense",
    "Dual",
    "Eigenbasis",
    "Jacobi",
    "Kronecker",
    "LayerRow",
    "LayerTable",
    "Nystrom",
    "Preconditioner",
    "Preparation",
    "RadiusSolver",
    "Solution",
    "Solver",
    "layers",
]
