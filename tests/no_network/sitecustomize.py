"""Put this folder first on PYTHONPATH and no Python process below can open a connection: used by tests and CI."""

import os
import socket


def _refuse(self: socket.socket, address: object, *_: object) -> None:
    if self.family == getattr(socket, "AF_UNIX", None):
        return _connect(self, address)
    raise RuntimeError(f"network access to {address!r} during an offline run")


if os.environ.get("PISCES_TEST_NETWORK_GUARD", "1") == "1":
    _connect = socket.socket.connect
    socket.socket.connect = _refuse  # type: ignore[method-assign, assignment]
    socket.socket.connect_ex = _refuse  # type: ignore[method-assign, assignment]
