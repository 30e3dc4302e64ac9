"""Gradients of `token_cost`: against finite differences and the definition, twice; torch.func and torch.compile."""

from __future__ import annotations

import problems
import pytest
import torch
from problems import random_mask, token_grid, token_problem

from pisces_kernels import reference, token_cost
from pisces_kernels._token_cost import _token_cost_op

BACKENDS = ["reference", "cpu"]


def masks(masked, batch=2, n_rows=3, n_cols=9):
    return {"row_mask": random_mask(batch, n_rows), "col_mask": random_mask(batch, n_cols)} if masked else {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_and_gradgradcheck(backend, normalize, masked):
    frame_index, positions = token_grid(1, 2, 2)
    options = {"normalize": normalize, "backend": backend, **masks(masked, 2, 2, 5)}

    def cost(text, video, attention):
        return token_cost(text, video, attention, frame_index, positions, **options)

    while True:  # differences step over a kink where the second lowest or highest cost is next to the first
        inputs = token_problem(2, 2, 2, 5, dim=3)
        # what is masked is 0, and so is the lowest cost
        there = [
            torch.cat([row.new_zeros(1), row[row > 0].sort().values]) for row in cost(*inputs).flatten(2).flatten(0, 1)
        ]
        if not normalize or all(len(row) < 2 or min(row[1], row[-1] - row[-2]) > 1e-4 for row in there):
            break
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(cost, inputs)
    assert torch.autograd.gradgradcheck(cost, inputs, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_equal_autograd_through_the_definition(masked):
    frame_index, positions = token_grid(3, 4, 5)
    geometry = (frame_index.double().expand(2, 61), positions.double().expand(2, 61, 2))
    inputs = tuple(t.requires_grad_() for t in token_problem(2, 3, 7, 61))
    options = masks(masked, 2, 7, 61)
    weight = torch.randn(2, 3, 7, 61, dtype=torch.float64)
    directions = [torch.randn_like(t) for t in inputs]

    def derivatives(compute):
        grads = torch.autograd.grad(compute(*inputs, *geometry, **options), inputs, weight, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        return *grads, *torch.autograd.grad(along, inputs)

    for got, want in zip(derivatives(token_cost), derivatives(reference.token_cost), strict=True):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-9 * want.abs().max().item())
        assert want.abs().max() > 1e-3  # there is something to compare


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_are_finite_at_kinks_and_beside_masked_rubbish(backend):
    frame_index, positions = token_grid(2, 2, 2)
    text, video, attention = token_problem(2, 2, 3, 9, dim=4)
    attention = torch.zeros_like(attention)
    attention[..., 4] = 1.0  # every mean lies on token 4: both distances are 0 there
    rows, cols = random_mask(2, 3), random_mask(2, 9)
    rows[:, 1], cols[:, 4], cols[:, 7] = False, True, False
    keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1).expand_as(attention)
    real = (rows.unsqueeze(-1).expand_as(text), cols.unsqueeze(-1).expand_as(video), keep)
    clean = (text, video, attention)
    inputs = tuple(problems.poisoned(t, k).requires_grad_() for t, k in zip(clean, real, strict=True))
    cost = token_cost(*inputs, frame_index, positions, row_mask=rows, col_mask=cols, backend=backend)
    assert torch.isfinite(cost).all()
    grads = torch.autograd.grad(cost, inputs, torch.randn_like(cost), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
    for derivative in (grads, second):
        for grad, exists in zip(derivative, real, strict=True):
            assert torch.isfinite(grad).all()
            assert (grad[~exists] == 0).all()
            assert grad.abs().max() > 0
    nothing = token_cost(*inputs, frame_index, positions, row_mask=rows & False, col_mask=cols, backend=backend)
    for grad in torch.autograd.grad(nothing.sum(), inputs):
        assert (grad == 0).all()


def test_backward_inside_autocast_is_not_done_in_half_precision():
    frame_index, positions = token_grid(3, 4, 4)
    text, video, attention = token_problem(2, 3, 5, 49, dtype=torch.float32)
    text.requires_grad_()
    weight = torch.randn(2, 3, 5, 49)

    def gradient():
        cost = token_cost(text, video, attention, frame_index, positions)
        return torch.autograd.grad((cost * weight).sum(), text)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradient()
    assert torch.equal(inside, gradient())


def test_half_precision_inputs_have_gradients_of_their_dtype():
    frame_index, positions = token_grid(3, 4, 4)
    wide = token_problem(2, 3, 5, 49, dtype=torch.float32)
    inputs = tuple(t.bfloat16().requires_grad_() for t in wide)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    weight = torch.randn(2, 3, 5, 49)
    got = torch.autograd.grad(token_cost(*inputs, frame_index, positions), inputs, weight)
    want = torch.autograd.grad(token_cost(*exact, frame_index, positions), exact, weight.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert torch.allclose(g.double(), w, rtol=1e-2, atol=1e-3 * w.abs().max().item())  # rounded once


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_equals_a_loop(backend):
    text, video, attention = token_problem(6, 2, 3, 9)
    rows, cols = random_mask(6, 3), random_mask(6, 9)
    times, places = torch.rand(3, 9), torch.rand(3, 9, 2)
    stacked = [t.unflatten(0, (3, 2)) for t in (text, video, attention, rows, cols)]

    def cost(text, video, attention, rows, cols, times, places):
        return token_cost(text, video, attention, times, places, row_mask=rows, col_mask=cols, backend=backend)

    every = (*stacked, times, places)
    got = torch.func.vmap(cost)(*every)
    assert torch.equal(got, torch.stack([cost(*(t[i] for t in every)) for i in range(3)]))
    # One mapped argument, in another dimension; the rest is shared.
    shared = (text[:2], video[:2], attention[:2], rows[:2], cols[:2])
    got = torch.func.vmap(lambda p: cost(*shared, times[0], p), in_dims=1, out_dims=2)(places.transpose(0, 1))
    assert torch.equal(got, torch.stack([cost(*shared, times[0], p) for p in places], 2))
    assert not torch.equal(got[:, :, 0], got[:, :, 1])
    nested = torch.func.vmap(lambda t: torch.func.vmap(lambda p: cost(*shared, t, p))(places))(times)
    assert torch.equal(nested[2, 1], cost(*shared, times[2], places[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_equals_autograd(backend):
    frame_index, positions = token_grid(2, 2, 2)
    text, video, attention = token_problem(2, 2, 3, 9, dim=4)
    weight = torch.randn(2, 2, 3, 9, dtype=torch.float64)

    def loss(text, video):
        cost = token_cost(text, video, attention, frame_index, positions, backend=backend)
        return (cost * weight).sum()

    leaves = tuple(t.clone().requires_grad_() for t in (text, video))
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got, grad in zip(torch.func.grad(loss, argnums=(0, 1))(text, video), want, strict=True):
        assert torch.allclose(got, grad, atol=1e-12)
    others = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    each = torch.stack([torch.func.grad(loss)(other, video) for other in others])
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss), (0, None))(others, video), each, atol=1e-12)
    together = torch.func.grad(lambda o: torch.func.vmap(loss, (0, None))(o, video).sum())(others)
    assert torch.allclose(together, each, atol=1e-12)
    hessian = torch.func.jacrev(torch.func.grad(loss))(text, video)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(lambda t: loss(t, video), text), atol=1e-10)
    with pytest.raises(NotImplementedError, match="jvp"):  # not a silent zero
        torch.func.jvp(lambda t: loss(t, video), (text,), (text,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    frame_index, positions = token_grid(2, 2, 2)
    text, video, attention = (t.requires_grad_() for t in token_problem(2, 2, 3, 9, dim=4))
    geometry = (frame_index.double().expand(2, 9), positions.double().expand(2, 9, 2))
    args = (text, video, attention, *geometry, 0.2, 0.2, True, random_mask(2, 3), None, backend)
    slow = ("test_autograd_registration", "test_aot_dispatch_dynamic")  # the same for all back ends
    torch.library.opcheck(
        _token_cost_op, args, test_utils=("test_schema", "test_faketensor", *(slow * (backend == "cpu")))
    )


def test_reads_no_value():
    """On the meta device there is none: what would wait for a GPU raises here."""
    geometry = (t.to("meta") for t in token_grid(2, 2, 2))
    inputs = tuple(t.to("meta").requires_grad_() for t in token_problem(2, 2, 3, 9))
    options = {name: mask.to("meta") for name, mask in masks(True).items()}
    cost = token_cost(*inputs, *geometry, **options)
    assert cost.shape == (2, 2, 3, 9)
    assert [g.shape for g in torch.autograd.grad(cost.sum(), inputs)] == [t.shape for t in inputs]
