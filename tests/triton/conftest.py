"""The Triton kernels' tests run twice: in Triton's interpreter, in a process of their own, and on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/triton     # the interpreter reads the variable when triton is imported
    python -m pytest tests/triton                        # on a device; without one there is nothing to collect

The first is slow, and the gate may draw a third of it: see tests/verified.py.

In the interpreter every tensor that a kernel reads lies between NaN (masks: between True), and every result starts as
NaN between canaries: what is read or written outside shows. The interpreter itself would not say so.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from verified import only_a_part, passed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m gpu` selects these tests where they run on a device."""
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if INTERPRETED and only_a_part("triton"):
        drawn = set(random.SystemRandom().sample(items, len(items) // 3))
        config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
        items[:] = [item for item in items if item in drawn]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """All tests have passed in the interpreter: noted, so that the gate need not run all of them again."""
    config = session.config
    whole = config.args == ["tests/triton"] and not config.option.keyword and not config.option.markexpr
    worker = hasattr(config, "workerinput")
    if INTERPRETED and whole and not worker and exitstatus == 0 and not only_a_part("triton"):
        passed("triton")


BORDER = 128  # entries before and after a tensor; a multiple of 16 bytes keeps it aligned
CANARY = {torch.float32: -1.7e38, torch.float64: -1.7e308, torch.int32: -123456789, torch.uint8: 211}


class Borders:
    """Copies of inputs and fresh results with borders that say when something was there."""

    def __init__(self) -> None:
        self.rooms: list[Tensor] = []

    def read(self, tensor: Tensor | None) -> Tensor | None:
        """A contiguous copy between NaN."""
        if tensor is None:
            return None
        tensor = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        poison = 1 if tensor.dtype == torch.uint8 else 2**30 if tensor.dtype == torch.int32 else torch.nan
        room = torch.full((tensor.numel() + 2 * BORDER,), poison, dtype=tensor.dtype)
        inside = room[BORDER : BORDER + tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Poisoned memory between canaries."""
        size = torch.Size(shape).numel()
        room = torch.full((size + 2 * BORDER,), CANARY.get(dtype, 0), dtype=dtype)
        inside = room[BORDER : BORDER + size]
        if dtype.is_floating_point:
            inside.fill_(torch.nan)
        self.rooms.append(room)
        return inside.view(tuple(shape))

    def check(self) -> None:
        """Fail if a border was written to."""
        for room in self.rooms:
            canary = room.new_tensor(CANARY.get(room.dtype, 0))
            for border in (room[:BORDER], room[-BORDER:]):
                assert torch.equal(border, canary.expand_as(border)), "a kernel wrote outside of its result"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[str]:
    """Where the tensors are: "cpu" with the interpreter in the place of the device, or "cuda"."""
    if not INTERPRETED:
        yield "cuda"
        return
    from interpreter import multiply_bfloat16_as_numbers, patch_triton_once

    from pisces_kernels import _dispatch
    from pisces_kernels._triton import _launch

    patch_triton_once(monkeypatch)
    multiply_bfloat16_as_numbers(monkeypatch)
    borders = Borders()
    monkeypatch.setattr(_dispatch, "why_not", lambda backend: None)
    monkeypatch.setattr(_dispatch, "kind", lambda device: "cuda")
    monkeypatch.setattr(_launch, "read", borders.read)
    monkeypatch.setattr(_launch, "empty", borders.empty)
    yield "cpu"
    borders.check()


@pytest.fixture(params=["alone", "team"])
def team(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs that solve a problem: one, or several that wait for each other."""
    if request.param == "team" and INTERPRETED:
        from interpreter import run_programs_together

        from pisces_kernels._triton import _launch

        monkeypatch.setattr(_launch, "multiprocessors", lambda device: 8)
        run_programs_together(monkeypatch)
    return str(request.param)


@pytest.fixture
def small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 columns in the interpreter, so that small problems have several."""
    if INTERPRETED:
        from pisces_kernels._triton import _launch

        monkeypatch.setattr(_launch, "lanes", lambda: 4)
