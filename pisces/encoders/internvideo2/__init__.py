"""InternVideo2 stage 2, written anew; it reads the official checkpoint."""

from __future__ import annotations

from pisces.encoders.internvideo2.config import InternVideo2Config
from pisces.encoders.internvideo2.model import InternVideo2

__all__ = ["InternVideo2", "InternVideo2Config"]
