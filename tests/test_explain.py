"""Laws of `explain`: its plans are those of the formulas, words only, alone as in company; and of the page it makes."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, run
from heat_tiles import tiles
from tiny_encoder import some_videos, tiny_encoder
from tiny_internvideo2 import small_model, some_frames, some_prompts
from tiny_transformers import save_tiny
from torch import Tensor

from pisces.commands.leverage import reading
from pisces.data import read_video, write_metadata, write_video
from pisces.encoders import BlipEncoder, load_encoder
from pisces.heatmaps import HOT
from pisces.rewards import SemanticReward, Transport, explain, leverage
from pisces.world import checkpoint_path, scene
from pisces_kernels import reference

CLOSE = Transport(max_iters=3000, tol=1e-7)  # a batch may iterate longer than one of its samples would alone


pytestmark = pytest.mark.usefixtures("plain_terminal")


def by_hand(text: Tensor, video: Tensor, attention: Tensor, t: Tensor, s: Tensor, transport: Transport) -> Tensor:
    """The plan [W, M] of one head from words [W, D], video tokens [M, D] and attention [W, M], in plain torch."""
    rows, cols = attention.shape
    cost = reference.token_cost(
        text[None], video[None], attention[None, None], t[None], s[None], gamma=transport.gamma, eta=transport.eta
    )[0, 0]
    a, b = torch.full((1, rows), 1 / rows).to(cost), torch.full((1, cols), 1 / cols).to(cost)
    epsilon = torch.tensor([transport.epsilon]).to(cost)
    mass = None if transport.mass is None else torch.tensor([transport.mass]).to(cost)
    f, g, _, _ = reference.sinkhorn(
        cost[None], a, b, epsilon, tau_a=transport.tau, tau_b=transport.tau, mass=mass, max_iters=3000, tol=1e-9
    )
    return ((f[0, :, None] + g[0, None] - cost) / transport.epsilon).exp() / (rows * cols)


# The record


@pytest.mark.parametrize("mass", [None, 0.7])
def test_plans_are_those_of_the_formulas_head_by_head(mass: float | None, seed: int) -> None:
    encoder = tiny_encoder().double()
    frames, prompts = some_videos(3, seed)
    frames = frames.double()
    transport = Transport(mass=mass, max_iters=3000, tol=1e-9)
    found = explain(encoder, frames, prompts, transport, per_head=True)
    assert found.plan is not None
    mean = explain(encoder, frames, prompts, transport)
    assert mean.plan is not None
    torch.testing.assert_close(mean.plan, found.plan.mean(2, keepdim=True))
    torch.testing.assert_close(mean.attention, found.attention.mean(2, keepdim=True))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(query: Tensor, key: Tensor, attention: Tensor, t: Tensor, s: Tensor, lexical: Tensor) -> Tensor:
        refined = attention.clone()
        layer = len(seen)
        for i in range(3):
            for h in range(attention.shape[1]):
                words = lexical[i].nonzero()[:, 0]
                plan = by_hand(query[i, words], key[i], attention[i, h, words], t.double(), s.double(), transport)
                n = len(words)
                torch.testing.assert_close(found.plan[i, layer, h, :n], plan, rtol=1e-5, atol=1e-9)
                assert (found.plan[i, layer, h, n:] == 0).all()
                torch.testing.assert_close(found.attention[i, layer, h, :n], attention[i, h, words])
                prior = plan / plan.sum(-1, keepdim=True)
                fused = ((attention[i, h, words] + 1e-6).log() + (prior + 1e-6).log()).softmax(-1)
                torch.testing.assert_close(found.refined[i, layer, h, :n], fused, rtol=1e-5, atol=1e-9)
                refined[i, h, words] = fused
        seen.append((query, key, refined))
        return refined

    with torch.no_grad():
        logit = encoder.match(encoder.encode_text(prompts), encoder.encode_video(frames), refine=watch)
    assert len(seen) == found.plan.shape[1] == encoder.config.fusion_layers
    torch.testing.assert_close(found.refined_match, logit.sigmoid())
    if mass is not None:
        torch.testing.assert_close(found.plan.sum((-1, -2)), torch.full(found.plan.shape[:3], mass).double())
    other = explain(encoder, frames, prompts, Transport(mass=mass, epsilon=0.1), per_head=True)
    assert other.plan is not None
    assert (other.plan - found.plan).abs().max() > 1e-4  # the settings matter


def test_explaining_is_the_reward_and_leaves_no_gradient(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(3, seed)
    found = explain(encoder, frames.requires_grad_(), prompts, Transport())
    for transport, value in ((None, found.match), (Transport(), found.refined_match)):
        reward = SemanticReward(encoder, transport=transport, log=False)
        torch.testing.assert_close(reward(frames, prompts), value)
    assert (found.match - found.refined_match).abs().max() > 0
    assert found.plan is not None
    assert not any(part.requires_grad for part in (found.plan, found.attention, found.refined, found.match))
    vanilla = explain(encoder, frames, prompts)
    assert vanilla.plan is None
    assert torch.equal(vanilla.refined, vanilla.attention)
    torch.testing.assert_close(vanilla.refined_match, vanilla.match)
    torch.testing.assert_close(vanilla.attention[:, 0], found.attention[:, 0])
    assert (vanilla.attention[:, 1] - found.attention[:, 1]).abs().max() > 1e-6  # layer 2 feels the fusion in layer 1


def test_a_ragged_batch_is_its_samples_alone(seed: int) -> None:
    encoder = tiny_encoder().double()
    frames, prompts = some_videos(3, seed)
    prompts[1] = "please watch this very smooth beautiful cinematic clip of " + prompts[1]
    together = explain(encoder, frames.double(), prompts, CLOSE, per_head=True)
    assert len({len(words) for words in together.words}) > 1
    for i in range(3):
        alone = explain(encoder, frames[i : i + 1].double(), prompts[i : i + 1], CLOSE, per_head=True)
        n = len(alone.words[0])
        assert alone.words[0] == together.words[i]
        assert alone.attention.shape[3] == n
        for name in ("plan", "attention", "refined"):
            one, batch = getattr(alone, name)[0], getattr(together, name)[i]
            torch.testing.assert_close(batch[:, :, :n], one, rtol=1e-3, atol=1e-6)
            assert (batch[:, :, n:] == 0).all()
        torch.testing.assert_close(alone.refined_match[0], together.refined_match[i], rtol=1e-3, atol=1e-4)


def test_words_carry_everything_and_the_mass_is_theirs(seed: int) -> None:
    frames, prompts = some_videos(3, seed)
    found = explain(tiny_encoder(), frames, prompts, Transport(mass=0.6, max_iters=2000), per_head=True)
    assert found.plan is not None
    real = torch.arange(found.plan.shape[3]) < torch.tensor([[len(words)] for words in found.words])  # [B, W]
    rows = real[:, None, None].expand(found.plan.shape[:4])
    assert (found.plan.sum(-1)[~rows] == 0).all()
    assert (found.plan.sum(-1)[rows] > 0).all()
    torch.testing.assert_close(found.attention.sum(-1), rows.float())
    torch.testing.assert_close(found.refined.sum(-1), rows.float())
    share = 1 / real.sum(1).float()
    assert (found.plan.sum(-1) <= share[:, None, None, None] * 1.01).all()


def test_each_form_keeps_the_marginals_that_it_promises(seed: int) -> None:
    encoder = tiny_encoder().double()
    frames, prompts = some_videos(2, seed)
    plans, share = {}, {}
    for name, transport in (
        ("balanced", Transport(tau=1.0, max_iters=5000, tol=1e-9)),
        ("mass", Transport(mass=0.8, max_iters=5000, tol=1e-9)),
        ("tau", Transport(max_iters=5000, tol=1e-9)),
    ):
        found = explain(encoder, frames.double(), prompts, transport, per_head=True)
        assert found.plan is not None
        n = len(found.words[0])
        plans[name], share[name] = found.plan[0, ..., :n, :], 1 / n
    rows, cols = {k: p.sum(-1) for k, p in plans.items()}, {k: p.sum(-2) for k, p in plans.items()}
    torch.testing.assert_close(
        rows["balanced"], torch.full_like(rows["balanced"], share["balanced"]), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(cols["balanced"], torch.full_like(cols["balanced"], 1 / 64), rtol=1e-4, atol=0)
    assert (rows["mass"] <= share["mass"] * (1 + 1e-6)).all()
    assert (cols["mass"] <= (1 + 1e-6) / 64).all()
    torch.testing.assert_close(rows["mass"].sum(-1), torch.full_like(rows["mass"].sum(-1), 0.8))
    assert (rows["tau"].sum(-1) - 1).abs().max() > 1e-2  # neither marginal nor mass is kept


def test_a_grid_has_every_token_at_its_place(seed: int) -> None:
    frames, prompts = some_videos(2, seed)
    found = explain(tiny_encoder(), frames, prompts)
    grid = found.on_grid(found.attention)
    assert grid.shape[-3:] == (4, 4, 4)
    for j in torch.randperm(64)[:9].tolist():
        t = int(found.frame_index[j])
        y, x = (int((3 * place).round()) for place in found.positions[j])
        assert torch.equal(grid[..., t, y, x], found.attention[..., j])


@pytest.mark.parametrize("kind", ["internvideo2", "blip"])
def test_summary_tokens_stay_out_of_the_grid_and_words_are_named(kind: str, seed: int, tmp_path: Path) -> None:
    if kind == "blip":
        save_tiny("blip", tmp_path)
        encoder, n = BlipEncoder.from_pretrained(tmp_path, n_frames=3), 3
        frames, prompts, words = torch.rand(2, 3, 3, 16, 16), ["a red dog", "zebra"], [["a", "red", "dog"], ["<unk>"]]
    else:
        encoder, n = small_model(), 3  # type: ignore[assignment]
        frames, prompts, words = some_frames(2), ["A dog running!", "zebra"], []
        words = [["a", "dog", "run", "##ning", "[UNK]"], ["[UNK]"]]
    found = explain(encoder, frames, prompts, Transport(max_iters=2000, tol=1e-6), per_head=True)
    assert found.words == words
    assert [len(row) for row in words] == encoder.encode_text(prompts).lexical.sum(1).tolist()
    assert found.plan is not None
    assert found.plan.shape[-2:] == (len(words[0]), len(found.frame_index))
    torch.testing.assert_close(found.attention[0].sum(-1), torch.ones_like(found.attention[0, ..., 0]))
    grid = found.on_grid(found.plan)
    assert grid.shape[-3:] == (n, 2, 2)
    summary = found.plan[..., found.frame_index < 0].sum(-1)
    assert (summary[0] > 0).all()
    torch.testing.assert_close(grid.sum((-1, -2, -3)) + summary, found.plan.sum(-1))
    alone = explain(encoder, frames[1:], prompts[1:], Transport(max_iters=2000, tol=1e-6), per_head=True)
    assert alone.plan is not None
    torch.testing.assert_close(alone.plan[0], found.plan[1, :, :, :1], rtol=1e-2, atol=1e-4)


def test_frames_that_are_matched_one_by_one_stand_side_by_side(seed: int, tmp_path: Path) -> None:
    save_tiny("blip", tmp_path)
    frames, prompt = torch.rand(1, 3, 3, 16, 16), ["a red dog runs"]
    whole = explain(BlipEncoder.from_pretrained(tmp_path, n_frames=3), frames, prompt, Transport(), per_head=True)
    single = BlipEncoder.from_pretrained(tmp_path, n_frames=1)
    for name in ("plan", "attention", "refined"):
        parts = [
            getattr(explain(single, frames[:, t : t + 1], prompt, Transport(), per_head=True), name) for t in range(3)
        ]
        torch.testing.assert_close(getattr(whole, name), torch.cat(parts, -1) / 3, rtol=1e-3, atol=1e-5)


def test_encoders_name_the_tokens_that_they_read() -> None:
    with pytest.warns(UserWarning, match="only 3 are read"):
        assert tiny_encoder(max_tokens=5).token_texts(["A red bicycle, moving left"]) == [["a", "red", "bicycle"]]
    model = small_model(max_tokens=6)
    assert model.token_texts(["dogs over [SEP]"]) == [["dog", "##s", "over", "["]]
    prompts = some_prompts(4)
    with pytest.warns(UserWarning, match="word pieces"):
        counts = model.encode_text(prompts).lexical.sum(1).tolist()
    assert [len(row) for row in model.token_texts(prompts)] == counts


def test_what_cannot_be_explained_is_named(seed: int) -> None:
    frames, prompts = some_videos(2, seed)
    encoder = tiny_encoder()
    encoder.has_match_head = False  # type: ignore[assignment]
    for function in (explain, leverage):
        with pytest.raises(ValueError, match="without a match head"):
            function(encoder, frames, prompts)
    nameless = tiny_encoder()
    nameless.token_texts = None  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError, match="without token_texts"):
        explain(nameless, frames, prompts)
    with pytest.raises(ValueError, match="1 prompts for 2 videos"):
        explain(tiny_encoder(), frames, prompts[:1])
    with pytest.raises(ValueError, match="batch_size is 0"):
        leverage(tiny_encoder(), frames, prompts, batch_size=0)


def test_leverage_is_the_same_in_parts(seed: int) -> None:
    frames, prompts = some_videos(5, seed)
    whole, parts = (leverage(tiny_encoder(), frames, prompts, CLOSE, batch_size=n) for n in (5, 2))
    assert parts == pytest.approx(whole, rel=1e-2, abs=1e-3)


# The commands


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, str]:
    """A video of the small world and its caption."""
    generator = torch.Generator().manual_seed(11)
    scenes = scene.sample_scenes(1, generator)
    return write_video(tmp_path / "clip.mp4", scene.render(scenes, generator)[0]), scene.captions(scenes)[0]


def test_the_page_holds_itself_and_names_every_word(clip: tuple[Path, str], tmp_path: Path) -> None:
    video, caption = clip
    caption += " near a <bicycle>"
    result = run("explain", video, caption, "--output", tmp_path / "out" / "why.html")
    assert result.exit_code == 0, result.output
    assert "why.html" in result.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["why.html", "why.png"]
    page = (tmp_path / "out" / "why.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<bicycle>" not in page
    assert html.escape(caption) in page
    for word in re.findall(r"\w+", caption):
        assert f"<td>{word}</td>" in page
    for part in ("attention as it is", "refined by partial transport", "layer 2 of 2, mean of the heads", "overlap"):
        assert part in page
    assert "2 of 8 words are unknown" in page  # near, bicycle

    vanilla = tmp_path / "plain.html"
    assert (
        run("explain", video, caption, "--output", vanilla, "--vanilla", "--layer", "1", "--head", "4").exit_code == 0
    )
    page = vanilla.read_text()
    assert "layer 1 of 2, head 4" in page
    assert "refined by partial transport" not in page
    assert "overlap" not in page


def test_the_picture_shows_the_plan_on_the_frames_that_it_is_about(clip: tuple[Path, str], tmp_path: Path) -> None:
    video, caption = clip
    assert run("explain", video, caption, "--output", tmp_path / "w.html", "--layer", "1", "--head", "2").exit_code == 0
    frames = read_video(video, n_frames=9, size=32)
    found = explain(load_encoder(checkpoint_path("encoder")), frames[None], [caption], Transport(), per_head=True)
    assert found.plan is not None
    for block, values in enumerate((found.plan, found.attention, found.refined)):
        maps = found.on_grid(values)[0, 0, 1]
        shown = tiles(tmp_path / "w.png", len(found.words[0]), 4, block)
        # token frame k looks at frames 2k to 2k + 2
        centres = (shown[0, :, 41, 41] / 255 - frames[1::2, :, 16, 16].numpy()) * 255
        assert np.abs(centres).max() < 1
        for i, grid in enumerate(maps):
            t, y, x = np.unravel_index(int(grid.argmax()), grid.shape)
            patch = shown[1 + i, t, y * 20 : (y + 1) * 20, x * 20 : (x + 1) * 20]
            assert (patch == HOT).all()


def test_faults_in_explain_are_one_line(clip: tuple[Path, str], tmp_path: Path) -> None:
    video, caption = clip
    out = ("--output", tmp_path / "w.html")
    (tmp_path / "note.mp4").write_text("no video")
    refused(run("explain", tmp_path / "note.mp4", caption, *out), "note.mp4", "not a video")
    refused(run("explain", tmp_path / "absent.mp4", caption, *out), "absent.mp4", "no such file")
    refused(run("explain", video, " ", *out), "PROMPT is empty")
    refused(run("explain", video, "?!", *out), "at least one word")
    refused(run("explain", video, caption, *out, "--layer", "3"), "--layer is 3", "1 to 2")
    refused(run("explain", video, caption, *out, "--layer", "0"), "--layer is 0", "1 to 2")
    refused(run("explain", video, caption, *out, "--head", "5"), "--head is 5", "1 to 4")
    refused(run("explain", video, caption, "--output", tmp_path / "w.txt"), "w.txt", ".html")
    save_tiny("clip", tmp_path / "clip")
    refused(run("explain", video, caption, *out, "--encoder", tmp_path / "clip"), "DualEncoder", "match head")
    refused(run("leverage", "--folder", tmp_path, "--prompt", "x", "--encoder", tmp_path / "clip"), "match head")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "clip.mp4", "note.mp4"]


def test_leverage_reports_the_numbers_and_reads_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    scenes = scene.sample_scenes(6, generator)
    rows = []
    for i, (frames, text) in enumerate(zip(scene.render(scenes, generator), scene.captions(scenes), strict=True)):
        write_video(tmp_path / f"{i}.mp4", frames)
        rows.append({"file_name": f"{i}.mp4", "text": text})
    write_metadata(tmp_path, rows)
    command = ("leverage", "--folder", tmp_path, "--prompt", "a red square moves left", "--json", tmp_path / "l.json")
    result = run(*command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "l.json").read_text())
    assert found["videos"] == 6
    assert found["reading"] == reading(found)
    for part in (f"{found['logit_std']:.3f}", f"{found['partial_ot']:.3f}", f"{found['uniform']:.3f}", "over 6 videos"):
        assert part in result.stdout
    assert found["reading"].split(":")[0] in " ".join(result.stdout.split())

    (tmp_path / "0.mp4").write_bytes(b"broken")
    result = run(*command, "--most", "3")
    assert result.exit_code == 1
    assert "0.mp4" in result.stderr
    assert "over 2 videos" in result.stdout
    refused(run(*command, "--prompt", " "), "--prompt is empty")
    refused(run(*command, "--most", "2"), "1 of 2 videos could be read")


@pytest.mark.parametrize(
    ("std", "partial", "uniform", "words"),
    [
        (4.0, 0.1, 0.3, "can hardly help or harm"),
        (4.0, 0.1, 3.0, "changes the order of few"),
        (4.0, 1.0, 3.0, "can change the order"),
        (4.0, 1.0, 0.1, "can change the order"),
        (0.0, 1.0, 3.0, "nothing can be said"),
    ],
)
def test_the_sentence_fits_the_numbers(std: float, partial: float, uniform: float, words: str) -> None:
    assert words in reading({"logit_std": std, "partial_ot": partial, "uniform": uniform})
