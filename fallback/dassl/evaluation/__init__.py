from .build import EVALUATOR_REGISTRY, Classification, build_evaluator  # noqa: F401
