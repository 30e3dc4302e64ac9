"""POT's functions beside ours, random problems for both, and how their results are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch

REG = 0.1
TIGHT = {"stopThr": 1e-13, "numItermax": 5000}
PEERS: dict[str, Callable[..., Any]] = {
    "sinkhorn": ot.sinkhorn,
    "sinkhorn2": ot.sinkhorn2,
    "sinkhorn_log": ot.bregman.sinkhorn_log,
    "sinkhorn_unbalanced": ot.unbalanced.sinkhorn_unbalanced,
    "sinkhorn_unbalanced2": ot.unbalanced.sinkhorn_unbalanced2,
    "entropic_partial_wasserstein": ot.partial.entropic_partial_wasserstein,
    "entropic_partial_wasserstein_logscale": ot.partial.entropic_partial_wasserstein_logscale,
}


def problem(n_rows: int = 11, n_cols: int = 17, n_hists: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights with sum 1, the second (n_cols, n_hists) if asked for, and costs in [0, 1]."""
    a = (0.2 + torch.rand(n_rows, dtype=torch.float64)).numpy()
    b = (0.2 + torch.rand(n_cols, n_hists or 1, dtype=torch.float64)).numpy()
    b = b / b.sum(0)
    return a / a.sum(), b if n_hists else b[:, 0], torch.rand(n_rows, n_cols, dtype=torch.float64).numpy()


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call without the warnings that POT gives for entropy as the reference measure or for a run cut short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def close(ours: Any, theirs: Any, atol: float = 1e-10) -> None:
    """Largest absolute difference below atol."""
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=atol, rtol=0)
