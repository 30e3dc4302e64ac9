"""The benchmark of a reward call: its methods are the same reward, who is wrong has no figure, its page is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import reward as benchmark
from benchmarks.reward import METHODS, MODES, OFFICIAL, OURS, PLAIN, Sizes
from pisces.encoders.internvideo2.config import InternVideo2Config

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Sizes(width=32, mlp=32, heads=2, layers=2, video_width=16, words=5, side=3)
EAGER = [name for name in METHODS if "compile" not in name]


def test_all_methods_are_the_same_reward_but_the_one_without_transport() -> None:
    call = benchmark.make_call(3, 2, SMALL)
    found = benchmark.errors(call, EAGER)
    assert found.pop(PLAIN) == pytest.approx(1, rel=1e-3)
    assert all(error < benchmark.TOLERANCE for error in found.values()), found
    scores = {name: call.run("score", METHODS[name]()) for name in EAGER}
    torch.testing.assert_close(scores[OURS], scores[OFFICIAL], rtol=1e-4, atol=1e-5)
    assert (scores[OURS] - scores[PLAIN]).abs().max() > 1e-4


def test_the_words_of_each_video_are_refined_alone() -> None:
    """Ragged captions: what one video has does not change another's."""
    call = benchmark.make_call(2, 2, SMALL)
    call.text.lexical[1, 3:] = False
    refined = call.run("gradient", METHODS[OFFICIAL]())
    torch.testing.assert_close(
        refined, call.run("gradient", METHODS[OURS]()), rtol=1e-2, atol=1e-2 * refined.abs().max()
    )


def test_who_is_wrong_has_no_figure_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = benchmark.make_call
    monkeypatch.setattr(benchmark, "make_call", lambda frames, videos: make(frames, videos, SMALL))
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda size, mode, name: 1_000_000)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "METHODS", {name: METHODS[name] for name in EAGER})

    def towards_the_end(q: Tensor, k: Tensor, attention: Tensor, *where: Tensor) -> Tensor:
        return attention * torch.arange(attention.shape[-1]).add(1)

    for broken, sizes in ((False, ["2x1"]), (True, ["2x1", "3x2"])):
        if broken:
            monkeypatch.setitem(benchmark.METHODS, OFFICIAL, lambda: towards_the_end)
        monkeypatch.setattr(sys, "argv", ["reward", "--output", str(tmp_path), "--calls", *sizes])
        benchmark.main()
    assert capsys.readouterr().out.split("\n")[:2] == ["2x1 (frames x videos)", "3x2 (frames x videos)"]
    calls = json.loads((tmp_path / "results.json").read_text())["calls"]
    assert all(mode in calls["2x1"][OFFICIAL] for mode in MODES)
    assert not any(mode in calls["3x2"][OFFICIAL] for mode in MODES)
    assert calls["3x2"][OURS]["gradient"]["bytes"] == 1_000_000
    page = (tmp_path / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(f"| {OFFICIAL} |")]
    assert [row.count("wrong") for row in rows] == [1, 1, 1, 0]
    assert "3 frames, 2 videos" in page
    assert (tmp_path / "gradient.svg").stat().st_size > 1000
    assert "What all have in common" not in page
    tiny = InternVideo2Config(
        n_frames=2, size=28, vision_width=16, vision_layers=2, vision_heads=2, vision_mlp=16, pool_heads=2,
        pool_width=8, text_layers=1, fusion_layers=1, vocabulary_size=5,
    )  # fmt: skip
    monkeypatch.setattr(benchmark, "VISION", tiny)
    monkeypatch.setattr(sys, "argv", ["reward", "--output", str(tmp_path), "--vision"])
    benchmark.main()
    vision = json.loads((tmp_path / "results.json").read_text())["vision"]
    assert vision["frames"] == 2
    assert all(vision[mode] > 0 for mode in MODES)
    assert f"2 frames takes {vision['score']:.3g} s" in (tmp_path / "README.md").read_text()


def test_memory_is_what_the_hook_stores() -> None:
    """Probabilities of a layer are there with transport, not without."""
    small = Sizes(width=64, mlp=64, heads=16, layers=1, video_width=16, words=60, side=16)
    call = benchmark.make_call(16, 1, small)
    attention = 16 * 62 * (1 + 16 * 256) * 4
    plain, ours = (benchmark.peak(call, "gradient", name) for name in (PLAIN, OURS))
    assert ours - plain > attention
    assert benchmark.in_fresh_process("1x1", "score", PLAIN) > 257 * 1024 * 4  # the keys of a frame
