"""A classifier trained on the real training images, to check that generated images show their class."""

from __future__ import annotations

import numpy as np

from sra_fast.errors import Refused


def require_scikit_learn() -> None:
    """Refuse to continue without scikit-learn."""
    try:
        import sklearn.svm  # noqa: F401
    except ImportError as error:
        raise Refused("evaluate: scikit-learn is not installed; pip install scikit-learn") from error


class Judge:
    """A support vector machine with an RBF kernel on pixels.

    Args:
        features: (N, F) floating, real training images.
        labels: (N,) int.

    Raises:
        Refused: without scikit-learn.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        require_scikit_learn()
        from sklearn.svm import SVC

        self._machine = SVC(kernel="rbf", C=10.0, gamma="scale").fit(features, labels)

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of images that are assigned to their class."""
        return float((self._machine.predict(features) == labels).mean())
