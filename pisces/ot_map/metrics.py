"""How good an alignment is, on held-out pairs: the paper's metrics and those that predict the reward's use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.ot_map.alignment import Alignment
from pisces_kernels import sinkhorn_divergence

DIVERGENCE_EPSILON = 0.05  # of the cost |a - b|^2 / 2
MAX_ITERS = 2000  # of its solver: clouds that nearly coincide along a line take 900
NEIGHBOURS = 10  # the paper's k
MOST_PAIRS = 4096  # of which distances are ranked and transport is solved: the work grows with their square
SAME = 1e-12  # square of the texts' spread over that of their length below which they differ by rounding only
ROWS, SIMILARITIES = 4096, 2**26  # most rows and entries of a matrix of similarities that are held at a time


def alignment_metrics(alignment: Alignment, text: Tensor, video: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Measure an alignment on pairs that it was not fitted on.

    In the small world retrieval and `rho` predict whether a map helps the reward; cosine, gap and Sinkhorn divergence
    improve even where the reward gets worse, and mutual k-NN does not see a translation at all. So a map that lowers
    `r_at_1` or raises `rho` against no alignment is reported with a warning. Where all captions are the same there is
    nothing to retrieve: `r_at_1` is 1, and `rho` and `spearman` are NaN.

    Args:
        alignment: what to measure.
        text: [n, E] text embeddings, n >= 3.
        video: [n, E] embeddings of the videos of these texts.
        captions: n captions; a video of an equal caption counts as found.

    Returns:
        gap: |mean of aligned texts - mean of aligned videos|.
        cosine: mean cosine of true pairs, the quality reward of real videos.
        r_at_1: share of texts whose nearest video has their caption.
        rho: variance over videos of the reward's caption-independent part, relative to the rest; see `rho`.
        sinkhorn_divergence: debiased entropic transport cost between the two aligned sets, with cost |a - b|^2 / 2 and
            epsilon 0.05: half of `pisces_kernels.sinkhorn_divergence` at epsilon 0.1.
        mutual_knn: overlap of the 10 neighbours among aligned texts with those among videos.
        spearman: rank correlation of pairwise text distances before and after. This and the divergence are of 4,096
            pairs, evenly spaced, where there are more.

    Warns:
        UserWarning: `r_at_1` is lower or `rho` higher than without alignment, or all captions are the same.
        RuntimeWarning: the solver of the divergence has not converged.

    Raises:
        ValueError: shapes or number of captions do not fit.
    """
    n = len(text)
    if text.shape != video.shape or text.dim() != 2 or n < 3 or len(captions) != n:
        raise ValueError(
            f"alignment_metrics: got text {tuple(text.shape)}, video {tuple(video.shape)} and {len(captions)} "
            "captions, expected (n, E), (n, E) and n of them, n at least 3."
        )
    plain = F.normalize(text.detach(), dim=-1)
    with torch.no_grad():
        q, v = alignment.text(text), alignment.video(video)
    label = caption_numbers(captions)
    some = torch.linspace(0, n - 1, min(n, MOST_PAIRS)).round().long().to(q.device)
    metrics = {
        "gap": float((q.mean(0) - v.mean(0)).norm()),
        "cosine": float((q * v).sum(-1).mean()),
        "r_at_1": retrieval_at_1(q, v, label),
        "rho": rho(q, v),
        "sinkhorn_divergence": _divergence(q[some], v[some]),
        "mutual_knn": mutual_knn(q, v, k=min(NEIGHBOURS, n - 1)),
        "spearman": spearman(torch.pdist(plain[some]), torch.pdist(q[some])),
    }
    if not label.any():
        warnings.warn(
            "alignment_metrics: all captions are the same, so that retrieval, rho and the order of distances between "
            "texts say nothing. Measure on videos with different captions.",
            stacklevel=2,
        )
        return metrics | {"rho": math.nan, "spearman": math.nan}
    if alignment.kind != "none":
        plain_video = F.normalize(video.detach(), dim=-1)
        before = {"r_at_1": retrieval_at_1(plain, plain_video, label), "rho": rho(plain, plain_video)}
        for name, worse in (("r_at_1", "lowers"), ("rho", "raises")):
            change = metrics[name] - before[name]
            if (change < 0) if name == "r_at_1" else (change > 0):
                warnings.warn(
                    f"alignment_metrics: kind {alignment.kind!r} {worse} {name} from {before[name]:.3f} to "
                    f"{metrics[name]:.3f}; the quality reward may get worse with it than with kind 'none'.",
                    stacklevel=2,
                )
    return metrics


def caption_numbers(captions: Sequence[str]) -> Tensor:
    """One whole number a caption, [n], equal for equal captions."""
    number: dict[str, int] = {}
    return torch.tensor([number.setdefault(caption, len(number)) for caption in captions])


def retrieval_at_1(text: Tensor, video: Tensor, label: Tensor) -> float:
    """Share of texts whose most similar video has the same label.

    Args:
        text: [n, E] normalised.
        video: [n, E] normalised, row i belongs to text i.
        label: [n] long, equal for equal captions.
    """
    label = label.to(text.device)
    nearest = torch.cat([(part @ video.T).argmax(1) for part in text.split(_rows(len(video)))])
    return float((label[nearest] == label).float().mean())


def rho(text: Tensor, video: Tensor) -> float:
    """Share of the reward's variance over videos that no caption explains, against the share that one does.

        rho = Var_v(mean_t(q_t) . v) / mean_t Var_v((q_t - mean_t(q_t)) . v)

    The numerator is a reward for "typical video" that is the same for every caption. Large values mean that it drowns
    what the caption asks for; infinite is that of texts that are all the same, up to rounding.

    Args:
        text: q [n, E].
        video: v [m, E].
    """
    # Var_v(d . v) = d C d with the covariance C of the videos: no matrix of all texts with all videos
    mean = text.mean(0)
    offsets, spread = text - mean, video - video.mean(0)
    if offsets.square().sum() <= SAME * text.square().sum():
        return math.inf
    covariance = spread.T @ spread / (len(video) - 1)
    return float((mean @ covariance @ mean) / ((offsets @ covariance) * offsets).sum(1).mean())


def _divergence(x: Tensor, y: Tensor) -> float:
    """Debiased entropic transport between two clouds [n, E] and [m, E], with cost |a - b|^2 / 2."""
    # the kernel has the cost |a - b|^2: twice the cost at twice the epsilon is twice the divergence
    return float(sinkhorn_divergence(x, y, epsilon=2 * DIVERGENCE_EPSILON, max_iters=MAX_ITERS)) / 2


def mutual_knn(x: Tensor, y: Tensor, *, k: int = NEIGHBOURS) -> float:
    """Mean overlap, in [0, 1], of the k cosine neighbours of row i within x with those within y.

    Args:
        x: [n, E].
        y: [n, F], the same things in the same order.
        k: neighbours, at most n - 1.

    Raises:
        ValueError: other numbers of rows, or k out of range.
    """
    n = len(x)
    if len(y) != n or not 1 <= k < n:
        raise ValueError(
            f"mutual_knn: got {n} and {len(y)} rows and k = {k}, expected equal numbers and 1 <= k < {n}. "
            "Pass the two embeddings of the same things, more than k of them."
        )
    first, second = (_nearest(F.normalize(z, dim=-1), k) for z in (x, y))
    return float((first[:, :, None] == second[:, None, :]).any(2).sum(1).float().mean() / k)


def _rows(n: int) -> int:
    """Rows of similarities with n others that are computed at once."""
    return max(1, min(ROWS, SIMILARITIES // max(1, n)))


def _nearest(z: Tensor, k: int) -> Tensor:
    """Numbers [n, k] of the k rows that are most similar to each row, itself left out."""
    found, rows = [], _rows(len(z))
    for start in range(0, len(z), rows):
        similarity = z[start : start + rows] @ z.T
        similarity.diagonal(start).fill_(-torch.inf)
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x [n] and y [n]; equal values share their mean rank, NaN if a side is constant."""
    ranks = torch.stack([average_ranks(x), average_ranks(y)])
    return float(torch.corrcoef(ranks)[0, 1])


def average_ranks(x: Tensor) -> Tensor:
    """Ranks 1 .. n of x [n] in float64; equal values share their mean rank."""
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    # before halving, which makes whole numbers float32: that has no halves above 2^23
    count = count.double()
    return (count.cumsum(0) - (count - 1) / 2)[inverse]
