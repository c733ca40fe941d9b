"""A port whose connections go to others in turn."""

from __future__ import annotations

import socket
import threading


class Relay:
    """Its first connection goes to the first of these ports of this machine, and so on; those after the last to the last."""

    def __init__(self, *ports: int) -> None:
        self._ports = ports
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        ports = list(self._ports)
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            far = socket.create_connection(("127.0.0.1", ports.pop(0) if len(ports) > 1 else ports[0]))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # the other side has gone
        target.close()
