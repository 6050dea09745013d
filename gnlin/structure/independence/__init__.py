"""Independence of examples: which arrays of a program depend on one example alone.

A pull-back u ↦ Jᵀu takes a cotangent (N, ...) of the outputs of N examples to cotangents inside the
network, and to sums over examples, the gradients. Say that slice n of an array depends on slice n
of u alone. Then one run with a cotangent for every example does the work of N runs. Shapes cannot
tell: with batch normalisation or attention over the batch they are the same. So the equations are
followed.

* `values`: the properties that an array can have.
* `rules`: the table, from a primitive to its rule. Start here.
* `rearranging`, `products`, `reductions`: the rules themselves.
* `pull_back`: follows a pull-back, and keeps sums over examples open.
* `proof`: whether a model treats its examples one by one.
"""

from gnlin.structure.independence.proof import keeps_examples_apart
from gnlin.structure.independence.pull_back import run_by_example
from gnlin.structure.independence.values import ByExample, Summed

__all__ = ["ByExample", "Summed", "keeps_examples_apart", "run_by_example"]
