"""That the interpreted tests can fail: what the interpreter gets silently wrong, and what a GPU would."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED, Borders

from pisces_kernels import sinkhorn
from pisces_kernels._triton import _launch, _sides

if INTERPRETED:
    from interpreter import run_programs_together
else:
    pytestmark = pytest.mark.skip("no CUDA device is an interpreter")


@triton.jit
def do_not_meet(arrived_ptr, meeting, TEAM: tl.constexpr):
    pass


def test_a_team_that_does_not_wait_is_found(device, small_tiles, monkeypatch):
    """Without its barrier a program reads what the others have not written."""
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 8)
    run_programs_together(monkeypatch)
    cost = torch.rand(2, 5, 60)
    options = {"epsilon": 0.05, "tau": 0.9, "max_iters": 4, "tol": 0.0}
    want = sinkhorn(cost.double(), **options, backend="reference")
    torch.testing.assert_close(sinkhorn(cost, **options, backend="triton").f.double(), want.f, atol=1e-5, rtol=0)
    monkeypatch.setattr(_sides, "meet", do_not_meet)
    got = sinkhorn(cost, **options, backend="triton")
    assert not torch.allclose(got.f.double(), want.f, atol=1e-5, rtol=0)


@triton.jit
def careless_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs))


def test_what_is_read_or_written_outside_is_found():
    borders = Borders()
    x = borders.read(torch.rand(5))
    out, whole = borders.empty((5,), x), borders.empty((8,), x)
    careless_kernel[(1,)](x, whole, SIZE=8)
    assert whole[5:].isnan().all()
    borders.check()
    careless_kernel[(1,)](x, out, SIZE=8)
    with pytest.raises(AssertionError, match="outside"):
        borders.check()


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


def test_products_of_bfloat16_are_those_of_its_numbers(device):
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    product_kernel[(1,)](x, y, out, SIZE=16)
    torch.testing.assert_close(out, x.float() @ y.float(), atol=1e-5, rtol=1e-5)


def test_without_the_correction_they_are_not():
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    product_kernel[(1,)](x, y, out, SIZE=16)
    assert not torch.allclose(out, x.float() @ y.float(), atol=1e-2, rtol=1e-2)
