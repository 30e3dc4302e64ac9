"""Optimal transport for rewards of text-to-video generators: `sinkhorn`, `token_cost`, `transport_attention`."""

from . import reference
from ._dispatch import BACKENDS, build_info, why_not
from ._divergence import sinkhorn_divergence
from ._points import sinkhorn_points
from ._points_result import PointsResult
from ._result import SinkhornResult
from ._sinkhorn import sinkhorn
from ._token_cost import token_cost
from ._transport_attention import transport_attention

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "PointsResult",
    "SinkhornResult",
    "build_info",
    "reference",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "token_cost",
    "transport_attention",
    "why_not",
]
