"""The demo's parts: equal compute, what is judged, what is written. The demo itself runs in .ci/run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pisces.config import TrainConfig
from pisces.world.arms import (
    ARMS,
    FURTHER,
    NO_OT,
    PISCES,
    DemoPaths,
    arm_config,
    equal_compute_steps,
    judged_scenes,
    shown_captions,
)
from pisces.world.calibration import calibrate_judge
from pisces.world.dataset import write_dataset
from pisces.world.demo import SMOKE, DemoSize, _stopping_pool, gain, load_results, run_demo
from pisces.world.demo_report import write_report
from pisces.world.recipe import write_json
from pisces.world.scene import captions, is_held_out


def results_of(totals: dict[str, list[float]]) -> dict:
    """What results.json would hold for these judged totals."""
    arms = {
        name: {"steps": 40, "scores": [{"semantic": t, "quality": t, "total": t} for t in of_seeds]}
        for name, of_seeds in totals.items()
    }
    metrics = dict.fromkeys(
        ("gap", "cosine", "r_at_1", "rho", "sinkhorn_divergence", "mutual_knn", "spearman"), 0.5
    ) | {"warnings": []}
    return {
        "seeds": 2,
        "steps": 40,
        "judged_captions": 16,
        "arms": arms,
        "judge": calibrate_judge(0, n=4),
        "alignments": {"none": metrics},
        "leverage": {"logit_std": 1.0, "partial_ot": 0.1, "uniform": 0.2},
    }


def test_arms_differ_only_in_what_is_compared(tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path)
    configs = [arm_config(arm, 0, paths, steps=40).to_dict() for arm in ARMS if arm.alignment is not None]
    for config in configs:
        config["output"].pop("dir")
        config["rewards"].pop("ot_map")
        config["rewards"].pop("transport")
    assert all(config == configs[0] for config in configs)
    assert len({arm.name for arm in ARMS}) == len(ARMS) == 8
    without = arm_config(NO_OT, 0, paths, steps=40).rewards
    assert without.transport is None
    assert arm_config(PISCES, 0, paths, steps=40).rewards.transport is not None
    assert TrainConfig.from_dict(arm_config(PISCES, 1, paths, steps=40).to_dict()).seed == 1


def test_judged_captions_are_held_out() -> None:
    scenes = judged_scenes(64)
    assert is_held_out(scenes.color[:, 0], scenes.shape[:, 0], scenes.direction[:, 0]).all()
    assert (scenes.count == 1).all()
    shown = shown_captions(64, 6)
    texts = captions(scenes)
    assert len(shown) == 6
    assert all(texts[i] == caption for caption, i in shown.items())


def test_further_pretraining_gets_the_same_flops(tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path)
    for folder in (paths.videos, paths.web_videos):
        write_dataset(folder, 8, split="train")
    from pisces.data import VideoFolder
    from pisces.encoders import load_encoder
    from pisces.ot_map import fit_alignment
    from pisces.ot_map.embed import embed_videos
    from pisces.world import checkpoint_path

    text, video = embed_videos(load_encoder(checkpoint_path("encoder")), VideoFolder(paths.videos), progress=False)
    fit_alignment(text, video, kind="center_ot", hidden=16, steps=1, batch_size=4, progress=False).save(
        paths.alignment("center_ot")
    )
    one, ten = equal_compute_steps(paths, 10), equal_compute_steps(paths, 100)
    # a rewarded step samples, decodes, encodes and goes all the way back; a supervised one is one pass
    assert one > 40
    assert abs(ten - 10 * one) <= 10


def test_gain_is_a_difference_of_means() -> None:
    results = results_of({"base": [0.5], "pisces": [0.8, 0.9], "further": [0.6, 0.7]})
    assert gain(results, over="base") == pytest.approx(0.35)
    assert gain(results, over="further") == pytest.approx(0.2)
    assert gain(results, over="base", arm="further") == pytest.approx(0.15)


def test_report_shows_what_was_found(tmp_path: Path, seed: int) -> None:
    results = results_of({"base": [0.5], "further": [0.6, 0.7], "no-ot": [0.7, 0.7], "pisces": [0.8, 0.9]})
    paths = DemoPaths(tmp_path)
    for arm in (NO_OT, PISCES):
        log = paths.run(arm, 0) / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text('{"step": 1, "reward/quality": 0.1, "reward/semantic": 0.2}\n')
    shown = {name: torch.rand(3, 9, 3, 32, 32) for name in ("base", "further", "no-ot", "pisces")}
    page = write_report(paths, (FURTHER, NO_OT, PISCES), results, shown).read_text()
    table = (tmp_path / "table.md").read_text()
    for text in ("0.850 ± 0.071", "0.650 ± 0.071", "0.500", "further pre-training", "both OT rewards"):
        assert text in page
        assert text in table
    assert "http://" not in page
    assert "https://" not in page
    assert {path.name for path in tmp_path.glob("*.*")} == {
        "table.md",
        "curves.png",
        "sheet.png",
        "sheet.gif",
        "index.html",
    }


def test_results_round_trip(tmp_path: Path) -> None:
    results = results_of({"base": [0.5], "pisces": [0.8]})
    write_json(tmp_path / "results.json", results)
    assert load_results(tmp_path) == results


def test_a_folder_of_another_size_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", {"videos": 3})
    with pytest.raises(ValueError, match="holds a demo of"):
        run_demo(tmp_path, smoke=True)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both full and smoke"):
        run_demo(tmp_path, full=True, smoke=True)
    with pytest.raises(ValueError, match="seeds is 0"):
        run_demo(tmp_path, seeds=0)
    assert isinstance(SMOKE, DemoSize)


def test_the_network_guard_of_child_processes_bites(offline_environment: dict[str, str]) -> None:
    code = "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], env=offline_environment, capture_output=True, text=True)
    assert child.returncode != 0
    assert "network access to ('127.0.0.1', 9) during an offline run" in child.stderr


def test_an_error_ends_the_pool_without_working_off_its_jobs() -> None:
    def interrupted() -> None:
        with _stopping_pool(1) as pool:
            for _ in range(4):
                pool.submit(time.sleep, 30)
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - started < 25


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, time\n"
        "from pisces.world.demo import _stopping_pool\n"
        "if __name__ == '__main__':\n"
        "    with _stopping_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    worker = int(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=120, check=False).stdout)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} outlived its parent")
