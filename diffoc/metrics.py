"""Metrics of images and of sets of images."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    r"""The squared Fréchet distance between Gaussians fitted to two sets of features.

    .. math:: \|\mu_1 - \mu_2\|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    It is what is called FID when the features are Inception's; sets of fewer images than features,
    or of different sizes, bias it upwards.

    Args:
        first, second: (N, d) and (M, d), N and M at least 2.

    Raises:
        ValueError: for other shapes, or values that are not finite.

    Source: Heusel et al. 2017, arXiv:1706.08500, Eq. 6.
    """
    for name, features in (("first", first), ("second", second)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (N >= 2, d)")
        if not features.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"first and second have {first.shape[1]} and {second.shape[1]} features, expected equal"
        )
    a, b = (features.double().cpu().numpy() for features in (first, second))
    difference = a.mean(0) - b.mean(0)
    c1, c2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # The square root's trace from the eigenvalues of the symmetric C1^1/2 C2 C1^1/2, which has
    # those of C1 C2 and stays real where a covariance is singular.
    values, vectors = scipy.linalg.eigh(c1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(scipy.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(c1) + np.trace(c2) - 2 * overlap)
