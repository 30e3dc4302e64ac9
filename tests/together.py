"""Run a script of this folder in two processes that know of each other as torchrun's do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

COUNT = 2


def run_together(script: str, *arguments: object) -> list[str]:
    """What each process printed; one that fails shows its errors."""
    path = Path(__file__).with_name(script)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running = []
    for rank in range(COUNT):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(path.parent), str(path.parents[1])]),
            "WORLD_SIZE": str(COUNT),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, str(path), *map(str, arguments)]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = []
    try:
        for process in running:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            said.append(output)
    finally:
        for process in running:  # one that fails leaves the other waiting
            process.kill()
    return said
