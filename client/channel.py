"""How a server is reached: gRPC, through TLS where the address says so.

Hidden here: that gRPC complains in its own log, and that its limits are made for small messages.
"""

import os
from typing import TYPE_CHECKING, Any

from anatomynet.client.address import ServerAddress

if TYPE_CHECKING:
    from tritonclient.grpc import InferenceServerClient

# The largest message protobuf allows; gRPC's own limit on answers is 4 MB.
LARGEST_MESSAGE = 2**31 - 1
# gRPC waits up to two minutes before it looks again whether a server is back.
FIRST_RECONNECT_MS = 250
LONGEST_RECONNECT_MS = 2000


def open_client(address: ServerAddress) -> "InferenceServerClient":
    """A client that connects only when it is asked something."""
    # Its log would tell in many lines what an error then tells in one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from tritonclient.grpc import InferenceServerClient

    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        # Hospitals set http_proxy for everything; no proxy leads to this machine.
        ("grpc.enable_http_proxy", int(not address.is_loopback)),
        # Where a name stands for several servers, each volume goes to the next.
        ("grpc.lb_policy_name", "round_robin"),
        ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", FIRST_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_MS),
        # Another client of this process may see the server gone before this one does.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return InferenceServerClient(address.target, ssl=address.secure, channel_args=options)
