"""Where the commands begin: until they are imported and can tell of it, Ctrl-C ends them without a traceback."""

import signal
from importlib import import_module


def client() -> None:
    """`anatomynet-client`."""
    _run("anatomynet.client.cli")


def train() -> None:
    """`anatomynet-train`."""
    _run("anatomynet.engine.train")


def export() -> None:
    """`anatomynet-export`."""
    _run("anatomynet.export.cli")


def tritonserver() -> None:
    """`tritonserver`."""
    _run("anatomynet.export.launcher")


def _run(module: str) -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # and from then on see engine.stops
    import_module(module).main()
