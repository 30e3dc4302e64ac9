"""Which back end is chosen: by the device, by what can run there, and by what its kernels do."""

from __future__ import annotations

import pytest
import torch

from pisces_kernels import _dispatch, sinkhorn, sinkhorn_points

GPU = torch.device("cuda")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the back ends that can run; a test changes the set."""
    names = {"reference", "cpu", "cuda", "triton"}
    monkeypatch.setattr(_dispatch, "why_not", lambda backend: None if backend in names else "it is not there")
    return names


def test_a_gpu_takes_cuda_then_triton_then_the_reference(runs):
    chosen = []
    for gone in (None, "cuda", "triton"):
        runs.discard(gone)
        chosen.append(_dispatch.resolve("test", None, GPU, torch.float32))
    assert chosen == ["cuda", "triton", "reference"]
    assert _dispatch.resolve("test", None, torch.device("meta"), torch.float32) == "reference"


@pytest.mark.parametrize(
    ("dtype", "options", "said"),
    [
        (torch.float64, {}, "computes in float32"),
        (torch.float32, {"acceleration": "anderson"}, "no acceleration"),
        (torch.float32, {"points_mass": 0.5}, "exact mass between point clouds"),
    ],
)
def test_what_gpu_kernels_lack_goes_to_the_reference_unless_they_were_asked_for(runs, dtype, options, said):
    assert _dispatch.resolve("test", None, GPU, dtype, **options) == "reference"
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"test: backend '{backend}' .*{said}"):
            _dispatch.resolve("test", backend, GPU, dtype, **options)


def test_a_wish_that_cannot_be_met_says_why(runs):
    runs.discard("triton")
    with pytest.raises(ValueError, match="'triton' cannot run: it is not there"):
        _dispatch.resolve("test", "triton", GPU, torch.float32)
    with pytest.raises(ValueError, match="'cuda' wants tensors on cuda, got cpu"):
        _dispatch.resolve("test", "cuda", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="'hip', expected one of"):
        _dispatch.resolve("test", "hip", GPU, torch.float32)


def test_an_old_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (7, 5))
    assert "8.0 is needed" in str(_dispatch._too_old())


def test_every_operation_has_an_adapter_on_each_back_end_that_claims_it():
    for backend, operations in _dispatch.KERNELS.items():
        if backend == "triton":
            pytest.importorskip("triton", reason="no CUDA device without triton")
        for operation in operations:
            assert callable(_dispatch.kernel(operation, backend)), (backend, operation)


def test_triton_without_a_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("no CUDA device must be there for this")
    with pytest.raises(ValueError, match="'triton' cannot run: this PyTorch sees no CUDA or ROCm device"):
        sinkhorn(torch.rand(3, 4), epsilon=0.1, backend="triton")
    with pytest.raises(ValueError, match="'tf32' is there with backend='cuda' or 'triton' only"):
        sinkhorn_points(torch.rand(4, 3), torch.rand(5, 3), epsilon=0.1, precision="tf32")
