"""The algorithms, one a file, each readable beside its paper.

A method trains on one minibatch at a time. It knows neither where images come from nor where
results go: it sees tensors and a `Learner`.
"""

from freeadv_fast.methods.build import TrainingMethod, build_method

__all__ = ["TrainingMethod", "build_method"]
