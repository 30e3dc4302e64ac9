"""Alignment of text embeddings with the distribution of real-video embeddings: Neural OT, its fit, its metrics."""

from __future__ import annotations

from pisces.ot_map.alignment import KINDS, LINEAR, NEURAL, PAIRED, Alignment, Kind
from pisces.ot_map.encoder_digest import check_alignment, encoder_facts
from pisces.ot_map.fit import HeldOut, fit_alignment, paper_settings
from pisces.ot_map.linear import affine_ot, procrustes, ridge
from pisces.ot_map.metrics import alignment_metrics, mutual_knn, retrieval_at_1, rho, spearman
from pisces.ot_map.network import NeuralOTMap
from pisces.ot_map.neural import OBJECTIVES, FitInterrupted, Objective

__all__ = [
    "KINDS",
    "LINEAR",
    "NEURAL",
    "OBJECTIVES",
    "PAIRED",
    "Alignment",
    "FitInterrupted",
    "HeldOut",
    "Kind",
    "NeuralOTMap",
    "Objective",
    "affine_ot",
    "alignment_metrics",
    "check_alignment",
    "encoder_facts",
    "fit_alignment",
    "mutual_knn",
    "paper_settings",
    "procrustes",
    "retrieval_at_1",
    "rho",
    "ridge",
    "spearman",
]
