"""Optimal transport for rewards of text-to-video generators: `sinkhorn`, `token_cost`, `transport_attention`."""

from . import reference
from ._dispatch import BACKENDS, build_info, why_not
from ._sinkhorn import SinkhornResult, sinkhorn
from ._token_cost import token_cost
from ._transport_attention import transport_attention

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "SinkhornResult",
    "build_info",
    "reference",
    "sinkhorn",
    "token_cost",
    "transport_attention",
    "why_not",
]
