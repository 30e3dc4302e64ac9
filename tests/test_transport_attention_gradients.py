"""Gradients of `transport_attention`, torch.func, torch.compile, and what it allocates."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from meter import memory_meter
from problems import random_mask, token_grid, token_problem

from pisces_kernels import reference, sinkhorn, token_cost, transport_attention
from pisces_kernels._transport_attention import _transport_attention_op

BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_go_through_attention_with_the_plan_held(backend):
    frame_index, positions = token_grid(2, 3, 3)
    query, key, attention = (t.requires_grad_() for t in token_problem(2, 3, 4, 19))
    lexical = random_mask(2, 4)
    lexical[0, 1] = False
    refined, plan = transport_attention(
        query, key, attention, frame_index, positions, row_mask=lexical, return_plan=True, backend=backend
    )
    assert not plan.requires_grad
    weight, direction = torch.randn_like(refined), torch.randn_like(refined)

    def derivatives(result):
        first, *none = torch.autograd.grad(
            result, (attention, query, key), weight, allow_unused=True, create_graph=True
        )
        assert none == [None, None]
        return first, torch.autograd.grad((first * direction).sum(), attention)[0]

    held = reference.fuse(attention, plan.detach(), lexical)
    for got, want in zip(derivatives(refined), derivatives(held), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [{"tau": 0.8}, {"mass": 0.63}])
def test_gradcheck_through_the_plan(backend, kind):
    frame_index, positions = token_grid(1, 2, 2)
    inputs = tuple(t.requires_grad_() for t in token_problem(1, 2, 3, 5, dim=4))
    lexical = torch.tensor([[True, False, True]])

    def refine(query, key, attention):
        return transport_attention(
            query, key, attention, frame_index, positions, epsilon=0.3, row_mask=lexical, max_iters=500, tol=1e-12,
            differentiable_plan=True, return_plan=True, backend=backend, **kind,
        )  # fmt: skip

    assert torch.autograd.gradcheck(refine, inputs, atol=1e-6)
    held = transport_attention(*inputs, frame_index, positions, row_mask=lexical, backend=backend, **kind)
    through = transport_attention(
        *inputs, frame_index, positions, row_mask=lexical, backend=backend, differentiable_plan=True, **kind
    )
    assert torch.allclose(held, through, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("differentiable_plan", [False, True])
def test_vmap_equals_a_loop(backend, differentiable_plan):
    frame_index, positions = token_grid(2, 2, 2)
    stacked = [t.unflatten(0, (3, 2)) for t in token_problem(6, 2, 3, 9)]
    rows = random_mask(6, 3).unflatten(0, (3, 2))
    options = {"backend": backend, "differentiable_plan": differentiable_plan}

    def refine(query, key, attention, rows, return_plan=True):
        return transport_attention(
            query, key, attention, frame_index, positions, row_mask=rows, return_plan=return_plan, **options
        )

    every = (*stacked, rows)
    for got, *want in zip(
        torch.func.vmap(refine)(*every), *(refine(*(t[i] for t in every)) for i in range(3)), strict=True
    ):
        assert torch.allclose(got, torch.stack(want), atol=1e-12)
    shared = [t[0] for t in stacked]
    over_rows = torch.func.vmap(lambda mask: refine(*shared, mask, return_plan=False))(rows)
    loop = torch.stack([refine(*shared, mask, return_plan=False) for mask in rows])
    assert torch.allclose(over_rows, loop, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("differentiable_plan", [False, True])
def test_torch_func_equals_autograd(backend, differentiable_plan):
    frame_index, positions = token_grid(2, 2, 2)
    query, key, attention = token_problem(2, 2, 3, 9, dim=4)
    weight = torch.randn(2, 2, 3, 9, dtype=torch.float64)
    options = {"backend": backend, "differentiable_plan": differentiable_plan}

    def loss(attention):
        return (transport_attention(query, key, attention, frame_index, positions, **options) * weight).sum()

    leaves = [(attention * (1 + 0.1 * i)).requires_grad_() for i in range(3)]
    want = torch.stack([torch.autograd.grad(loss(leaf), leaf)[0] for leaf in leaves])
    many = torch.stack(leaves).detach()
    assert torch.allclose(torch.func.grad(loss)(many[1]), want[1], atol=1e-12)
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(many), want, atol=1e-12)
    together = torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(many)
    assert torch.allclose(together, want, atol=1e-12)
    with pytest.raises(NotImplementedError, match="jvp"):  # not a silent zero
        torch.func.jvp(loss, (attention,), (attention,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_plan", [False, True])
def test_opcheck(backend, return_plan):
    frame_index, positions = token_grid(1, 2, 2)
    query, key, attention = token_problem(1, 2, 3, 5, dim=4)
    geometry = (frame_index.double().expand(1, 5), positions.double().expand(1, 5, 2))
    args = (
        attention.requires_grad_(), query, key, *geometry, 0.1, 0.9, None, random_mask(1, 3), 50, 1e-4, 0.2, 0.2,
        return_plan, backend,
    )  # fmt: skip
    torch.library.opcheck(_transport_attention_op, args)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(compiler):
    frame_index, positions = token_grid(2, 2, 2)
    inputs = tuple(t.requires_grad_() for t in token_problem(2, 2, 3, 9, dtype=torch.float32))

    def loss(query, key, attention):
        cost = token_cost(query, key, attention, frame_index, positions)
        refined = transport_attention(query, key, attention, frame_index, positions)
        return (cost * refined).sum() + sinkhorn(cost, epsilon=0.1, tau=0.9).value.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(*inputs)
    eager = loss(*inputs)
    assert torch.allclose(compiled, eager)
    for got, want in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_reads_no_value():
    """On the meta device there is none: what would wait for a GPU raises here."""
    geometry = [t.to("meta") for t in token_grid(2, 2, 2)]
    inputs = tuple(t.to("meta").requires_grad_() for t in token_problem(2, 2, 3, 9))
    for kind in ({"tau": 0.9}, {"mass": 0.5}):
        for differentiable_plan in (False, True):
            refined, plan = transport_attention(
                *inputs, *geometry, row_mask=random_mask(2, 3).to("meta"), return_plan=True,
                differentiable_plan=differentiable_plan, **kind,
            )  # fmt: skip
            assert refined.shape == plan.shape == (2, 2, 3, 9)
            torch.autograd.grad(refined.sum(), inputs[2])


MEASURE = """
import sys, torch
from pisces_kernels import transport_attention

def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

def peak(run):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    result = run()
    print(1024 * (kilobytes("VmHWM") - before) / (4 * attention.numel()))
    return result

batch, rows, chosen, threads = (int(number) for number in sys.argv[2:])
torch.set_num_threads(threads)
attention = torch.full((batch, 16, rows, 2049), 1 / 2049, requires_grad=True)
query, key = torch.randn(batch, rows, 1024), torch.randn(batch, 2049, 1024)
geometry = (torch.arange(2049) // 256, torch.rand(256, 2).repeat(9, 1)[:2049])
row_mask = torch.arange(rows).expand(batch, -1) % (rows // chosen) == 0
options = dict(backend=sys.argv[1], max_iters=2)
small = transport_attention(query[:, :1], key, attention[:, :1, :1], *geometry, **options)  # what is made once
small.sum().backward()
refined = peak(lambda: transport_attention(query, key, attention, *geometry, row_mask=row_mask, **options))
weight = torch.ones_like(refined)
peak(lambda: torch.autograd.grad(refined, attention, weight))
"""


@pytest.mark.parametrize(
    ("backend", "shape", "most"),
    [
        ("cpu", (1, 40, 40, 1), (1.3, 1.1)),
        ("cpu", (2, 40, 40, 2), (1.3, 1.1)),
        ("cpu", (1, 300, 30, 1), (1.2, 1.05)),
        ("reference", (1, 40, 40, 1), (99.0, 99.0)),
    ],
)
def test_nothing_of_the_size_of_the_attention_beyond_the_result(offline_environment, backend, shape, most):
    """Peaks of the process, C++ scratch included, in units of the attention; the reference shows what is saved."""
    environment = {**offline_environment, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, *map(str, shape)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    least = 0.9 if backend == "cpu" else 2.5
    for measured, limit in zip(map(float, run.stdout.split()), most, strict=True):
        assert least < measured < limit


def test_backward_passes_keep_few_temporaries():
    """Forward and backward together, in units of the attention; autograd through the definitions is the control."""
    frame_index, positions = token_grid(4, 8, 8)
    inputs = tuple(t.requires_grad_() for t in token_problem(2, 8, 20, 257, dtype=torch.float32))
    geometry = (frame_index.expand(2, -1), positions.expand(2, -1, 2))
    weight = torch.randn(2, 8, 20, 257)

    def peak(compute):
        with memory_meter() as memory:
            torch.autograd.grad(compute(*inputs, *geometry), inputs, weight, allow_unused=True)
        return memory.peak / (4 * weight.numel())

    assert peak(lambda *x: transport_attention(*x, max_iters=3)) < 2.1
    assert peak(lambda *x: reference.transport_attention(*x, max_iters=3)[0]) > 12
    assert peak(token_cost) < 2.2
    assert peak(reference.token_cost) > 12
