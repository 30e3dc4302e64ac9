"""Which back end runs an operation, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")
# Where the adapter of an operation is, in _compiled (C++, CUDA) and in _triton alike: (module, function).
ADAPTERS = {
    "sinkhorn": ("sinkhorn", "sinkhorn"),
    "implicit": ("gradients", "implicit"),
    "unrolled": ("gradients", "unrolled"),
    "plan": ("plan", "plan"),
    "plan_sums": ("plan", "plan_sums"),
    "plan_backward": ("plan", "plan_backward"),
    "token_cost": ("cost", "token_cost"),
    "token_cost_gradient": ("cost", "token_cost_gradient"),
    "cosine_gradient": ("cost", "cosine_gradient"),
    "transport_attention": ("cost", "transport_attention"),
    "fusion_gradient": ("cost", "fusion_gradient"),
    "points_solve": ("points", "sinkhorn_points"),
    "points_self": ("points", "self_transport"),
    "points_transform": ("points", "soft_minimum"),
    "points_product": ("points", "product"),
}
# What a GPU back end has kernels for; the rest is PyTorch's work on the same device. The CPU kernels do everything.
ON_GPU = frozenset(ADAPTERS) - {"unrolled", "token_cost_gradient"}
KERNELS = {"cpu": frozenset(ADAPTERS) - {"cosine_gradient"}, "cuda": ON_GPU, "triton": ON_GPU}


@lru_cache(maxsize=1)
def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("pisces_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


def extension() -> ModuleType:
    """Return the compiled extension, or raise ImportError with the reason."""
    module, reason = _load_extension()
    if module is None:
        raise ImportError(f"pisces_kernels._C cannot be imported ({reason}). Build it: pip install -e .")
    return module


def build_info() -> dict[str, object] | None:
    """What the extension was built with (compiler, instruction sets, CUDA), or None without an extension."""
    module, _ = _load_extension()
    return None if module is None else dict(module.build_info())


@lru_cache(maxsize=1)
def _cuda_problem() -> str | None:
    module, reason = _load_extension()
    if module is None:
        return f"the extension is not there: {reason}"
    if not module.build_info()["cuda"]:
        return "the extension was built without CUDA (no nvcc was found); install nvcc and reinstall"
    n_devices, message = module.cuda_devices()
    if n_devices == 0:
        return f"no CUDA device: {message}"
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA device (a CPU build of PyTorch, or no driver)"
    return _too_old()


@lru_cache(maxsize=1)
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA or ROCm device"
    return None if torch.version.hip else _too_old()


def _too_old() -> str | None:
    """Why the NVIDIA devices here are no use, or None."""
    lowest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return None if lowest >= (8, 0) else f"compute capability 8.0 is needed, and a device here has {lowest}"


@torch.compiler.assume_constant_result  # what was built does not change, and Dynamo cannot trace an import
def why_not(backend: str) -> str | None:
    """Return None when the back end can run here, else the reason in words.

    Args:
        backend: "reference", "cpu", "cuda" or "triton".

    Returns:
        None or a sentence.
    """
    if backend == "reference":
        return None
    if backend == "cpu":
        module, reason = _load_extension()
        return None if module is not None else f"the extension is not there: {reason}"
    if backend == "cuda":
        return _cuda_problem()
    if backend == "triton":
        return _triton_problem()
    raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS} or None.")


@lru_cache(maxsize=1)
def _warn_slow() -> None:
    warnings.warn(
        f"pisces_kernels: the compiled CPU back end is missing ({why_not('cpu')}); using the slow reference.",
        RuntimeWarning,
        stacklevel=4,
    )


def has_kernel(operation: str, backend: str) -> bool:
    """Whether a back end has a kernel for an operation of `ADAPTERS`; PyTorch does it else."""
    return operation in KERNELS.get(backend, ())


@cache
def kernel(operation: str, backend: str) -> Callable[..., Any]:
    """Return the function that runs an operation on a back end that has a kernel for it."""
    module, function = ADAPTERS[operation]
    package = "_triton" if backend == "triton" else "_compiled"  # triton is imported only where it is used
    return getattr(importlib.import_module(f".{package}.{module}", __package__), function)


def _lack(dtype: torch.dtype, acceleration: str | None, points_mass: object) -> str | None:
    """What the kernels for GPUs do not do, in words."""
    if dtype != torch.float32:
        return f"computes in float32, and an input is {dtype}"
    if points_mass is not None:
        return "does not solve for an exact mass between point clouds"
    if acceleration is not None:
        return f"has no acceleration, got {acceleration!r}"
    return None


def _best(device: torch.device, dtype: torch.dtype, acceleration: str | None, points_mass: object) -> str:
    """The back end of `resolve` without a wish."""
    if device.type == "cpu":
        if why_not("cpu") is None:
            return "cpu"
        _warn_slow()
    elif device.type == "cuda" and _lack(dtype, acceleration, points_mass) is None:
        for name in ("cuda", "triton"):
            if why_not(name) is None:
                return name
    return "reference"


def cuda_place(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and the address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def kind(device: torch.device) -> str:
    """Type of a device; the tests of the emulated CUDA kernels give another answer."""
    return device.type


def resolve(
    who: str,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    acceleration: str | None = None,
    points_mass: object = None,
) -> str:
    """Choose the back end for tensors on a device.

    Without a wish it is "cpu" on CPU tensors; on GPUs "cuda" where it can run, else "triton", and "reference" for what
    neither does. A back end that was asked for never falls back.

    Args:
        who: name of the calling function.
        backend: None or one of `BACKENDS`.
        device: where the tensors are.
        dtype: in which the operation computes.
        acceleration: of the iteration, None for plain ones.
        points_mass: exact mass between point clouds, or None.

    Returns:
        One of `BACKENDS`.

    Raises:
        ValueError: the name is unknown, or the back end cannot run on these tensors; the message says why.
    """
    if backend is None:
        return _best(device, dtype, acceleration, points_mass)
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend is {backend!r}, expected one of {BACKENDS} or None.")
    reason = why_not(backend)
    if reason is not None:
        raise ValueError(f"{who}: backend {backend!r} cannot run: {reason}.")
    wanted = "cuda" if backend == "triton" else backend  # PyTorch calls ROCm devices "cuda" too
    if backend != "reference" and kind(device) != wanted:
        raise ValueError(f"{who}: backend {backend!r} wants tensors on {wanted}, got {device}.")
    lack = _lack(dtype, acceleration, points_mass) if backend in ("cuda", "triton") else None
    if lack is not None:
        raise ValueError(f"{who}: backend {backend!r} {lack}. Use backend='reference'.")
    return backend
