"""Just enough of a WebSocket client (RFC 6455) to listen to ComfyUI's progress messages."""

from __future__ import annotations

import base64
import os
import socket
import struct

TEXT, BINARY, CLOSE = 1, 2, 8
ANSWER_WITHIN = 60.0  # seconds: a server that is busy takes its time to open the connection


class WebSocket:
    """A connection that only listens; ``receive`` waits at most ``patience`` seconds."""

    def __init__(self, port: int, path: str, patience: float) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=max(patience, ANSWER_WITHIN))
        self._buffer = b""
        self._parts, self._kind = b"", TEXT  # of a message in several frames
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        answer, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        if b" 101 " not in answer.split(b"\r\n", 1)[0]:
            raise ConnectionError("the server refused the progress connection")
        self._socket.settimeout(patience)

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def _fill(self) -> None:
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionError("the server closed the progress connection")
        self._buffer += received

    def _take(self, start: int, count: int) -> bytes:
        while len(self._buffer) < start + count:
            self._fill()
        return self._buffer[start : start + count]

    def receive(self) -> str | bytes:
        """The next message: text as str, binary as bytes.

        Raises:
            TimeoutError: Nothing came within the patience; what has arrived is kept, so it may be called again.
            ConnectionError: The server is gone.
        """
        while True:
            first, second = self._take(0, 2)
            start, length = 2, second & 127
            if length >= 126:
                size = 2 if length == 126 else 8
                (length,) = struct.unpack(">H" if size == 2 else ">Q", self._take(2, size))
                start += size
            payload = self._take(start, length)
            self._buffer = self._buffer[start + length :]
            final, code = first & 0x80, first & 0x0F
            if code == CLOSE:
                raise ConnectionError("the server closed the progress connection")
            if code > CLOSE:
                continue  # ping or pong
            self._kind = code or self._kind
            self._parts += payload
            if final:
                message, self._parts = self._parts, b""
                return message.decode() if self._kind == TEXT else message
