"""Exact reward gradients through the decoding of long videos, in the memory of one chunk."""

from __future__ import annotations

from pisces.decode.decoding import STREAMS, decode, decode_and_backward, describe
from pisces.decode.plan import Plan, choose, latents_shape, plan_decode

__all__ = ["STREAMS", "Plan", "choose", "decode", "decode_and_backward", "describe", "latents_shape", "plan_decode"]
