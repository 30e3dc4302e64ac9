"""How a Triton kernel is started: which configuration, and what no kernel may rely on. No device is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pisces_kernels

triton = pytest.importorskip("triton", reason="no CUDA device without triton")
from triton.runtime.autotuner import Autotuner  # noqa: E402 (after it is known to be there)

from pisces_kernels._triton import _launch  # noqa: E402
from pisces_kernels._triton._streamed import SOLVERS  # noqa: E402


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is started, by whom: the tuner, or the kernel itself with a configuration."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for owner in (Autotuner, triton.runtime.JITFunction):
        monkeypatch.setattr(owner, "run", lambda self, *a, **options: calls.append((type(self).__name__, options)))
    return calls


def test_tuned_unless_results_must_be_the_same_every_time(started, monkeypatch):
    kernel, _ = SOLVERS["flat"]
    tensor = torch.empty(1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _launch.launch(kernel, (1,), tensor)
    assert [who for who, _ in started] == ["Autotuner"]
    torch.use_deterministic_algorithms(True)
    try:
        _launch.launch(kernel, (1,), tensor, TEAM=3)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _launch.launch(kernel, (1,), tensor, TEAM=3)
    first = kernel.configs[0].all_kwargs()
    for who, options in started[1:]:
        assert who == "JITFunction"
        assert first.items() <= options.items()
        assert options["TEAM"] == 3


def test_a_tuner_has_few_configurations_and_undoes_its_trials():
    for kernel, _ in SOLVERS.values():
        assert 2 <= len(kernel.configs) <= 3
        assert kernel.reset_to_zero == ["counters_ptr"]
        assert kernel.restore_value == ["state_ptr"]


def test_no_kernel_relies_on_a_device_assertion():
    """The interpreter ignores them, and so does a device unless it debugs."""
    sources = list((Path(pisces_kernels.__file__).parent / "_triton").glob("*.py"))
    assert len(sources) > 10
    assert [path.name for path in sources if "device_assert" in path.read_text()] == []
