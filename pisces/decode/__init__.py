"""Exact reward gradients through the decoding of long videos, in the memory of one chunk."""

from __future__ import annotations

from pisces.decode.decoding import STREAMS, decode, decode_and_backward, describe

__all__ = ["STREAMS", "decode", "decode_and_backward", "describe"]
