"""The result of `solve` and its relatives, with the attributes of geomloss's `OTResult`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._points_result import PointsResult
from .._result import SinkhornResult
from . import _geomloss_solver as solver
from ._arrays import Origin

CITATION = """\
@inproceedings{feydy2019interpolating,
    title={Interpolating between Optimal Transport and MMD using Sinkhorn Divergences},
    author={Feydy, Jean and S{\\'e}journ{\\'e}, Thibault and Vialard, Fran{\\c{c}}ois-Xavier and Amari, Shun-ichi
        and Trouv{\\'e}, Alain and Peyr{\\'e}, Gabriel},
    booktitle={The 22nd International Conference on Artificial Intelligence and Statistics},
    pages={2681--2690},
    year={2019}
}"""


class LinearOperator:
    """A matrix that is known by what it does to arrays.

    Args:
        matmat: input_shape + (V,) -> output_shape + (V,).
        rmatmat: the transposed map.
        input_shape: (M,) or (B, M).
        output_shape: (N,) or (B, N).
    """

    def __init__(
        self,
        *,
        matmat: Callable[[Any], Any],
        rmatmat: Callable[[Any], Any],
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
    ) -> None:
        self._matmat = matmat
        self._rmatmat = rmatmat
        self._input_shape = tuple(input_shape)
        self._output_shape = tuple(output_shape)

    def __matmul__(self, x: Any) -> Any:
        """Apply the operator to an array of shape input_shape + (...), NumPy or torch: output_shape + (...)."""
        leading = tuple(x.shape[: len(self._input_shape)])
        if leading != self._input_shape:
            raise ValueError(
                f"LinearOperator: the array has shape {tuple(x.shape)}, expected {self._input_shape} + (...)."
            )
        trailing = tuple(x.shape[len(self._input_shape) :])
        return self._matmat(x.reshape(*self._input_shape, -1)).reshape(self._output_shape + trailing)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return math.prod(self._output_shape), math.prod(self._input_shape)

    def transpose(self) -> LinearOperator:
        """Return the transposed operator."""
        return LinearOperator(
            matmat=self._rmatmat,
            rmatmat=self._matmat,
            input_shape=self._output_shape,
            output_shape=self._input_shape,
        )

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        return self.transpose()

    def rescale(self, *, input_scaling: Any, output_scaling: Any) -> LinearOperator:
        """Return diag(output_scaling) @ self @ diag(input_scaling)."""
        before, after = input_scaling[..., None], output_scaling[..., None]
        return LinearOperator(
            matmat=lambda x: after * self._matmat(before * x),
            rmatmat=lambda x: before * self._rmatmat(after * x),
            input_shape=self._input_shape,
            output_shape=self._output_shape,
        )

    @classmethod
    def from_dense(cls, matrix: Any) -> LinearOperator:
        """Wrap a matrix [N, M] or [B, N, M], NumPy or torch."""
        transposed = matrix.swapaxes(-1, -2)
        return cls(
            matmat=lambda x: matrix @ x,
            rmatmat=lambda x: transposed @ x,
            input_shape=(*matrix.shape[:-2], matrix.shape[-1]),
            output_shape=tuple(matrix.shape[:-1]),
        )


class OTResult:
    """Solution of a transport problem, with the attributes of geomloss's `OTResult`.

    Everything is computed when it is first asked for and then kept. Arrays come in the library and dtype of the input;
    torch results are differentiable with respect to the cost (or the points), a and b, exactly: through the optimum,
    not through a last iteration. Shapes are [N] and [M], with a leading [B] for batches.

    Attributes:
        value: [] or [B], see `solve`.
        transport_cost: sum(plan * cost), [] or [B]; not in geomloss.
        potential_a, potential_b: dual potentials f and g of plan = exp((f + g - cost) / reg) * a * b. Balanced ones,
            which are unique up to a constant, satisfy sum(a f) = sum(b g).
        potential_aa, potential_bb: potentials of a against a and b against b, with debias only.
        density, plan: dense arrays, plan = density * a * b.
        density_operator, plan_operator: `LinearOperator`s.
        lazy_density, lazy_plan: None, as geomloss's without KeOps.
        marginal_a, marginal_b: sums of the plan over columns and over rows.
        a_to_b, b_to_a: None, as geomloss's; value_linear too, which geomloss's tests read and its results lack.
        citation: the paper that geomloss asks to cite.
        converged, residual, n_iters: bool, float and int32 per problem, diagnostics of `sinkhorn`; not in geomloss.
    """

    lazy_density = None
    lazy_plan = None
    a_to_b = None
    b_to_a = None
    value_linear = None
    citation = CITATION

    def __init__(
        self,
        origin: Origin,
        cost: Callable[[], Tensor],
        ab: SinkhornResult | PointsResult,
        aa: SinkhornResult | PointsResult | None,
        bb: SinkhornResult | PointsResult | None,
        *,
        mass_terms: bool,
    ) -> None:
        self._origin = origin
        self._cost = cost
        self._ab = ab
        self._aa = aa
        self._bb = bb
        self._mass_terms = mass_terms

    def __repr__(self) -> str:
        library = "numpy" if self._origin.numpy else "torch"
        return f"OTResult(a={list(self._ab.a.shape)}, b={list(self._ab.b.shape)}, {library}, {self._origin.dtype})"

    @functools.cached_property
    def value(self) -> Any:
        """Value of the problem."""
        total = solver.value(self._ab, mass_terms=self._mass_terms)
        for own in (self._aa, self._bb):
            if own is not None:
                total = total - solver.value(own, mass_terms=self._mass_terms) / 2
        return self._origin.array(total)

    @functools.cached_property
    def transport_cost(self) -> Any:
        """sum(plan * cost)."""
        return self._origin.array(self._ab.transport_cost)

    @functools.cached_property
    def potential_a(self) -> Any:
        """Dual potential of a."""
        return self._origin.array(self._ab.f)

    @functools.cached_property
    def potential_b(self) -> Any:
        """Dual potential of b."""
        return self._origin.array(self._ab.g)

    @functools.cached_property
    def potential_aa(self) -> Any:
        """Dual potential of a against itself."""
        return self._own_potential("potential_aa", self._aa)

    @functools.cached_property
    def potential_bb(self) -> Any:
        """Dual potential of b against itself."""
        return self._own_potential("potential_bb", self._bb)

    def _own_potential(self, name: str, own: SinkhornResult | PointsResult | None) -> Any:
        if own is None:
            raise ValueError(f"OTResult: {name} exists only with debias=True. Solve again with it.")
        return self._origin.array((own.f + own.g) / 2)

    @functools.cached_property
    def density(self) -> Any:
        """exp((f + g - cost) / reg), dense."""
        ab = self._ab
        exponent = ab.f.unsqueeze(-1) + ab.g.unsqueeze(-2) - self._cost()
        return self._origin.array((exponent / ab.epsilon[..., None, None]).exp())

    @functools.cached_property
    def plan(self) -> Any:
        """Transport plan, dense."""
        return self._origin.array(self._ab.plan())

    @functools.cached_property
    def density_operator(self) -> LinearOperator:
        """The density as an operator on [M, ...] or [B, M, ...]; streamed when the solve was."""
        ab = self._ab
        if isinstance(ab, SinkhornResult):
            return LinearOperator.from_dense(self.density)
        unit = dataclasses.replace(ab, a=torch.ones_like(ab.a), b=torch.ones_like(ab.b))
        turned = dataclasses.replace(unit, f=ab.g, g=ab.f, a=unit.b, b=unit.a, x=ab.y, y=ab.x)

        def product(solution: PointsResult) -> Callable[[Any], Any]:
            return lambda values: self._origin.array(solution.apply(self._origin.tensor(values)))

        return LinearOperator(
            matmat=product(unit),
            rmatmat=product(turned),
            input_shape=tuple(ab.b.shape),
            output_shape=tuple(ab.a.shape),
        )

    @functools.cached_property
    def plan_operator(self) -> LinearOperator:
        """The plan as an operator on [M, ...] or [B, M, ...]."""
        scales = {"input_scaling": self._ab.b, "output_scaling": self._ab.a}
        return self.density_operator.rescale(**{name: self._origin.array(w) for name, w in scales.items()})

    @functools.cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        return self._ab.marginals()

    @functools.cached_property
    def marginal_a(self) -> Any:
        """Sum of the plan over the points of b."""
        return self._origin.array(self._marginals[0])

    @functools.cached_property
    def marginal_b(self) -> Any:
        """Sum of the plan over the points of a."""
        return self._origin.array(self._marginals[1])

    @property
    def converged(self) -> Any:
        """True where the residual fell below the tolerance."""
        return self._diagnostic(self._ab.converged)

    @property
    def residual(self) -> Any:
        """Largest change of a potential, in units of reg, in the last iteration."""
        return self._diagnostic(self._ab.residual)

    @property
    def n_iters(self) -> Any:
        """Iterations at the final temperature."""
        return self._diagnostic(self._ab.n_iters)

    def _diagnostic(self, value: Tensor) -> Any:
        return value.detach().numpy()[()] if self._origin.numpy else value
