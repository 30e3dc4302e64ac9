"""What `sinkhorn` allocates: no history of its iterations, no plan before it is asked for."""

from __future__ import annotations

import problems
import pytest
import torch
from meter import memory_meter
from problems import random_costs

from pisces_kernels import reference, sinkhorn

N_PROBLEMS, N_ROWS, N_COLS = 2, 150, 700
MATRIX = N_PROBLEMS * N_ROWS * N_COLS * 4  # bytes of the cost


def peak_of_backward(gradient: str, max_iters: int, backend: str) -> int:
    cost = random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float32).requires_grad_()
    result = sinkhorn(cost, epsilon=0.05, tau=0.9, max_iters=max_iters, tol=0.0, gradient=gradient, backend=backend)
    grad_f, grad_g = torch.randn_like(result.f), torch.randn_like(result.g)
    with memory_meter() as memory:
        torch.autograd.grad((result.f, result.g), cost, (grad_f, grad_g))
    return memory.peak


def test_forward_and_value_make_no_plan():
    cost = random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float32)
    with memory_meter() as memory:
        result = sinkhorn(cost, epsilon=0.05)
        assert result.converged.shape == (N_PROBLEMS,)
    assert memory.peak < MATRIX / 10
    with memory_meter() as memory:
        result.plan()
    assert memory.peak >= MATRIX  # the meter sees a matrix


# The compiled kernels work in scratch memory of their own, for one problem a thread, and allocate only the gradient.
LIMIT = {"reference": 16 * MATRIX, "cpu": 1.1 * MATRIX}


@pytest.mark.parametrize("backend", LIMIT)
def test_implicit_backward_keeps_no_history(backend):
    few, many = peak_of_backward("implicit", 5, backend), peak_of_backward("implicit", 200, backend)
    assert MATRIX <= few < LIMIT[backend]
    assert many < 1.05 * few


@pytest.mark.parametrize("backend", LIMIT)
def test_unrolled_backward_keeps_potentials_and_never_the_graph(backend):
    few, many = peak_of_backward("unrolled", 10, backend), peak_of_backward("unrolled", 60, backend)
    assert MATRIX <= few < LIMIT[backend]
    potentials = 50 * N_PROBLEMS * (N_ROWS + N_COLS + 1) * 4
    assert many - few < 2 * potentials + MATRIX / 100
    if backend == "reference":
        assert many - few > 0.5 * potentials  # the states are there: the meter would see more


def test_what_follows_from_the_potentials_makes_no_other_matrix():
    cost = random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float32).requires_grad_()
    result = sinkhorn(cost, epsilon=0.05, gradient="none")
    with memory_meter() as memory:
        _ = result.value, result.transport_cost, result.marginals()
    assert memory.peak < MATRIX / 10
    result = sinkhorn(cost, epsilon=0.05)
    for scalar in (result.value.sum(), result.transport_cost.sum()):
        with memory_meter() as memory:
            torch.autograd.grad(scalar, cost, retain_graph=True)
        assert MATRIX <= memory.peak < 3.1 * MATRIX  # through the plan, through the potentials, and their sum


def test_a_graph_of_the_iterations_is_noticed():
    """Negative control: autograd through the reference keeps matrices of every iteration."""
    cost = random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float32).requires_grad_()
    a = torch.full((N_PROBLEMS, N_ROWS), 1 / N_ROWS)
    b = torch.full((N_PROBLEMS, N_COLS), 1 / N_COLS)
    with memory_meter() as memory:
        reference.sinkhorn(cost, a, b, torch.full((N_PROBLEMS,), 0.05), tau_a=0.9, tau_b=0.9, max_iters=10, tol=0.0)
    assert memory.peak > 16 * MATRIX


def test_a_cost_in_another_layout_or_dtype_is_copied_once():
    cost = problems.strided(random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float32))
    with memory_meter() as memory:
        sinkhorn(cost, epsilon=0.05)
    assert memory.peak < 1.1 * MATRIX
    half = random_costs(N_PROBLEMS, N_ROWS, N_COLS, dtype=torch.float16)
    with memory_meter() as memory:
        sinkhorn(half, epsilon=0.05)
    assert memory.peak < 1.1 * MATRIX
