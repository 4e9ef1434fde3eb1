"""What Python runs first in the tests' servers: see triton_servers.holding."""

import os
import time
from pathlib import Path

from anatomynet.engine import runtime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.volume import HounsfieldArray

FOLDER = Path(os.environ["ANATOMYNET_HOLDING_FOLDER"])
check_input = runtime.check_input


def check_input_once_let(hu: HounsfieldArray, config: ModelConfig) -> None:
    """As every runtime does before it computes."""
    for hold in FOLDER.glob("*.hold"):
        hold.with_suffix(".held").touch()
        while hold.exists():
            time.sleep(0.01)
    check_input(hu, config)


runtime.check_input = check_input_once_let
