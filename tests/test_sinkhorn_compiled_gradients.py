"""The compiled plan and gradients of dense problems against the torch formulas in float64."""

from __future__ import annotations

import problems
import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights

from pisces_kernels import _dispatch, _plan, sinkhorn
from pisces_kernels._implicit import _implicit_backward_op
from pisces_kernels._unrolled import _unrolled_backward_op

SHAPES = [(1, 1), (1, 37), (29, 1), (7, 33), (33, 7), (40, 257), (65, 31), (13, 2049)]
GRADIENTS = ["implicit", "unrolled"]


def random_problem(shape, kind, special, dtype=torch.float64):
    """(leaves, options) of three problems; special: "", "masked" (NaN where masked) or "weightless" (zero weights)."""
    n_rows, n_cols = shape
    cost, a, b = random_costs(3, n_rows, n_cols), random_weights(3, n_rows), random_weights(3, n_cols)
    options: dict[str, object] = dict(KINDS[kind])
    if special == "masked":
        rows, cols = random_mask(3, n_rows), random_mask(3, n_cols)
        a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
        cost = problems.poisoned(cost, rows.unsqueeze(-1) & cols.unsqueeze(-2))
        options |= {"row_mask": rows, "col_mask": cols}
    elif special == "weightless" and n_rows > 1 and n_cols > 1:
        a[:, n_rows // 2] = 0
        b[:, n_cols // 2] = 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    leaves = {"cost": cost.to(dtype), "a": a.to(dtype), "b": b.to(dtype)}
    leaves["epsilon"] = torch.tensor([0.05, 0.1, 0.3], dtype=torch.float64)
    if kind == "mass":
        leaves["mass"] = torch.tensor([0.63, 0.71, 0.52], dtype=torch.float64)
    return leaves, {name: value for name, value in options.items() if name != "mass"}


def everything(leaves, options, weights):
    """All results of one solve and their gradients, by name."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    result = sinkhorn(**leaves, **options)
    rows, cols = result.marginals()
    log_plan = result.log_plan()
    scalars = {
        "potentials": (result.f * weights[0]).sum() + (result.g * weights[1]).sum(),
        "plan": (result.plan() * weights[2]).sum(),
        "log_plan": (log_plan * weights[2])[log_plan > -torch.inf].sum(),
        "value": result.value.sum(),
        "transport_cost": result.transport_cost.sum(),
        "marginals": (rows * weights[0]).sum() + (cols * weights[1]).sum(),
    }
    found = {"the plan": result.plan(), "its logarithm": log_plan.nan_to_num(neginf=-1e3), "f": result.f, **scalars}
    for name, scalar in scalars.items():
        gradients = torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True)
        found |= {f"{name} by {leaf}": value for leaf, value in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def random_functional(shape):
    n_rows, n_cols = shape
    return tuple(torch.randn(3, *size, dtype=torch.float64) for size in ((n_rows,), (n_cols,), (n_rows, n_cols)))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", ["", "masked", "weightless"])
def test_equal_to_the_formulas_in_float64(gradient, kind, special):
    stop = {"max_iters": 500, "tol": 1e-12} if gradient == "implicit" else {"max_iters": 7, "tol": 0.0}
    for shape in SHAPES:
        leaves, options = random_problem(shape, kind, special)
        weights = random_functional(shape)
        options |= {"gradient": gradient, **stop}
        compiled = everything(leaves, {**options, "backend": "cpu"}, weights)
        expected = everything(leaves, {**options, "backend": "reference"}, weights)
        for name, value in expected.items():
            gap = (compiled[name] - value).abs().max() / (1 + value.abs().max())
            assert gap < 1e-10, (shape, name, gap)


def snapped(potential):
    """Potentials that are the largest one up to rounding, made equal to it."""
    top = potential.amax(-1, keepdim=True)
    return torch.where(potential >= top - 1e-6 * potential.abs().amax(-1, keepdim=True), top, potential)


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_at_given_potentials(kind, epsilon):
    """Only the rounding of the gradient itself: both precisions start from the same potentials.

    A plan may fall apart into blocks that exchange as little as 1e-13: then no formula has more than a few digits in
    float64, and it has to be the same one.
    """
    for shape in SHAPES:
        leaves, options = random_problem(shape, kind, "", torch.float32)
        leaves["epsilon"] = torch.full((3,), epsilon, dtype=torch.float64)
        result = sinkhorn(**leaves, **options)
        cost, a, b = leaves["cost"], leaves["a"], leaves["b"]
        grads = [weight.float() for weight in random_functional(shape)[:2]]
        # Which caps of an exact mass are slack must not depend on the precision.
        inputs = (*grads, cost, a, b, result.epsilon, *(snapped(potential) for potential in (result.f, result.g)))
        options = (*result.tau, kind == "mass", None, None)
        narrow = _implicit_backward_op(*inputs, *options, "cpu")
        wide = _implicit_backward_op(*(value.double() for value in inputs), *options, "cpu")
        for one, other in zip(narrow, wide, strict=True):
            gap = (one.double() - other).abs().max() / (1 + other.abs().max())
            assert gap < 2e-6 / epsilon, (shape, gap)


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
@pytest.mark.parametrize("kind", ["balanced", "tau", "semi"])
def test_float32_through_the_iterations(kind, epsilon):
    for shape in SHAPES:
        leaves, options = random_problem(shape, kind, "", torch.float32)
        leaves["epsilon"] = torch.full((3,), epsilon, dtype=torch.float64)
        weights = random_functional(shape)[:2]
        found = []
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
            used = [leaves[name].to(dtype).requires_grad_() for name in ("cost", "a", "b")]
            stop = {"max_iters": 30, "tol": 0.0, "gradient": "unrolled", "backend": backend}
            result = sinkhorn(*used, epsilon=leaves["epsilon"], **stop, **options)
            scalar = (result.f * weights[0].to(dtype)).sum() + (result.g * weights[1].to(dtype)).sum()
            found.append(torch.autograd.grad(scalar, used))
        for one, other in zip(*found, strict=True):
            gap = (one.double() - other).abs().max() / (1 + other.abs().max())
            assert gap < 1e-6 / epsilon, (shape, gap)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_warm_starts(gradient, kind):
    cost = random_costs(3, 6, 17)
    start_f, start_g = 0.1 * torch.randn(3, 6, dtype=torch.float64), 0.1 * torch.randn(3, 17, dtype=torch.float64)
    for starts in ({"f_init": start_f}, {"g_init": start_g}, {"f_init": start_f, "g_init": start_g}):
        found = {}
        for backend in ("cpu", "reference"):
            leaves = {name: value.clone().requires_grad_() for name, value in {"cost": cost, **starts}.items()}
            options = {"epsilon": 0.05, "max_iters": 3, "tol": 0.0, "gradient": gradient, **KINDS[kind]}
            result = sinkhorn(**leaves, **options, backend=backend)
            scalar = result.f.square().sum() + result.g.sin().sum()
            found[backend] = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=gradient == "implicit")
        for one, other in zip(found["cpu"], found["reference"], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, atol=1e-10)


def test_ranges_that_float32_and_float64_cannot_hold():
    """Damped marginals of exp(-50), exp(-250) and exp(-2500): in float32, in float64, by the formulas."""
    for spread, dtype in ((1.0, torch.float32), (5.0, torch.float32), (50.0, torch.float64)):
        cost = random_costs(2, 9, 40)
        cost[:, 3:] += spread
        weight = torch.randn(2, 9, dtype=torch.float64)
        found = {}
        for backend, used in (("cpu", dtype), ("reference", torch.float64)):
            leaf = cost.to(used).requires_grad_()
            result = sinkhorn(leaf, epsilon=0.02, tau=0.9, max_iters=400, tol=1e-6, backend=backend)
            (found[backend],) = torch.autograd.grad((result.f * weight.to(used)).sum(), leaf)
        assert torch.allclose(found["cpu"].double(), found["reference"], atol=1e-5 if dtype == torch.float32 else 1e-8)
        assert found["reference"].abs().max() > 0.1


def test_a_nearly_decoupled_problem():
    """Two blocks that exchange exp(-25) of their mass: the system has an eigenvalue of that size."""
    cost = 0.3 * random_costs(1, 12, 50)
    cost[:, :6, 25:] += 1.0
    cost[:, 6:, :25] += 1.0
    weight = torch.randn(1, 12, dtype=torch.float64)
    solved = sinkhorn(cost, epsilon=0.04, tol=1e-13, max_iters=20000)
    found = []
    for backend in ("cpu", "reference"):
        leaf = cost.clone().requires_grad_()
        options = {"epsilon": 0.04, "max_iters": 1, "f_init": solved.f, "g_init": solved.g, "backend": backend}
        found.append(torch.autograd.grad((sinkhorn(leaf, **options).f * weight).sum(), leaf)[0])
    assert torch.allclose(*found, rtol=0, atol=1e-4 * found[1].abs().max().item())


def test_nothing_changes_with_the_number_of_threads():
    # Sizes that are cut into chunks, one problem and several.
    threads = torch.get_num_threads()
    for size, shape in ((1, (150, 900)), (3, (300, 520)), (5, (520, 300))):
        cost = random_costs(size, *shape, dtype=torch.float32)
        weight = torch.randn(size, *shape)
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for gradient in GRADIENTS:
                    for kind in ({"tau": 0.9}, {"mass": 0.63}):
                        leaf = cost.clone().requires_grad_()
                        result = sinkhorn(leaf, epsilon=0.05, max_iters=5, gradient=gradient, **kind)
                        scalar = (result.plan() * weight).sum() + result.value.sum() + result.transport_cost.sum()
                        results.append((result.plan().detach(), torch.autograd.grad(scalar, leaf)[0]))
        finally:
            torch.set_num_threads(threads)
        first, *others = (results[k : k + 4] for k in range(0, len(results), 4))
        for other in others:
            for one, two in zip(first, other, strict=True):
                assert torch.equal(one[0], two[0])
                assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_instruction_set(gradient):
    module = _dispatch.extension()
    leaves, options = random_problem((40, 257), "semi", "masked")
    options |= {"gradient": gradient, "max_iters": 9, "tol": 0.0}
    weights = random_functional((40, 257))
    expected = everything(leaves, {**options, "backend": "reference"}, weights)
    try:
        for instruction_set in module.build_info()["instruction_sets"]:
            module.use_instruction_set(instruction_set)
            found = everything(leaves, {**options, "backend": "cpu"}, weights)
            for name, value in expected.items():
                gap = (found[name] - value).abs().max() / (1 + value.abs().max())
                assert gap < 1e-10, (instruction_set, name, gap)
    finally:
        module.use_instruction_set(None)


def test_what_has_no_solution_has_no_gradient():
    """NaN potentials give a NaN plan; a problem without weight gives zeros; the others are not touched."""
    cost = random_costs(3, 6, 11)
    alone = sinkhorn(cost[2], epsilon=0.1)
    cost[0, 2, 3] = torch.nan
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    leaf = cost.clone().requires_grad_()
    result = sinkhorn(leaf, epsilon=0.1, row_mask=mask)
    assert result.plan()[0].isnan().all()
    assert result.value[0].isnan()
    assert (result.plan()[1] == 0).all()
    assert torch.allclose(result.plan()[2], alone.plan(), atol=1e-12)
    (gradient,) = torch.autograd.grad(result.f[1:].sum() + result.plan()[1:].sum(), leaf)
    assert (gradient[1] == 0).all()
    assert torch.isfinite(gradient[2]).all()


def test_operators_pass_opcheck():
    cost = random_costs(2, 4, 6)
    f, g = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    a, b, eps = random_weights(2, 4), random_weights(2, 6), torch.full((2,), 0.3, dtype=torch.float64)
    solved = [t.requires_grad_() for t in (cost, f, g, a, b, eps)]
    masks = (random_mask(2, 4), None)
    for logarithm in (False, True):
        torch.library.opcheck(_plan._plan_op, (*solved, *masks, logarithm, "cpu"))
    torch.library.opcheck(_plan._sums_op, (*solved, *masks, "cpu"))
    torch.library.opcheck(
        _plan._backward_op, (torch.randn(2, 4, 6, dtype=torch.float64), None, None, None, *solved, *masks, "cpu")
    )
    grads = (torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64))
    torch.library.opcheck(_implicit_backward_op, (*grads, cost, a, b, eps, f, g, 0.9, 0.8, False, *masks, "cpu"))
    # The unrolled gradient's own gradient runs as many iterations as the data ask for, which no traced graph can.
    n_iters = torch.tensor([2, 3], dtype=torch.int32)
    for backend in ("reference", "cpu"):
        inputs = (*grads, cost, a, b, eps, None, None, None, 0.9, 0.8, *masks, n_iters, 3, backend)
        torch.library.opcheck(_unrolled_backward_op, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_may_change_which_side_is_the_longer_one(backend):
    """The gradient of balanced weights is known up to a constant, which must not depend on what is masked."""
    cost, weight = random_costs(1, 12, 15), torch.randn(1, 12, dtype=torch.float64)
    rows, cols = torch.ones(1, 12, dtype=torch.bool), torch.arange(15).unsqueeze(0) % 2 == 0  # 12 x 15 becomes 12 x 8
    a, b = random_weights(1, 12), torch.where(cols, random_weights(1, 15), 0.0)
    a, b = a / a.sum(), b / b.sum()
    results = []
    for masked in (True, False):
        leaves = [cost, a, b] if masked else [cost[..., cols[0]], a, b[..., cols[0]]]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        masks = {"row_mask": rows, "col_mask": cols} if masked else {}
        solved = sinkhorn(*leaves, epsilon=0.1, tol=1e-12, max_iters=5000, backend=backend, **masks)
        results.append(torch.autograd.grad((solved.f * weight).sum(), leaves))
    (by_cost, by_a, by_b), (_, other_a, other_b) = results
    assert torch.allclose(by_a, other_a, rtol=0, atol=1e-10)
    assert torch.allclose(by_b[..., cols[0]], other_b, rtol=0, atol=1e-10)
    assert (by_cost[..., ~cols[0]] == 0).all()
