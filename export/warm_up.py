"""The first volumes of a server on a GPU, drawn before it is READY: the first patient does not wait until memory is
allocated and kernels are compiled or picked.

Triton's own warm-up (config.pbtxt) would draw the same on a CPU, where these sizes take seconds and gain nothing.
"""

import numpy as np

from anatomynet.engine.errors import AnatomyNetError
from anatomynet.engine.limits import SizeLimit
from anatomynet.engine.runtime import Runtime
from anatomynet.export.triton_models import COMMON_SHAPES


def warm_up(runtime: Runtime, size_limit: SizeLimit) -> list[str]:
    """Draws an empty CT of each common size, the largest first: in what it leaves allocated the others have room.

    Args:
        runtime: on a GPU.
        size_limit: of the served model.

    Returns:
        A line for each size that could not be drawn, as for want of memory: smaller CTs are served all the same.
    """
    faults = []
    for shape in sorted(COMMON_SHAPES, reverse=True):
        try:
            size_limit.check(shape, runtime.model)
            runtime.infer(np.zeros(shape, np.int16))
        except AnatomyNetError as error:
            faults.append(str(error))
    return faults
