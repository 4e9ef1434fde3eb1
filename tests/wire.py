"""What goes over the wire between a client and its server, byte for byte: a proxy that writes down both directions."""

import base64
import functools
import hashlib
import re
import selectors
import socket
import threading
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.triton_servers import free_ports

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA_FRAME, PADDED = 0, 8
CHUNK = 1 << 20


@dataclass
class Recording:
    """What was sent over each connection, and what came back; in order."""

    sent: list[bytearray] = field(default_factory=list)
    answered: list[bytearray] = field(default_factory=list)

    @property
    def everything(self) -> bytes:
        """All bytes; each stream of messages once more in one piece, since HTTP/2 cuts them into frames."""
        streams = [stream for wire in (*self.sent, *self.answered) for stream in _streams(bytes(wire)).values()]
        return b"\n".join([*map(bytes, (*self.sent, *self.answered)), *streams])

    def messages(self) -> list[bytes]:
        """The gRPC messages of the client, none of which is compressed."""
        return [m for wire in self.sent for stream in _streams(bytes(wire)).values() for m in _messages(stream)]


@contextmanager
def recorded(server_port: int, watch: Callable[[], None] = lambda: None) -> Iterator[tuple[int, Recording]]:
    """A proxy's port and what it has recorded; `watch` comes before each connection and whatever the client says."""
    recording, selector, stopped = Recording(), selectors.DefaultSelector(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        selector.register(listener, selectors.EVENT_READ)
        while not stopped.is_set():
            for key, _ in selector.select(timeout=0.05):
                if key.fileobj is listener:
                    watch()
                    _accept(listener, server_port, selector, recording)
                else:
                    _pass_on(key, selector, watch)
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield listener.getsockname()[1], recording
    finally:
        stopped.set()
        thread.join()
        selector.close()


def _accept(listener: socket.socket, port: int, selector: selectors.BaseSelector, recording: Recording) -> None:
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))
    recording.sent.append(bytearray())
    recording.answered.append(bytearray())
    selector.register(client, selectors.EVENT_READ, (server, recording.sent[-1], True))
    selector.register(server, selectors.EVENT_READ, (client, recording.answered[-1], False))


def _pass_on(key: selectors.SelectorKey, selector: selectors.BaseSelector, watch: Callable[[], None]) -> None:
    source: Any = key.fileobj
    target, record, is_client = key.data
    try:
        data = source.recv(CHUNK)
        if is_client:
            watch()
        record += data
        target.sendall(data)
    except OSError:
        data = b""
    if not data and source.fileno() >= 0:  # else the other end was closed in the same round, and both with it
        for end in (source, target):
            selector.unregister(end)
            end.close()


def _streams(wire: bytes) -> dict[int, bytes]:
    """The payload of each HTTP/2 stream (RFC 9113, 4.1 and 6.1)."""
    streams: dict[int, bytearray] = {}
    place = len(HTTP2_PREFACE) if wire.startswith(HTTP2_PREFACE) else 0
    while place + 9 <= len(wire):
        length, kind, flags = int.from_bytes(wire[place : place + 3], "big"), wire[place + 3], wire[place + 4]
        stream = int.from_bytes(wire[place + 5 : place + 9], "big") & 0x7FFFFFFF
        payload = wire[place + 9 : place + 9 + length]
        if kind == DATA_FRAME:
            padding = payload[0] if flags & PADDED else 0
            streams.setdefault(stream, bytearray()).extend(payload[bool(flags & PADDED) : len(payload) - padding])
        place += 9 + length
    return {number: bytes(stream) for number, stream in streams.items()}


def _messages(stream: bytes) -> Iterator[bytes]:
    """GRPC's messages: a byte that says whether it is compressed, four of its length, and itself."""
    place = 0
    while place + 5 <= len(stream):
        assert stream[place] == 0, "a compressed message, in which nothing can be found"
        length = int.from_bytes(stream[place + 1 : place + 5], "big")
        yield stream[place + 5 : place + 5 + length]
        place += 5 + length


@contextmanager
def grpc_headers(server_port: int) -> Iterator[tuple[int, list[tuple[str, str | bytes]]]]:
    """A relay's port and the headers that a client sends with its calls, which HTTP/2 packs bit by bit."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    headers: list[tuple[str, str | bytes]] = []
    (port,) = free_ports(1)
    lengths = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

    class Relay(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            headers.append((":path", details.method))
            headers.extend((name, value) for name, value in details.invocation_metadata)

            def answer(request: bytes, context: Any) -> bytes:
                try:
                    reply: bytes = channel.unary_unary(details.method)(request)
                except grpc.RpcError as error:
                    context.abort(error.code(), error.details())
                return reply

            return grpc.unary_unary_rpc_method_handler(answer)

    with grpc.insecure_channel(f"127.0.0.1:{server_port}", lengths) as channel:
        server = grpc.server(ThreadPoolExecutor(4), options=lengths)
        server.add_generic_rpc_handlers((Relay(),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        try:
            yield port, headers
        finally:
            server.stop(grace=None).wait()


def traces(texts: Iterable[str], data: bytes) -> list[str]:
    """Which texts stand in data in any form in which a program may write them down, and how."""
    return [f"{text!r} as {found!r}" for text in texts for found in sorted(forms_of(text)) if found in data]


@functools.cache
def forms_of(text: str) -> frozenset[bytes]:
    """A text in every spelling and encoding; what is shorter than five bytes could stand anywhere by chance."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    spellings = {text, plain, unicodedata.normalize("NFD", text), text.replace("^", " "), text.replace("^", ", ")}
    spellings |= {text.upper(), text.lower(), plain.upper(), plain.lower(), text[::-1]}
    if re.fullmatch(r"\d{8}", text):
        year, month, day = text[:4], text[4:6], text[6:]
        spellings |= {
            f"{year}-{month}-{day}",
            f"{day}.{month}.{year}",
            f"{month}/{day}/{year}",
            f"{day}/{month}/{year}",
        }
    forms = {hashlib.new(name, text.encode()).digest() for name in ("md5", "sha1", "sha256")}
    forms |= {form.hex().encode() for form in forms}
    for spelling in spellings:
        forms |= {urllib.parse.quote(spelling).encode(), spelling.encode("unicode_escape")}
        for charset in ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "cp500", "iso2022_jp"):
            with suppress(UnicodeEncodeError):
                forms |= _as_text(spelling.encode(charset))
    return frozenset(form for form in forms if len(form) >= 5)


def _as_text(data: bytes) -> set[bytes]:
    """Bytes as they are, in hexadecimal digits, and in base64, wherever in a group of three they begin."""
    forms = {data, data.hex().encode(), data.hex().upper().encode()}
    for shift, own in ((0, 0), (1, 2), (2, 3)):  # what the neighbours have a share in is cut off
        forms.add(base64.b64encode(bytes(shift) + data)[own:-4])
    return forms
