"""The optimisers a second time: dense, naive, in float64 NumPy, from their formulas.

These modules are a specification in code. Of the package they use nothing: an objective lends them
its two functions, `model` and `loss`. Parameters, outputs and steps are flat vectors.
"""
