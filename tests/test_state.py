"""Laws of checkpoints: whole or not there, checked when read, and random states that come back."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pisces import state
from pisces.state import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
    step_generator,
)


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"weights": {"a": torch.full((300, 7), value), "b": torch.tensor(value)}, "ema": {}}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, tensors(1.5), {"note": [1, "x"]})
    read = load_checkpoint(path)
    assert (read.step, read.meta["note"], read.tensors["ema"]) == (7, [1, "x"], {})
    for name, value in tensors(1.5)["weights"].items():
        assert torch.equal(read.tensors["weights"][name], value)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_what_is_written_stays_beside_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 5, 6, 7):
        assert save_checkpoint(tmp_path, step, tensors(step), {}, keep=2).is_dir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 7, 10, 20]


@pytest.mark.parametrize("at", ["second file", "state file", "rename"])
def test_a_crash_in_a_save_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1.0), {})

    class Killed(BaseException):
        """Like a kill: nothing may catch it."""

    def killed(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "second file":
            calls: list[str] = []
            save = state.save_file

            def once(group: dict[str, Tensor], file: str) -> None:
                if calls:
                    Path(file).write_bytes(b"half")
                    raise Killed
                calls.append(file)
                save(group, file)

            patch.setattr(state, "save_file", once)
        elif at == "state file":
            patch.setattr(state, "write_text", killed)
        else:
            patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, tensors(2.0), {})
    latest = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "step-00000001"
    assert float(load_checkpoint(latest).tensors["weights"]["b"]) == 1.0
    # The next save clears the rest away.
    save_checkpoint(tmp_path, 3, tensors(3.0), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_kill_9_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    random_moments = random.Random(time.time_ns())
    for _ in range(10):
        child = os.fork()
        if child == 0:  # the child saves until it is killed
            torch.set_num_threads(1)  # the parent's thread pool is not there after a fork
            step = latest_step(tmp_path)
            while True:
                step += 1
                save_checkpoint(tmp_path, step, {"w": {"x": torch.full((200_000,), float(step))}}, {}, keep=2)
        deadline, before = time.monotonic() + 60, latest_step(tmp_path)
        while latest_step(tmp_path) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random_moments.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for step, path in list_checkpoints(tmp_path):
            assert torch.equal(load_checkpoint(path).tensors["w"]["x"], torch.full((200_000,), float(step)))
    assert latest_step(tmp_path) >= 10


def latest_step(root: Path) -> int:
    found = list_checkpoints(root)
    return found[-1][0] if found else 0


@pytest.mark.parametrize("limit", [0, 4096], ids=["first file", "second file"])
def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path, limit: int) -> None:
    """A process whose files may not grow: to the writer it is what a full disk is, with another number."""
    save_checkpoint(tmp_path, 1, tensors(1.0), {})
    code = (
        "import resource, sys, torch\n"
        "from pisces.state import save_checkpoint\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"  # its signal is ignored by Python already
        "tensors = {'a': {'x': torch.zeros(10)}, 'b': {'x': torch.zeros(9000)}}\n"
        "try:\n"
        "    save_checkpoint(sys.argv[1], 2, tensors, {})\n"
        "except OSError as error:\n"
        "    print(error.errno, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(limit)], capture_output=True, text=True)
    number, _, message = done.stdout.partition(" ")
    assert number == str(errno.EFBIG), done.stderr
    for part in (str(tmp_path / "step-00000002"), "File too large", "older checkpoints are intact", "start again"):
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert float(load_checkpoint(tmp_path / "step-00000001").tensors["weights"]["b"]) == 1.0


def test_damage_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors(1.0), {})
    file = path / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is corrupt.*Delete .*step-00000001"):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing"):
        load_checkpoint(path)
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json is unreadable"):
        load_checkpoint(path)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1, "sha256": {}}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_random_states_come_back() -> None:
    def numbers() -> tuple[float, ...]:
        rng = np.random.mtrand._rand  # numpy's global generator
        return float(torch.rand(())), random.random(), random.gauss(0, 1), float(rng.standard_normal())

    numbers()  # leaves half a Gaussian pair behind in Python and numpy
    saved, meta = random_states()
    meta = json.loads(json.dumps(meta))
    first = numbers()
    assert numbers() != first
    set_random_states(saved, meta)
    assert numbers() == first


def test_step_generators_differ_and_repeat() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        return tuple(torch.randn(3, generator=step_generator(*key)).tolist())

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(s, n, p) for s in range(5) for n in range(10) for p in range(3)]
    assert len({draw(*key) for key in keys}) == len(keys)
