"""How a server is reached: gRPC, through TLS where the address says so, with what opens a proxy.

Hidden here: that gRPC complains in its own log, and that its limits are made for small messages.
"""

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anatomynet.client.access import API_KEY_HEADER, NO_ACCESS, Access
from anatomynet.client.address import ServerAddress

if TYPE_CHECKING:
    from grpc import ChannelCredentials
    from tritonclient.grpc import InferenceServerClient

# The largest message protobuf allows; gRPC's own limit on answers is 4 MB.
LARGEST_MESSAGE = 2**31 - 1
# gRPC waits up to two minutes before it looks again whether a server is back.
FIRST_RECONNECT_MS = 250
LONGEST_RECONNECT_MS = 2000
# To connect, TLS included, once: less than a question's own time-out, which would not say what took so long.
HANDSHAKE_MS = 4000
LOOPBACK_TIMEOUT_S = 0.2


def open_client(address: ServerAddress, access: Access = NO_ACCESS) -> "InferenceServerClient":
    """A client that connects only when it is asked something.

    Raises:
        ServerError: what asks for TLS was given, and the address is without.
    """
    access.check_fits(address)
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
        ("grpc.min_reconnect_backoff_ms", HANDSHAKE_MS),  # so it is called, and that is what gRPC takes it for
        ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_MS),
        # Another client of this process may see the server gone before this one does.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    target = address.target
    if address.host == "localhost":
        # Two addresses, at one of which nobody listens as a rule; gRPC tells only what went wrong at the last it tried.
        target = _listening_address(address.port) or target
        options.append(("grpc.ssl_target_name_override", address.host))  # the name that its certificate is for
    credentials = _credentials(access) if address.secure else None
    client = InferenceServerClient(target, creds=credentials, channel_args=options)
    if address.secure and access.api_key:
        client.register_plugin(_key_sender(access.api_key))
    return client


def _listening_address(port: int) -> str | None:
    for host in ("127.0.0.1", "::1"):
        try:
            socket.create_connection((host, port), timeout=LOOPBACK_TIMEOUT_S).close()
        except OSError:
            continue
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return None


def _credentials(access: Access) -> "ChannelCredentials":
    import grpc

    return grpc.ssl_channel_credentials(access.ca, access.key, access.certificate)


def _key_sender(api_key: str) -> Callable[[Any], None]:
    """A plugin of tritonclient's that puts the key on every call.

    Call credentials of gRPC's would be Python that a thread of gRPC's own asks for, or lets go of, while it holds a
    lock. Who closes the channel may wait for that lock and hold Python's, for which that thread waits: grpcio 1.85 hung
    so, once.
    """

    def send_key(request: Any) -> None:
        request.headers[API_KEY_HEADER] = api_key

    return send_key
