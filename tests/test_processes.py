"""Two processes that train together are one: the same weights, logs, validations and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_wan import build_tiny_wan
from together import run_together
from trained_together import ALGORITHMS, build

from pisces.pipelines import WanAdapter
from pisces.processes import Processes
from pisces.state import checkpoint_dir, latest_checkpoint


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


def state(output: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint."""
    path = latest_checkpoint(output / "checkpoints")
    assert path is not None
    return load_file(path / "weights.safetensors")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def together(wan_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of two processes, stopped after the third: before a rollout's second update."""
    root = tmp_path_factory.mktemp("two")
    run_together("trained_together.py", wan_dir, root, 3, 4)
    return root


def assert_same_end(wan_dir: Path, *outputs: Path) -> None:
    """Runs of other numbers of processes end with the same weights."""
    one, two = map(state, outputs)
    assert one.keys() == two.keys()
    base = WanAdapter.from_pretrained(wan_dir).transformer.state_dict()
    moved, apart = (torch.cat([(other[key] - one[key]).flatten() for key in one]) for other in (base, two))
    # Not 0: float32 gradients are added in another order.
    assert apart.norm() < 0.01 * moved.norm()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_are_one(wan_dir: Path, together: Path, tmp_path: Path, name: str) -> None:
    build(wan_dir, tmp_path, name, 4).fit()
    assert_same_end(wan_dir, tmp_path, together / name)
    for file in ("log.jsonl", "validation.jsonl"):
        mine, theirs = (
            [record for record in lines(run / file) if file == "log.jsonl" or record["step"] != 3]
            for run in (tmp_path, together / name)
        )
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"seconds", "memory_gb"}:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-7), key
    assert len(list((together / name / "validation/step-00000004").glob("*.mp4"))) == 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_process_goes_on_where_two_stopped(wan_dir: Path, together: Path, tmp_path: Path, name: str) -> None:
    build(wan_dir, tmp_path, name, 4).fit(resume=checkpoint_dir(together / name / "checkpoints", 3))
    assert_same_end(wan_dir, tmp_path, together / name)


def test_a_gradient_that_no_process_has_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW would take a zero for one: it decays weights and moments by it."""
    two, (mine, theirs, neither) = Processes(), (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    two.count = 2
    mine.grad = torch.ones(2)
    monkeypatch.setattr(two, "gather", lambda value: [value, [False, True, False]])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda gradient: gradient.add_(1))
    two.add_up_gradients([mine, theirs, neither])
    assert mine.grad.tolist() == [2, 2]
    assert theirs.grad is not None
    assert theirs.grad.tolist() == [1, 1]
    assert neither.grad is None


def test_alone_nothing_is_shared() -> None:
    alone = Processes()
    assert (alone.rank, alone.count, alone.is_main) == (0, 1, True)
    assert list(alone.share(3)) == [0, 1, 2]
    assert alone.gather("x") == ["x"]
    alone.wait()


def test_shares_are_all_of_the_work_once() -> None:
    shares = []
    for rank in range(3):
        one = Processes()
        one.rank, one.count = rank, 3
        shares += list(one.share(7))
    assert sorted(shares) == list(range(7))
