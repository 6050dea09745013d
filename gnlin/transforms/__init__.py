"""Elements of an Optax chain, and the rules that they take.

* `gauss_newton`: the default optimiser, and the damped step of the textbook. Start here.
* `damping`, `step_length`: its rules for λ and for the length of a step.
* `levenberg_marquardt`: full steps that the loss must confirm.
* `iterative_linearisation`: the linearised model, trained by any optimiser.
* `period`, `layer_periods`, `line_search`: its rules for the anchor, and the end of a cycle.
* `prox_linear`: all inner steps in one update.
* `drift`: the kernel of the model that is trained.
* `state`: anchors, predictions and metrics, read from the state.
"""
