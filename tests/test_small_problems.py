"""Calls without the dispatcher: only where nothing but autograd has to see them, and with the same results.

`_autograd.differentiable` runs an operator's own code where it can. Everything that intercepts operators must still see
one, and tensors whose memory does not hold their values must not be read.
"""

from __future__ import annotations

import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pisces_kernels import _autograd, sinkhorn
from pisces_kernels._autograd import _only_computes
from pisces_kernels._sinkhorn import _sinkhorn_op

OPERATOR = torch.ops.pisces_kernels.sinkhorn.default


def solve(cost, **options):
    return sinkhorn(cost, epsilon=0.1, **options)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator)
        return operator(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


def test_plain_tensors_go_the_short_way():
    cost = random_costs(2, 8, 8)
    assert _only_computes((cost, None, 1.0, "implicit", torch.nn.Parameter(cost)))
    with torch.inference_mode():
        assert _only_computes((cost, cost + 1.0))
    with torch.autocast("cpu"), torch.no_grad():
        assert _only_computes((cost,))


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_modes_see_the_operator(needs_gradient):
    cost = random_costs(2, 8, 9).requires_grad_(needs_gradient)
    expected = solve(cost)
    with Dispatched() as mode:
        got = solve(cost)
    assert mode.seen.count(OPERATOR) == 1
    assert torch.equal(got.f, expected.f)
    assert got.f.requires_grad == needs_gradient
    with Called() as functions:
        solve(cost)
    assert any(
        getattr(function, "__name__", "") == "sinkhorn.default" or function is OPERATOR for function in functions.seen
    )
    with torch.profiler.profile() as profile:
        solve(cost)
    assert "pisces_kernels::sinkhorn" in {event.key for event in profile.key_averages()}


def test_fake_tensors_have_shapes_and_no_values():
    with FakeTensorMode():
        result = solve(torch.empty(3, 8, 9, requires_grad=True))
        single = solve(torch.empty(8, 9))
    assert type(result.f) is not torch.Tensor
    assert (result.f.shape, result.g.shape, result.residual.shape) == ((3, 8), (3, 9), (3,))
    assert (single.f.shape, single.g.shape, single.n_iters.shape) == ((8,), (9,), ())
    on_meta = solve(torch.empty(3, 8, 9, device="meta"))
    assert on_meta.f.device.type == "meta"


def test_values_that_are_not_in_memory():
    cost = random_costs(1, 8, 9)[0]
    lazily_negated = torch.complex(torch.zeros_like(cost), -cost).conj().imag
    assert lazily_negated.is_neg()
    assert torch.equal(solve(lazily_negated).f, solve(cost).f)
    kept = []

    def keep(value):
        kept.append(value)
        return value

    torch.func.vmap(keep)(cost)
    (outlived,) = kept  # of a vmap that is over
    assert not _only_computes((outlived,))


def test_subclasses_see_the_operator():
    cost = random_costs(2, 8, 9)
    assert not _only_computes((cost.as_subclass(Marked),))
    assert torch.equal(torch.Tensor(solve(cost.as_subclass(Marked)).f), solve(cost).f)
    assert torch.equal(solve(torch.nn.Parameter(cost)).f, solve(cost).f)


def test_forward_mode_is_refused():
    cost = random_costs(2, 8, 9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cost, torch.ones_like(cost))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            solve(dual)


def test_tracing_records_the_operator():
    cost = random_costs(2, 8, 9)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda c: solve(c).f)(cost)
    assert OPERATOR in {node.target for node in graph.graph.nodes}
    other = random_costs(2, 8, 9)
    assert torch.equal(graph(other), solve(other).f)


def test_compiled_after_eager_and_back():
    cost = random_costs(2, 8, 9).requires_grad_()

    def loss(c):
        return (solve(c).f ** 2).sum()

    torch.compiler.reset()
    before = torch.autograd.grad(loss(cost), cost)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(torch.autograd.grad(compiled(cost), cost)[0], before)
        assert torch.equal(torch.autograd.grad(loss(cost), cost)[0], before)
    assert torch.allclose(torch.func.grad(loss)(cost.detach()), before)
    assert torch.equal(torch.autograd.grad(loss(cost), cost)[0], before)


@pytest.mark.parametrize("gradient", ["implicit", "unrolled"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_dimensions(kind, gradient):
    """[8, 9], [1, 8, 9], [2, 3, 8, 9]: the same numbers and gradients, problem by problem."""
    cost, a, b = random_costs(6, 8, 9), random_weights(6, 8), random_weights(6, 9)
    rows, cols = random_mask(6, 8), random_mask(6, 9)
    options = {"tol": 1e-12, "max_iters": 200, "gradient": gradient, **KINDS[kind]}
    if "mass" in options:
        totals = [(weights * mask).sum(-1) for weights, mask in ((a, rows), (b, cols))]
        options["mass"] = 0.6 * float(torch.cat(totals).min())

    def run(*shape, part=slice(None)):
        inputs = [x[part].reshape(*shape, *x.shape[1:]).requires_grad_() for x in (cost, a, b)]
        masks = {n: m[part].reshape(*shape, *m.shape[1:]) for n, m in (("row_mask", rows), ("col_mask", cols))}
        epsilon = torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True)
        result = sinkhorn(*inputs, epsilon=epsilon, **masks, **options)
        assert result.f.shape == (*shape, 8)
        assert result.n_iters.shape == result.residual.shape == result.converged.shape == shape
        loss = (result.f.sin().sum(-1) + result.g.cos().sum(-1)).sum()
        grads = torch.autograd.grad(loss, [*inputs, epsilon], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs[0])
        return [result.f.detach(), result.n_iters, *(g.detach() for g in grads), *second]

    flat = run(6)
    for got, want in zip(run(2, 3), flat, strict=True):
        assert torch.equal(got.flatten(0, 1), want)
    for problem in range(6):
        for got, want in zip(run(part=problem), flat, strict=True):
            assert torch.allclose(got, want[problem], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_opcheck_with_any_leading_dimensions(shape):
    cost = random_costs(2, 8, 9)[: max(1, len(shape))].reshape(*shape, 8, 9).requires_grad_()
    a, b = torch.full((*shape, 8), 1 / 8).double(), torch.full((*shape, 9), 1 / 9).double()
    epsilon = torch.full(shape, 0.1, dtype=torch.float64)
    problem = (cost, a, b, epsilon, 1.0, 0.9, None, None, None, 20, 0.0)
    torch.library.opcheck(_sinkhorn_op, (*problem, None, None, None, "implicit", "cpu"))


def test_checkpoints_and_hooks_on_saved_tensors():
    cost = random_costs(2, 8, 9).requires_grad_()
    (want,) = torch.autograd.grad(solve(cost).f.square().sum(), cost)
    again = checkpoint(lambda c: solve(c).f.square().sum(), cost, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, cost)[0], want)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        loss = solve(cost).f.square().sum()
    assert torch.Size([2, 8, 9]) in packed
    assert torch.equal(torch.autograd.grad(loss, cost)[0], want)


def test_weights_are_checked_as_before():
    cost = random_costs(2, 3, 3)
    for bad in (-1.0, float("nan"), float("inf"), -float("inf")):
        weights = torch.full((2, 3), 1 / 3)
        weights[1, 2] = bad
        with pytest.raises(ValueError, match="a has negative or non-finite"):
            solve(cost, a=weights.requires_grad_())
        epsilon = torch.ones(2)
        epsilon[0] = bad
        with pytest.raises(ValueError, match="epsilon has entries <= 0"):
            sinkhorn(cost, epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon has entries <= 0"):
        sinkhorn(cost, epsilon=torch.zeros(()))
    assert solve(cost[:0], a=torch.ones(0, 3), b=torch.ones(0, 3)).f.shape == (0, 3)
    assert solve(cost, a=torch.tensor([1.0, -0.0, 0.0])).f.isfinite().all()


def test_threads_beyond_a_small_job_do_not_change_a_bit():
    cost = random_costs(9, 130, 171, dtype=torch.float32)  # above `worth_threads` of csrc/cpu/launch.cpp
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([sinkhorn(cost, epsilon=0.02, **kind) for kind in KINDS.values()])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.f, other.f)
            assert torch.equal(one.g, other.g)
            assert torch.equal(one.n_iters, other.n_iters)


def test_a_pytorch_without_the_parts_of_the_short_way(monkeypatch):
    monkeypatch.setattr(_autograd, "SHORT_WAY", False)

    @torch.library.custom_op("pisces_kernels_tests::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    call = _autograd.differentiable(
        cube,
        lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    x = torch.randn(5, requires_grad=True)
    with Dispatched() as mode:
        result = call(x)
    assert torch.ops.pisces_kernels_tests.cube.default in mode.seen  # not around the dispatcher
    assert torch.allclose(torch.autograd.grad(result.sum(), x)[0], 3 * x.detach() ** 2)
