"""Frechet distance between two sets of feature vectors, each taken as a Gaussian.

    |m1 - m2|^2 + trace(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))

With the features of one particular Inception network, which are not used here, this is the FID.

Source: Dowson and Landau, "The Frechet Distance between Multivariate Normal Distributions", 1982, equation (4).
"""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two sets.

    Args:
        a, b: (N, F) and (M, F) floating; N, M > 1. Covariances may be singular.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    gap = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = _square_root(cov_a)
    # The trace of a square root is the sum of the square roots of the eigenvalues. They are real and exact for this
    # symmetric matrix; a general matrix square root of S1 S2 loses digits for singular covariances.
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum())


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
