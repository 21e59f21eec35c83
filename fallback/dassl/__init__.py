"""A small stand-in for Dassl.pytorch, used where the real package is not installed.

It offers the part of Dassl's interface that prompt-learning code (CoOp and its descendants) calls, under the same
names, with the same configuration keys, defaults and log lines: configuration, data loading, training loop,
evaluation, optimisers and learning-rate schedules. Backbones, bundled data sets and the domain-adaptation,
domain-generalisation and semi-supervised trainers are not here; for those install Dassl.pytorch, which takes
precedence because this folder stands last on ``sys.path``.
"""

__version__ = "0.6.3+fallback"
