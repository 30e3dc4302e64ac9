"""Alignment of text embeddings with the distribution of real-video embeddings: Neural OT, its fit, its metrics."""

from __future__ import annotations

from pisces.ot_map.alignment import KINDS, Alignment, Kind, NeuralOTMap
from pisces.ot_map.fit import fit_alignment
from pisces.ot_map.metrics import alignment_metrics, mutual_knn, retrieval_at_1, rho, sinkhorn_divergence, spearman

__all__ = [
    "KINDS",
    "Alignment",
    "Kind",
    "NeuralOTMap",
    "alignment_metrics",
    "fit_alignment",
    "mutual_knn",
    "retrieval_at_1",
    "rho",
    "sinkhorn_divergence",
    "spearman",
]
