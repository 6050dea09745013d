"""The structure of a model, proved from its jaxpr: layers, and the independence of examples.

* `layers`: which leaves are dense layers, and with which inputs and cotangents.
* `independence`: which arrays depend on one example alone.
* `same_program`: whether a model does the same for any number of examples.
* `parts`: whether a batch may be cut, and how.
"""
