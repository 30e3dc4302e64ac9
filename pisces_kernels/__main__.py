"""Report of the environment: `python -m pisces_kernels`."""

from __future__ import annotations

import platform
import sys

import torch

from . import BACKENDS, __version__, build_info, why_not


def report() -> str:
    """Versions, build and back ends in words.

    Returns:
        Several lines.
    """
    lines = [
        f"pisces_kernels {__version__}",
        f"Python {platform.python_version()} on {platform.platform()} ({platform.machine()})",
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    build = build_info()
    if build is None:
        lines.append("extension: not built")
    else:
        sets = build["instruction_sets"]
        assert isinstance(sets, list)  # for the type checker
        used = build["instruction_set"]
        lines.append(f"extension: {build['compiler']}; instruction sets {', '.join(sets)}; in use {used}")
        cuda = "not compiled (no nvcc when the extension was built)"
        if build["cuda"]:
            cuda = f"compiled with {build['cuda_version']} for {build['cuda_architectures']}"
        lines.append(f"CUDA kernels: {cuda}")
    for backend in BACKENDS:
        reason = why_not(backend)
        lines.append(f"back end {backend}: " + ("available" if reason is None else f"not available: {reason}"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
