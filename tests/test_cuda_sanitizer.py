"""The CUDA kernels under compute-sanitizer, where there is a device and the tool."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from pisces_kernels import sinkhorn, sinkhorn_points, transport_attention
cost = torch.rand(2, 13, 300, device="cuda", requires_grad=True)
sinkhorn(cost, epsilon=0.1, tau=0.9, backend="cuda").plan().square().sum().backward()
sinkhorn(cost.detach(), epsilon=0.1, mass=0.5, max_iters=20, backend="cuda")
x, y = torch.rand(70, 20, device="cuda"), torch.rand(150, 20, device="cuda")
sinkhorn_points(x, y, epsilon=0.1, max_iters=5, backend="cuda").barycentric()
attention = torch.rand(1, 2, 9, 100, device="cuda")
frames, places = torch.arange(100, device="cuda") // 10, torch.rand(100, 2, device="cuda")
transport_attention(x[None, :9], y[None, :100], attention, frames, places, backend="cuda")
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_is_silent(tool, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer not found")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
