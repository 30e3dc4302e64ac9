"""PISCES: post-training text-to-video generators with optimal-transport-aligned rewards.

Start at `pisces.rewards` (what is rewarded), `pisces.trainer` (how it is trained) and `pisces.pipelines` (what is
trained); `pisces demo` shows all of it at work. The kernels live in `pisces_kernels`.
"""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
