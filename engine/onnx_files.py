"""ONNX files and the two engines that compute them: how each opens a file, and what it says of one it cannot compute.

For the runtimes of the network and of the region finder.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from anatomynet.engine.errors import ModelError
from anatomynet.engine.machine import available_cores
from anatomynet.engine.volume import HounsfieldArray

if TYPE_CHECKING:
    import onnxruntime
    import openvino

INSTALL_HINT = "pip install 'anatomynet[local]'"
CPU_PROVIDER = "CPUExecutionProvider"


def openvino_graph(path: Path) -> openvino.Model:
    """Reads an ONNX file by the ONNX reader alone: OpenVINO's own choice tries every format on a damaged one, noisily.

    Raises:
        ModelError: no such file, or a damaged one.
    """
    from openvino import frontend

    check_file(path)
    reader = frontend.FrontEndManager().load_by_framework("onnx")
    failures = (
        frontend.GeneralFailure,
        frontend.NotImplementedFailure,
        frontend.OpConversionFailure,
        frontend.OpValidationFailure,
    )
    try:
        return reader.convert(reader.load(str(path)))
    except (RuntimeError, *failures) as error:  # the failures are no RuntimeErrors
        raise damaged_file(path, error) from error


_one_core = threading.Lock()


def openvino_core() -> openvino.Core:
    """The process's only one, kept to its end.

    OpenVINO gives the thread that a core first compiles in a stack for the handlers of signals, and unmaps it with the
    core: closed in another thread, or before a core that was opened later, it made the next Ctrl-C a crash.
    """
    with _one_core:  # whoever loads the network and the region finder compiles them in two threads
        return _core()


@functools.cache
def _core() -> openvino.Core:
    import openvino

    return openvino.Core()


def openvino_options() -> dict[str, object]:
    """How OpenVINO compiles a graph for one volume at a time."""
    import openvino
    from openvino import properties

    return {
        properties.hint.performance_mode(): properties.hint.PerformanceMode.LATENCY,
        # On CPUs with AMX or AVX512-BF16 the default is bfloat16, which moves contours.
        properties.hint.inference_precision(): openvino.Type.f32,
        properties.inference_num_threads(): available_cores(),
    }


def onnxruntime_options() -> onnxruntime.SessionOptions:
    """How ONNX Runtime opens a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 4  # fatal: errors are raised, and told once
    return options


def onnxruntime_failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a file that it cannot read, or a volume that it cannot compute."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    return (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.InvalidProtobuf,
        states.NotImplemented,
        states.RuntimeException,
    )


def check_file(path: Path) -> None:
    """Raises ModelError where there is no such file."""
    if not path.is_file():
        raise ModelError(f"no model {path}: expected an ONNX file that anatomynet-export wrote")


def damaged_file(path: Path, error: Exception) -> ModelError:
    """What to raise for an ONNX file that cannot be read."""
    return ModelError(
        f"{path} is damaged or not ONNX ({_last_line(error)}): expected a file that anatomynet-export wrote; "
        "export it, or install the package, again"
    )


def failed(hu: HounsfieldArray, runtime: str, error: Exception) -> ModelError:
    """What to raise where a runtime, named by its description, could not compute a CT."""
    return ModelError(
        f"{runtime} could not compute a volume of {hu.shape} voxels ({_last_line(error)}); "
        "a smaller volume, or more memory, may help"
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
