"""The entropic map: each text goes to the mean of the videos that the transport plan sends it to."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pisces_kernels import sinkhorn_points

ANCHORS = 4096  # most videos that a map keeps, and most texts that it is solved with
EPSILON = 0.05  # of |y - x|^2, which is at most 4
MAX_ITERS = 2000


def entropic_map(text: Tensor, video: Tensor, *, epsilon: float = EPSILON, seed: int = 0) -> dict[str, Tensor]:
    """Solve entropic transport from texts to videos; its potential gives the map for any text.

        T(y) = sum_j w_j(y) x_j,   w_j(y) = softmax_j((g_j - |y - x_j|^2) / epsilon)

    For a text of the fit that is the barycentric projection of its row of the plan.

    Args:
        text: [n, E] normalised; need not be paired with `video`. Of more than 4,096 as many are drawn.
        video: [m, E] normalised, likewise.
        epsilon: entropic regularisation > 0, in units of the cost |y - x|^2.
        seed: of the draw.

    Returns:
        anchors [m, E], potential [m] and epsilon [], the parts of an `Alignment`.

    Warns:
        UserWarning: the solver has not converged.

    Source:
        Pooladian and Niles-Weed 2021, "Entropic estimation of optimal transport maps" (arXiv 2109.12004).

    Example:
        >>> x = torch.nn.functional.normalize(torch.randn(40, 3), dim=-1)
        >>> entropic_map(x, x)["potential"].shape
        torch.Size([40])
    """
    generator = torch.Generator().manual_seed(seed)
    text, video = (
        z if len(z) <= ANCHORS else z[torch.randperm(len(z), generator=generator)[:ANCHORS].to(z.device)]
        for z in (text, video)
    )
    tol = 1e-3 if text.dtype == torch.float32 else 1e-10
    result = sinkhorn_points(text, video, epsilon=epsilon, max_iters=MAX_ITERS, tol=tol, gradient="none")
    if not bool(result.converged):
        warnings.warn(
            f"entropic_map: the residual is {float(result.residual):.2g} after {MAX_ITERS} iterations, wanted {tol:g}. "
            "Use a larger epsilon.",
            stacklevel=2,
        )
    return {"anchors": video, "potential": result.g, "epsilon": torch.tensor(epsilon).to(video)}
