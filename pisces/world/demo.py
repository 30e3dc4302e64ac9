"""The main job in small: captioned videos in, a better text-to-video generator out, judged by pixels.

videos -> embeddings -> alignments (with their diagnostics) -> one training run an arm -> judge -> table and pictures
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pisces.data import VideoFolder
from pisces.encoders import VideoTextEncoder, load_encoder
from pisces.ot_map import Alignment, alignment_metrics, encoder_facts, fit_alignment
from pisces.ot_map.embed import embed_videos
from pisces.pipelines.wan import WanAdapter
from pisces.rewards import leverage
from pisces.world import checkpoint_path
from pisces.world.arms import (
    ARMS,
    BASE_NAME,
    FURTHER,
    NO_OT,
    PISCES,
    SUPERVISED,
    Arm,
    DemoPaths,
    arm_config,
    equal_compute_steps,
    judge_generator,
    run_arm,
    sample_videos,
)
from pisces.world.calibration import calibrate_judge
from pisces.world.dataset import write_dataset
from pisces.world.demo_report import write_report
from pisces.world.generator_recipe import BASE
from pisces.world.recipe import write_json

SHOWN = 6
LEVERAGE_SAMPLES = 64


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        arms: what is compared with the base.
        videos: captioned videos to fit and train on.
        check_videos: further ones for the diagnostics.
        steps: optimizer steps of every rewarded arm.
        judged: held-out captions.
        map_steps: outer steps of the Neural OT map.
    """

    arms: tuple[Arm, ...]
    videos: int = 512
    check_videos: int = 256
    steps: int = 40
    judged: int = 128
    map_steps: int = 150


FULL = DemoSize(arms=ARMS, judged=256)
QUICK = DemoSize(arms=(FURTHER, SUPERVISED, NO_OT, PISCES))
SMOKE = DemoSize(arms=(FURTHER, PISCES), videos=192, check_videos=96, steps=24, judged=96)


def run_demo(output: str | Path, *, full: bool = False, smoke: bool = False, seeds: int | None = None) -> Path:
    """Post-train the weak base generator in every way that is compared, and report what the judge says.

    A run that was killed goes on where it was: videos and finished arms are not made again.

    Args:
        output: the folder that receives everything; made if missing.
        full: every arm and three seeds, instead of four arms and one seed.
        smoke: two arms, fewer steps and captions: what CI runs.
        seeds: number of seeds, if not 1 (or 3 with `full`).

    Returns:
        The HTML page, `output/index.html`.

    Raises:
        ValueError: both `full` and `smoke`, no seed, or a folder that holds a demo of another size.
        FileNotFoundError: the packaged checkpoints are missing.
    """
    if full and smoke:
        raise ValueError("run_demo: got both full and smoke, expected at most one of them.")
    size = FULL if full else SMOKE if smoke else QUICK
    n_seeds = seeds if seeds is not None else (3 if full else 1)
    if n_seeds < 1:
        raise ValueError(f"run_demo: seeds is {n_seeds}, expected at least 1.")
    started = time.perf_counter()
    base = checkpoint_path("wan-base")
    encoder = load_encoder(checkpoint_path("encoder"))
    paths = DemoPaths(Path(output))
    _claim_folder(paths.root, size)
    _say(f"1/4 captioned videos: {size.videos} mp4 files in {paths.videos}")
    _write_videos(paths, size)
    _say("2/4 alignments of text and video embeddings, and what they do on videos that they were not fitted on")
    diagnostics = fit_alignments(encoder, base, paths, size)
    _say(f"3/4 post-training: {len(size.arms)} arms, {n_seeds} seed(s), {size.steps} steps each")
    arm_results, shown = _train_and_judge(paths, size, n_seeds, str(base))
    _say("4/4 table, curves, contact sheet and page")
    results = {
        "size": "full" if full else "smoke" if smoke else "quick",
        "seeds": n_seeds,
        "steps": size.steps,
        "judged_captions": size.judged,
        "seconds": round(time.perf_counter() - started, 1),
        "judge": calibrate_judge(seed=0),
        "arms": arm_results,
        "alignments": diagnostics["alignments"],
        "leverage": diagnostics["leverage"],
    }
    write_json(paths.root / "results.json", results)
    page = write_report(paths, size.arms, results, shown)
    _say(f"The post-trained generator, a diffusers pipeline: {paths.run(PISCES, 0) / 'final'}")
    return page


def _say(line: str) -> None:
    print(line, flush=True)


def _claim_folder(root: Path, size: DemoSize) -> None:
    """Refuse to go on from a demo of another size: its videos and runs would be taken for this one's."""
    mine = {key: value for key, value in asdict(size).items() if key != "arms"}
    claim = root / "demo.json"
    theirs = json.loads(claim.read_text()) if claim.is_file() else mine
    if theirs != mine:
        raise ValueError(
            f"run_demo: {root} holds a demo of {theirs}, expected {mine}. Choose another output folder, or remove it."
        )
    root.mkdir(parents=True, exist_ok=True)
    write_json(claim, mine)


def _write_videos(paths: DemoPaths, size: DemoSize) -> None:
    as_pretrained = {"damage": BASE.damage, "lies": BASE.lies}
    folders: tuple[tuple[Path, int, dict[str, float]], ...] = (
        (paths.videos, size.videos, {}),
        (paths.web_videos, size.videos, as_pretrained),
        (paths.check_videos, size.check_videos, {}),
    )
    for seed, (folder, n, faults) in enumerate(folders):
        if not (folder / "metadata.jsonl").is_file():  # written last
            # the check captions have no fillers, so that equal captions mean equal scenes
            fillers = 0.0 if folder == paths.check_videos else 0.5
            write_dataset(folder, n, seed=seed, split="train", fillers=fillers, **faults)


def fit_alignments(encoder: VideoTextEncoder, base: Path, paths: DemoPaths, size: DemoSize) -> dict[str, Any]:
    """Fit every kind of alignment on the demo's videos and measure it on the check videos.

    Returns:
        alignments: kind -> metrics of `alignment_metrics`; leverage: of `pisces.rewards.leverage`, on samples of the
        base, as real videos of their captions all match beyond doubt.
    """
    text, video = embed_videos(encoder, VideoFolder(paths.videos))
    check = VideoFolder(paths.check_videos)
    check_text, check_video = embed_videos(encoder, check)
    metrics, facts = {}, encoder_facts(encoder)
    for kind in dict.fromkeys(arm.alignment for arm in ARMS if arm.alignment is not None):
        alignment = fit_alignment(text, video, kind=kind, hidden=128, steps=size.map_steps, lr=1e-3)
        alignment.info |= facts
        alignment.save(paths.alignment(kind))
        metrics[kind] = _measured(alignment, check_text, check_video, check.captions)
    prompts = check.captions[:LEVERAGE_SAMPLES]
    samples = sample_videos(WanAdapter.from_pretrained(base), prompts)
    return {"alignments": metrics, "leverage": leverage(encoder, samples, prompts)}


def _measured(alignment: Alignment, text: Tensor, video: Tensor, captions: list[str]) -> dict[str, Any]:
    """The metrics, with the warnings that came with them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics: dict[str, Any] = dict(alignment_metrics(alignment, text, video, captions))
    metrics["warnings"] = [str(warning.message) for warning in caught]
    return metrics


def _train_and_judge(
    paths: DemoPaths, size: DemoSize, n_seeds: int, base: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """name -> {steps, scores: one dict a seed}, and name -> videos of the first seed for the pictures."""
    further_steps = equal_compute_steps(paths, size.steps)
    steps = {arm.name: further_steps if arm.alignment is None else size.steps for arm in size.arms}
    jobs = {
        (arm.name, seed): arm_config(arm, seed, paths, steps=steps[arm.name]).to_dict()
        for seed in range(n_seeds)
        for arm in size.arms
    }
    done: dict[tuple[str, int], dict[str, Any]] = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    with _stopping_pool(workers) as pool:
        futures = {key: pool.submit(_run_arm, config, size.judged, SHOWN) for key, config in jobs.items()}
        of_base = judge_generator(base, size.judged, SHOWN)
        with tqdm(total=sum(config["steps"] for config in jobs.values()), unit="step", disable=None) as bar:
            while len(done) < len(futures):
                time.sleep(0.5)
                for key, future in futures.items():
                    if future.done() and key not in done:
                        done[key] = future.result()
                        bar.write(f"    {key[0]}, seed {key[1]}: judged total {done[key]['scores']['total']:.3f}")
                bar.update(_logged_steps(paths) - bar.n)
    results: dict[str, Any] = {BASE_NAME: {"steps": 0, "scores": [of_base["scores"]]}}
    shown = {BASE_NAME: of_base["shown"]}
    for arm in size.arms:
        of_seeds = [done[arm.name, seed] for seed in range(n_seeds)]
        results[arm.name] = {"steps": steps[arm.name], "scores": [result["scores"] for result in of_seeds]}
        shown[arm.name] = of_seeds[0]["shown"]
    return results, shown


@contextmanager
def _stopping_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that an error or Ctrl-C ends at once; a plain one would first work off every job that is waiting."""
    others = set(active_children())
    # spawn: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(active_children()) - others:
            worker.terminate()  # SIGTERM: a training run finishes its step and writes a checkpoint
        raise
    finally:
        pool.shutdown(wait=True)


def _end_with_parent() -> None:
    """End this worker when the demo's process is gone, killed perhaps: nobody else would."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_arm(config: dict[str, Any], n_judged: int, n_shown: int) -> dict[str, Any]:
    """`run_arm` in a worker, which a signal ends: the pool would give it the next job."""
    try:
        return run_arm(config, n_judged, n_shown)
    except (KeyboardInterrupt, SystemExit):
        os._exit(1)


def _logged_steps(paths: DemoPaths) -> int:
    """Steps that all runs have logged so far."""
    return sum(log.read_bytes().count(b"\n") for log in paths.root.glob("runs/*/log.jsonl"))


def gain(results: dict[str, Any], over: str, arm: str = PISCES.name, score: str = "total") -> float:
    """Mean over seeds of an arm's score minus that of another."""
    mean = {
        name: math.fsum(scores[score] for scores in results["arms"][name]["scores"])
        / len(results["arms"][name]["scores"])
        for name in (arm, over)
    }
    return mean[arm] - mean[over]


def load_results(output: str | Path) -> dict[str, Any]:
    """What `run_demo` found, from `results.json`."""
    return json.loads((Path(output) / "results.json").read_text())
