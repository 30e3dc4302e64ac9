"""FlashSinkhorn's streaming log-sum-exp, compiled for a GPU that is not there, and the instructions of its loop."""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import gpu_static

POINTER, SIZE, NUMBER = "*fp32", "i32", "fp32"
ARGUMENTS = {
    "x_ptr": POINTER, "y_ptr": POINTER, "g_hat_ptr": POINTER, "log_w_ptr": POINTER, "out_ptr": POINTER, "n": SIZE,
    "m": SIZE, "stride_x0": SIZE, "stride_y0": SIZE, "coord_scale": NUMBER, "eps": NUMBER, "damping": NUMBER,
    "CACHE_KEY_N": SIZE, "CACHE_KEY_M": SIZE,
}  # fmt: skip
# Rows, columns, features, warps, stages.
TILES = ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 128, 32, 4, 3), (128, 64, 32, 4, 2))


@lru_cache
def instructions_per_pair(sm: int, dim: int) -> float:
    """Instructions a thread and pair of points of the best of some tile sizes, with TF32.

    Args:
        sm: compute capability, 80, 90 or 100.
        dim: features.

    Returns:
        The smallest count.

    Raises:
        SystemExit: FlashSinkhorn 0.4.1 or triton is not installed.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    try:
        from flash_sinkhorn.kernels import sinkhorn_flashstyle_sqeuclid as kernels
        from triton import compile as triton_compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise SystemExit(f"{error}. Install it: pip install flash-sinkhorn==0.4.1 triton==3.9.0") from None
    function: Any = kernels._flashsinkhorn_lse_fused_kernel_impl
    while type(function).__name__ != "JITFunction":  # below its autotuner
        function = function.fn
    counts = []
    for n_rows, n_cols, depth, warps, stages in TILES:
        constants = {
            "stride_x1": 1, "stride_y1": 1, "stride_out": 1, "D": dim, "ALLOW_TF32": True, "DTYPE_ID": 2,
            "USE_EXP2": True, "BLOCK_M": n_rows, "BLOCK_N": n_cols, "BLOCK_K": depth, "EVEN_N": True,
        }  # fmt: skip
        names = function.arg_names
        signature = {name: "constexpr" if name in constants else ARGUMENTS[name] for name in names}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if ARGUMENTS.get(name) in (POINTER, SIZE) and name not in constants
        }
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        done = triton_compile(
            source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps, "num_stages": stages}
        )
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(done.asm["cubin"])
            counts.append(loop_length(cubin) / (n_rows * n_cols / (32 * warps)))
    return min(counts)


def loop_length(cubin: Path) -> int:
    """Instructions of the smallest loop with exponentials: the one over tiles of columns."""
    (kernel,) = gpu_static.machine_code(cubin).values()
    (code,) = kernel.values()
    count = gpu_static.counted(code)
    spans = gpu_static.spans(code)
    loops = [span for span in spans if count(span)["MUFU"] >= 8]
    return min(count(span).total() for span in loops)
