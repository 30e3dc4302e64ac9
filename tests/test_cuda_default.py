"""What a device runs when no back end is named."""

from __future__ import annotations

import pytest
import torch

from pisces_kernels import sinkhorn, sinkhorn_points, transport_attention, why_not

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_the_default_is_the_best_that_runs_and_agrees_with_the_reference():
    best = next(name for name in ("cuda", "triton") if why_not(name) is None)
    cost = torch.rand(3, 9, 200, device="cuda", requires_grad=True)
    grads = []
    for backend in (None, "reference"):
        result = sinkhorn(cost, epsilon=0.05, tau=0.9, tol=1e-6, backend=backend)
        grads.append(torch.autograd.grad(result.value.sum() + result.f.square().sum(), cost)[0])
        assert result._backend == (backend or best)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


def test_what_the_kernels_lack_runs_on_the_reference():
    cost = torch.rand(2, 9, 30, device="cuda", dtype=torch.float64)
    assert sinkhorn(cost, epsilon=0.1)._backend == "reference"
    assert sinkhorn(cost.float(), epsilon=0.1, acceleration="anderson")._backend == "reference"
    x, y = torch.rand(20, 3, device="cuda"), torch.rand(30, 3, device="cuda")
    assert sinkhorn_points(x, y, epsilon=0.1, mass=0.5).backend == "reference"


def test_a_captured_graph_repeats_the_call():
    query, key = torch.randn(1, 5, 16, device="cuda"), torch.randn(1, 40, 16, device="cuda")
    attention = torch.rand(1, 2, 5, 40, device="cuda").softmax(-1)
    geometry = torch.arange(40, device="cuda") // 8, torch.rand(40, 2, device="cuda")
    for backend in ("cuda", "triton"):
        if why_not(backend) is not None:
            continue
        want = transport_attention(query, key, attention, *geometry, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = transport_attention(query, key, attention, *geometry, backend=backend)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
