"""How well a contour agrees with a physician's. A miss is the worst score, never dropped from a mean."""

import numpy as np
from numpy.typing import NDArray


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice similarity coefficient of two masks of one shape; 1.0 where both are empty, 0.0 where one is."""
    total = int(prediction.sum()) + int(truth.sum())
    return 1.0 if total == 0 else 2 * int((prediction & truth).sum()) / total
