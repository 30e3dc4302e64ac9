"""Alignments in closed form, computed in float64: x = y matrix + offset."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 1e-6  # of the mean variance, added to both covariances where the texts' is singular
SINGULAR = 1e-10  # smallest eigenvalue over the largest below which it is
PENALTY = 1e-3  # of the mean variance of the texts: the ridge of the regression


def affine_ot(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal transport map between Gaussians of the means and covariances of two clouds, for squared distances.

        matrix = S_y^(-1/2) (S_y^(1/2) S_x S_y^(1/2))^(1/2) S_y^(-1/2),   offset = m_x - m_y matrix

    It is symmetric, and carries the mean and the covariance of the texts exactly onto those of the videos. Where S_y is
    singular (fewer texts than dimensions, or texts in a subspace), 1e-6 of its mean variance is added to the
    diagonals of both.

    Args:
        text: [n, E], n >= 2; need not be paired with `video`.
        video: [m, E], m >= 2.

    Returns:
        (matrix [E, E], offset [E]) in float64.

    Raises:
        ValueError: the texts are all the same.

    Source:
        Knott and Smith 1984, "On the optimal mapping of distributions"; Peyre and Cuturi 2019, remark 2.31.

    Example:
        >>> text = torch.randn(100, 3, dtype=torch.float64)
        >>> matrix, offset = affine_ot(text, 2 * text + 1)
        >>> torch.allclose(matrix, 2 * torch.eye(3, dtype=torch.float64))
        True
    """
    text, video = text.double(), video.double()
    source, target = text.T.cov(), video.T.cov()
    values = torch.linalg.eigvalsh(source)
    if values[-1] <= 0:
        raise ValueError("affine_ot: all texts have the same embedding, expected some spread.")
    if values[0] <= SINGULAR * values[-1]:
        shrinkage = SHRINKAGE * values.mean() * torch.eye(len(values), dtype=torch.float64, device=text.device)
        source, target = source + shrinkage, target + shrinkage
    values, vectors = torch.linalg.eigh(source)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    matrix = inverse @ _root(root @ target @ root) @ inverse
    return matrix, video.mean(0) - text.mean(0) @ matrix


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
        ValueError: `penalty` is not positive.

    Example:
        >>> text = torch.randn(50, 3)
        >>> matrix, offset = ridge(text, text + 1, penalty=1e-12)
        >>> torch.allclose(matrix, torch.eye(3).double(), atol=1e-6)
        True
    """
    if not penalty > 0:
        raise ValueError(f"ridge: penalty is {penalty}, expected a positive number.")
    text, video = text.double(), video.double()
    y, x = text - text.mean(0), video - video.mean(0)
    gram = y.T @ y
    spread = penalty * gram.trace() / len(gram)
    matrix = torch.linalg.solve(gram + spread * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), y.T @ x)
    return matrix, video.mean(0) - text.mean(0) @ matrix


def procrustes(text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation or reflection about the means that brings texts nearest to their videos.

        matrix = argmin_{Q Q^T = 1} |(text - m_y) Q - (video - m_x)|^2 = U V^T,   U S V^T = (text - m_y)^T (video - m_x)

    Args:
        text: [n, E], n >= 2.
        video: [n, E], row i belongs to text i.

    Returns:
        (matrix [E, E] orthogonal, offset [E]) in float64.

    Source:
        Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".

    Example:
        >>> text, turn = torch.randn(50, 3), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> torch.allclose(procrustes(text, text @ turn)[0], turn.double(), atol=1e-5)
        True
    """
    text, video = text.double(), video.double()
    u, _, vh = torch.linalg.svd((text - text.mean(0)).T @ (video - video.mean(0)))
    matrix = u @ vh
    return matrix, video.mean(0) - text.mean(0) @ matrix


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix; rounding below zero counts as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
