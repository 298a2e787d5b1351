"""Inverse problems: operators, how they measure, and how a reconstruction is judged."""

from typing import Any

__all__ = [
    "box_inpainting",
    "gaussian_blur",
    "measure",
    "motion_blur",
    "nonlinear_blur",
    "phase_retrieval",
    "random_inpainting",
    "super_resolution",
    "task",
]


def __getattr__(name: str) -> Any:
    """Returns the tasks, when they are asked for: deepinv takes as long to import as all else."""
    if name in __all__:
        from diffoc.problems import tasks

        return getattr(tasks, name)
    raise AttributeError(f"module 'diffoc.problems' has no attribute {name!r}")
