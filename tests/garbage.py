"""What no client sends: thousands of requests that are noise, damaged, cut off, or larger than they may be."""

import json
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.random_network import smooth_hu

grpc = pytest.importorskip("tritonclient.grpc")


# Shapes that Triton 2.51 lets through and numpy refuses: the model's process ends before model.py sees them.
NEGATIVE_SIDES = (-2, -2, 2)
OVERFLOWING_SIDES = (2**63 - 1, 0, 1)


def http_garbage(rng: random.Random, good: bytes, header_length: int) -> bytes:
    """One request to the HTTP port: noise, a good one cut off, one with bits turned, or lengths that lie."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 600))
    body, path = good, "/v2/models/anatomynet/infer"
    length: object = len(body)
    if kind == 1:
        body = good[: rng.randrange(len(good))]
        length = rng.choice([len(body), len(good)])
    elif kind == 2:
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(header_length if rng.random() < 0.8 else len(good))] = rng.randrange(256)
        body = bytes(damaged)
    elif kind == 3:
        length = rng.choice([-1, 2**31, 2**63, "many", len(body) + 1])
    elif kind == 4:
        sizes = [rng.choice([0, -1, 1, 2**31, 2**62, 2**64, 8, 32]) for _ in range(rng.randrange(6))]
        head = str(
            {"inputs": [{"name": "CT", "datatype": "INT16", "shape": sizes, "parameters": {"binary_data_size": 9}}]}
        )
        body = head.replace("'", '"').encode() + b"123456789"
        header_length, length = len(head), len(body)
    else:
        path = rng.choice(
            ["/v2/models/" + "a" * 5000, "/v2/../../etc/passwd", "/v2/models/anatomynet/versions/99/infer", "/%00"]
        )
    lie = rng.choice([header_length, header_length, 0, -1, 2**31, 2**63, len(body) + 9])
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {length}",
        f"Inference-Header-Content-Length: {lie}",
    ]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def http2_frame(kind: int, stream: int, payload: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(payload) if length is None else length)[1:]
        + struct.pack(">BBI", kind, flags, stream)
        + payload
    )


def grpc_garbage(rng: random.Random) -> bytes:
    """What a connection to the gRPC port says: noise, HTTP/2 with frames that are damaged, or a call that lies."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 600))
    said = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, b"")
    if kind in (1, 2):
        return said + lying_call(rng)
    for _ in range(rng.randrange(1, 8)):
        length = rng.choice([None, None, 0, 2**24 - 1, 5])
        payload = rng.randbytes(rng.choice([0, 4, 8, 100]))
        said += http2_frame(
            rng.randrange(12), rng.choice([0, 1, 3, 2**31 - 1]), payload, flags=rng.randrange(256), length=length
        )
    return said[: rng.randrange(24, len(said) + 1)]


def lying_call(rng: random.Random) -> bytes:
    """A call of ModelInfer that is one up to its message, which is oversized by its own word, cut off or packed."""
    literals = {
        b"content-type": b"application/grpc",
        b"te": b"trailers",
        b"grpc-encoding": rng.choice([b"identity", b"gzip", b"no such"]),
        b"grpc-timeout": rng.choice([b"1S", b"99999999H", b"-1S", b"S"]),
    }
    path = b"/inference.GRPCInferenceService/ModelInfer"
    # HPACK (RFC 7541): POST, http, then literals that are not indexed.
    head = b"\x83\x86" + b"\x04" + bytes([len(path)]) + path + b"\x01\x09localhost"
    for name, value in literals.items():
        head += b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
    length = rng.choice([0, 1, 100, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
    message = struct.pack(">BI", rng.choice([0, 0, 1, 7]), length) + rng.randbytes(rng.choice([0, 50, 5000]))
    call = http2_frame(1, 1, head, flags=4) + http2_frame(0, 1, message, flags=rng.choice([0, 1]))
    return call if rng.random() < 0.7 else call[: rng.randrange(len(call))]


def say(port: int, said: bytes) -> None:
    """And hang up, whatever the answer; a server that is gone is an error."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(0.02)
        try:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4096)
        except (TimeoutError, ConnectionError, OSError):
            return


def deadly_message() -> bytes:
    """Of ModelInfer, with NEGATIVE_SIDES: as many voxels as it says."""
    request = grpc.service_pb2.ModelInferRequest(model_name="anatomynet")
    request.inputs.add(name="CT", datatype="INT16", shape=NEGATIVE_SIDES)
    request.raw_input_contents.append(bytes(16))
    return bytes(request.SerializeToString())


def deadly_body() -> bytes:
    """Of a POST to the model's infer, with OVERFLOWING_SIDES."""
    tensor = {"name": "CT", "shape": OVERFLOWING_SIDES, "datatype": "INT16", "data": []}
    return json.dumps({"inputs": [tensor]}).encode()


def damaged_messages(rng: random.Random, count: int) -> Iterator[bytes]:
    """Protobuf messages of ModelInfer: a good one damaged, cut off, or whose fields lie; and noise."""
    ct = grpc.InferInput("CT", (8, 32, 32), "INT16")
    ct.set_data_from_numpy(smooth_hu((8, 32, 32)))
    request = grpc.service_pb2.ModelInferRequest(model_name="anatomynet")
    request.inputs.append(ct._get_tensor())
    good = request.SerializeToString()
    voxels = ct._get_content()
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            yield rng.randbytes(rng.randrange(300))
        elif kind == 1:
            damaged = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.randrange(len(good))] = rng.randrange(256)
            yield bytes(damaged)
        else:
            lying = grpc.service_pb2.ModelInferRequest()
            lying.CopyFrom(request)
            side = rng.choice([0, -1, 1, 7, 31, 33, 2**31, 2**40, 2**62])
            lying.inputs[0].shape[rng.randrange(3)] = side
            lying.raw_input_contents.append(voxels[: rng.randrange(len(voxels) + 1)])
            for _ in range(rng.randrange(3)):
                lying.raw_input_contents.append(b"more")
            if kind == 3:
                lying.inputs[0].parameters["shared_memory_region"].string_param = rng.choice(["", "no such", "../x"])
                lying.inputs[0].parameters["shared_memory_byte_size"].int64_param = rng.choice([-1, 0, 2**62])
            yield lying.SerializeToString()
