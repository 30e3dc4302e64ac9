"""The CUDA solver against the float64 reference: emulated on the CPU everywhere, and on a device where there is one."""

from __future__ import annotations

import pytest
import torch

from pisces_kernels import sinkhorn

PLACES = ["sm_90", "sm_80", "tiny", "tiny_80"]  # of the emulator: one block, clusters, cooperative grids, global memory


@pytest.mark.parametrize(
    ("place", "dtype"),
    [*((place, torch.float32) for place in PLACES), ("sm_90", torch.bfloat16), ("tiny_80", torch.float16)],
)
@pytest.mark.parametrize(("epsilon", "tau"), [(0.05, 0.9), (0.01, 1.0), (0.001, (1.0, 0.9))])
def test_equals_the_reference(device, place, dtype, epsilon, tau, monkeypatch):
    monkeypatch.setenv("PK_DEVICE", place)
    n_rows, n_cols = 3 + int(torch.randint(50, ())), 40 + int(torch.randint(200, ()))
    cost = torch.rand(2, n_rows, n_cols).to(dtype)
    rows, cols = torch.rand(2, n_rows) < 0.8, torch.rand(2, n_cols) < 0.8
    rows[:, 0] = cols[:, 0] = True
    options = {"epsilon": epsilon, "tau": tau, "max_iters": 50, "tol": 0.0}
    here = {"row_mask": rows.to(device), "col_mask": cols.to(device), "backend": "cuda"}
    got = sinkhorn(cost.to(device), **options, **here)
    want = sinkhorn(cost.double(), **options, row_mask=rows, col_mask=cols, backend="reference")
    assert got.f.dtype == got.residual.dtype == torch.float32
    for potential, exact in ((got.f, want.f), (got.g, want.g)):
        torch.testing.assert_close(potential.cpu().double(), exact, atol=1e-5, rtol=0)
    assert torch.equal(got.n_iters.cpu(), want.n_iters)
    plan, exact = got.plan().cpu().double(), want.plan()
    share, exact = (x / x.sum(-1, keepdim=True).clamp_min(1e-30) for x in (plan, exact))
    assert float((share - exact).abs().sum(-1).max()) / 2 < 2e-4  # total variation of the worst row


def test_gradients_and_leading_dimensions(device):
    cost = torch.rand(2, 3, 7, 20)
    results = []
    for where, dtype, backend in ((device, torch.float32, "cuda"), ("cpu", torch.float64, "reference")):
        leaf = cost.to(where, dtype, copy=True).requires_grad_()
        result = sinkhorn(leaf, epsilon=0.1, tau=0.9, max_iters=300, tol=1e-7, backend=backend)
        (result.f.square().sum() + (result.plan() * cost.to(where, dtype)).sum()).backward()
        assert leaf.grad is not None
        results.append((result.value.detach().cpu().double(), leaf.grad.cpu().double()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_gradient_of_a_16_bit_cost_has_its_dtype(device):
    cost = torch.rand(5, 9).to(device, torch.bfloat16).requires_grad_()
    sinkhorn(cost, epsilon=0.1, backend="cuda").f.sum().backward()
    assert cost.grad is not None
    assert cost.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("place", PLACES)
def test_exact_mass_and_its_gradient(device, place, monkeypatch):
    monkeypatch.setenv("PK_DEVICE", place)
    cost = torch.rand(2, 13, 30)
    mass = torch.tensor([0.4, 0.9])
    results = []
    for where, dtype, backend in ((device, torch.float32, "cuda"), ("cpu", torch.float64, "reference")):
        leaf = cost.to(where, dtype, copy=True).requires_grad_()
        result = sinkhorn(leaf, epsilon=0.1, mass=mass.to(where, dtype), max_iters=300, tol=1e-6, backend=backend)
        result.plan().square().sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(result.plan().sum((-2, -1)).cpu().float(), mass, atol=1e-5, rtol=0)
        values = (result.f, result.g, leaf.grad, result.log_plan())
        results.append([value.detach().cpu().double() for value in values])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)


@pytest.mark.gpu
def test_a_solve_can_be_captured_in_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cost = torch.rand(3, 20, 300, device="cuda")
    options = {"epsilon": 0.05, "tau": 0.9, "gradient": "none", "backend": "cuda"}
    want = sinkhorn(cost, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sinkhorn(cost, **options)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got.f, want.f)


def test_non_contiguous_cost_and_one_start(device):
    cost = torch.rand(30, 11).mT.contiguous().mT
    start = torch.rand(30) / 10
    options = {"epsilon": 0.05, "max_iters": 20, "tol": 0.0}
    got = sinkhorn(cost.to(device), f_init=start.to(device), backend="cuda", **options)
    want = sinkhorn(cost.double(), f_init=start.double(), backend="reference", **options)
    torch.testing.assert_close(got.g.cpu().double(), want.g, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"acceleration": "anderson"}, "acceleration"),
        ({"a": torch.full((4,), 0.25, dtype=torch.float64)}, "float32"),
    ],
)
def test_what_the_kernels_lack_is_said_before_anything_runs(device, changes, said):
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=said):
        sinkhorn(torch.rand(4, 5, device=device), epsilon=0.1, backend="cuda", **changes)
