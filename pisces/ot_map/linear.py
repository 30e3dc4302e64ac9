"""Alignments in closed form, computed in float64: x = y matrix + offset."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

FLOOR = 1e-6  # least estimate of the shrinkage of a covariance, so that every one has an inverse
SINGULAR = 1e-10  # smallest eigenvalue over the largest below which it has none
SAME = 1e-12  # variance over mean square below which embeddings differ by rounding only
PENALTY = 1e-3  # of the mean variance of the texts: the ridge of the regression


def affine_ot(text: Tensor, video: Tensor, *, shrinkage: float | None = None) -> tuple[Tensor, Tensor]:
    """The optimal transport map between Gaussians of the means and covariances of two clouds, for squared distances.

        matrix = S_y^(-1/2) (S_y^(1/2) S_x S_y^(1/2))^(1/2) S_y^(-1/2),   offset = m_x - m_y matrix

    It is symmetric, and carries the mean of the texts exactly onto that of the videos, and likewise S_y onto S_x. These
    are the covariances after shrinking, by less the more points there are, see `shrunk_covariance`, as the inverse of a
    covariance of few texts is mostly noise: the sample covariances are carried onto each other as nearly as that.

    Args:
        text: [n, E], n >= 2; need not be paired with `video`.
        video: [m, E], m >= 2.
        shrinkage: of both covariances, in [0, 1]; None estimates it for each.

    Returns:
        (matrix [E, E], offset [E]) in float64.

    Warns:
        UserWarning: no more texts, or videos, than dimensions.

    Raises:
        ValueError: the texts are all the same; or their covariance is singular, with `shrinkage` 0.

    Source:
        Knott and Smith 1984, "On the optimal mapping of distributions"; Peyre and Cuturi 2019, remark 2.31.

    Example:
        >>> text = torch.randn(100, 3, dtype=torch.float64)
        >>> matrix, offset = affine_ot(text, 2 * text + 1)
        >>> torch.allclose(matrix, 2 * torch.eye(3, dtype=torch.float64))
        True
    """
    text, video = text.double(), video.double()
    _check_spread(text, "affine_ot")
    fewest, name = min((len(text), "texts"), (len(video), "videos"))
    if fewest <= text.shape[1]:
        warnings.warn(
            f"affine_ot: {fewest} {name} cannot determine a covariance of {text.shape[1]} dimensions: it is shrunk "
            "towards a multiple of the identity, and the map is little more than a shift. Give more of them.",
            stacklevel=2,
        )
    source, target = (shrunk_covariance(z, shrinkage) for z in (text, video))
    values, vectors = torch.linalg.eigh(source)
    if values[0] <= SINGULAR * values[-1]:
        raise ValueError(
            f"affine_ot: the covariance of the {len(text)} texts is singular, expected full rank with shrinkage "
            f"{shrinkage}. Use shrinkage=None."
        )
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    matrix = inverse @ _root(root @ target @ root) @ inverse
    return matrix, video.mean(0) - text.mean(0) @ matrix


def shrunk_covariance(x: Tensor, shrinkage: float | None = None) -> Tensor:
    """A covariance of few points, drawn towards a multiple of the identity.

        (1 - d) S + d tr(S) / E 1,   d = min(1, mean_k |z_k z_k^T - S|^2 / n / |S - tr(S) / E 1|^2)

    with z the centred points and S their covariance. d is the estimate of the best one in squared error. It vanishes as
    1 / n: of 1,500 texts of the small world (E = 32) it is .006, of 24 it is .31.

    Args:
        x: [n, E] float64, n >= 2.
        shrinkage: d, if not the estimate, which is 1e-6 at least.

    Returns:
        [E, E]; with d > 0 positive definite, unless all points are the same.

    Source:
        Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", equations 14-16.

    Example:
        >>> torch.linalg.eigvalsh(shrunk_covariance(torch.eye(4, 9, dtype=torch.float64))).min() > 0
        tensor(True)
    """
    covariance = x.T.cov()
    level = covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    if shrinkage is None:
        biased = (len(x) - 1) / len(x) * covariance
        # mean |z z^T - S|^2 = mean |z|^4 - |S|^2
        noise = ((x - x.mean(0)).square().sum(1).square().mean() - biased.square().sum()) / len(x)
        signal = (biased - (len(x) - 1) / len(x) * level).square().sum()
        shrinkage = max(float(noise / signal), FLOOR) if noise < signal else 1.0
    return (1 - shrinkage) * covariance + shrinkage * level


def ridge(text: Tensor, video: Tensor, *, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
    """Linear regression of videos on their texts, with a ridge: what knowing the pairs is worth.

        argmin |text matrix + offset - video|^2 + penalty * |text - m_y|^2 / E * |matrix|^2

    Args:
        text: [n, E], n >= 2.
        video: [n, E], row i belongs to text i.
        penalty: weight of the ridge, relative to the spread of the texts; the offset has none.

    Returns:
        (matrix [E, E], offset [E]) in float64.

    Raises:
        ValueError: `penalty` is not positive, or the texts are all the same.

    Example:
        >>> text = torch.randn(50, 3)
        >>> matrix, offset = ridge(text, text + 1, penalty=1e-12)
        >>> torch.allclose(matrix, torch.eye(3).double(), atol=1e-6)
        True
    """
    if not penalty > 0:
        raise ValueError(f"ridge: penalty is {penalty}, expected a positive number.")
    text, video = text.double(), video.double()
    _check_spread(text, "ridge")
    y, x = text - text.mean(0), video - video.mean(0)
    gram = y.T @ y
    spread = penalty * gram.trace() / len(gram)
    matrix = torch.linalg.solve(gram + spread * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), y.T @ x)
    return matrix, video.mean(0) - text.mean(0) @ matrix


def procrustes(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation or reflection about the means that brings texts nearest to their videos.

        matrix = argmin_{Q Q^T = 1} |(text - m_y) Q - (video - m_x)|^2 = U V^T,   U S V^T = (text - m_y)^T (video - m_x)

    Of n pairs it is determined in n - 1 dimensions at most.

    Args:
        text: [n, E], n >= 2.
        video: [n, E], row i belongs to text i.

    Returns:
        (matrix [E, E] orthogonal, offset [E]) in float64.

    Warns:
        UserWarning: no more pairs than dimensions.

    Raises:
        ValueError: the texts are all the same.

    Source:
        Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".

    Example:
        >>> text, turn = torch.randn(50, 3), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> torch.allclose(procrustes(text, text @ turn)[0], turn.double(), atol=1e-5)
        True
    """
    text, video = text.double(), video.double()
    _check_spread(text, "procrustes")
    n, dim = text.shape
    if n <= dim:
        warnings.warn(
            f"procrustes: {n} pairs determine a rotation in {n - 1} of {dim} dimensions, and it is arbitrary in the "
            "others. Give more of them.",
            stacklevel=2,
        )
    u, _, vh = torch.linalg.svd((text - text.mean(0)).T @ (video - video.mean(0)))
    matrix = u @ vh
    return matrix, video.mean(0) - text.mean(0) @ matrix


def _check_spread(text: Tensor, who: str) -> None:
    if text.var(0).sum() <= SAME * text.square().sum(1).mean():
        raise ValueError(f"{who}: all texts have the same embedding, expected some spread. Use kind 'mean_shift'.")


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
