"""Random models and random pipelines for property tests: those of the package."""

from passes.testing import pipelines, random_models

__all__ = ["pipelines", "random_models"]
