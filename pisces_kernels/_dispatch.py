"""Which back end runs an operation, and why the others do not."""

from __future__ import annotations

import importlib
import warnings
from functools import lru_cache
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "cuda")
# What the CUDA kernels do; the rest is PyTorch's work on the same device. The CPU kernels do everything.
ON_CUDA = frozenset(
    (
        "sinkhorn",
        "implicit",
        "plan",
        "plan_sums",
        "plan_backward",
        "token_cost",
        "token_cost_gradient",
        "transport_attention",
        "fusion_gradient",
        "points_solve",
        "points_self",
        "points_transform",
        "points_product",
    )
)


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
    return None


@torch.compiler.assume_constant_result  # what was built does not change, and Dynamo cannot trace an import
def why_not(backend: str) -> str | None:
    """Return None when the back end can run here, else the reason in words.

    Args:
        backend: "reference", "cpu" or "cuda".

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
    raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS} or None.")


@lru_cache(maxsize=1)
def _warn_slow() -> None:
    warnings.warn(
        f"pisces_kernels: the compiled CPU back end is missing ({why_not('cpu')}); using the slow reference.",
        RuntimeWarning,
        stacklevel=4,
    )


def compiled(operation: str, backend: str) -> bool:
    """Whether a back end has a kernel for an operation: a name of csrc/api.h without cpu_ or cuda_."""
    return backend == "cpu" or (backend == "cuda" and operation in ON_CUDA)


def refuse_on_cuda(
    who: str, dtype: torch.dtype, *, acceleration: str | None = None, points_mass: object = None
) -> None:
    """Raise ValueError for what the CUDA kernels do not do.

    Args:
        who: name of the calling function.
        dtype: in which the operation computes.
        acceleration: None is there.
        points_mass: exact mass between point clouds; None is there.
    """
    lacks = None
    if dtype != torch.float32:
        lacks = f"computes in float32, and an input is {dtype}"
    elif points_mass is not None:
        lacks = "does not solve for an exact mass"
    elif acceleration is not None:
        lacks = f"has no acceleration, got {acceleration!r}"
    if lacks is not None:
        raise ValueError(f"{who}: backend 'cuda' {lacks}. Use backend='reference'.")


def cuda_place(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and the address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def kind(device: torch.device) -> str:
    """Type of a device; the tests of the emulated CUDA kernels give another answer."""
    return device.type


def resolve(who: str, backend: str | None, device: torch.device) -> str:
    """Choose the back end for tensors on a device.

    Without a wish it is "cpu" on CPU tensors and "reference" elsewhere: the CUDA kernels are compiled but have not been
    executed on a GPU yet, so they run only when asked for by name. A back end that was asked for never falls back.

    Args:
        who: name of the calling function.
        backend: None or one of `BACKENDS`.
        device: where the tensors are.

    Returns:
        One of `BACKENDS`.

    Raises:
        ValueError: the name is unknown, or the back end cannot run on these tensors; the message says why.
    """
    if backend is None:
        if device.type != "cpu":
            return "reference"
        if why_not("cpu") is not None:
            _warn_slow()
            return "reference"
        return "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend is {backend!r}, expected one of {BACKENDS} or None.")
    reason = why_not(backend)
    if reason is not None:
        raise ValueError(f"{who}: backend {backend!r} cannot run: {reason}.")
    if backend != "reference" and kind(device) != backend:
        raise ValueError(f"{who}: backend {backend!r} wants tensors on {backend}, got {device}.")
    return backend
