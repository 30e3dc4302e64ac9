"""Laws of alignments: what the map recovers, what the metrics say in closed form, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny_encoder import some_videos, tiny_encoder
from torch import Tensor
from torch.nn import functional as F

from pisces.ot_map import (
    KINDS,
    PAIRED,
    Alignment,
    HeldOut,
    Kind,
    NeuralOTMap,
    alignment_metrics,
    fit_alignment,
    mutual_knn,
    retrieval_at_1,
    rho,
    spearman,
)
from pisces.ot_map.metrics import average_ranks
from pisces.rewards import QualityReward
from pisces_kernels import sinkhorn, sinkhorn_divergence

E = 6


def normal(n: int, seed: int, dim: int = E) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def example(kind: Kind, dim: int = E) -> Alignment:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = NeuralOTMap(dim, hidden=16)
    parts = {"text_mean": 0.3 * normal(1, 2, dim)[0], "video_mean": 0.3 * normal(1, 3, dim)[0]}
    parts |= {"matrix": normal(dim, 4, dim), "offset": normal(1, 5, dim)[0]}
    anchors = F.normalize(normal(9, 6, dim), dim=-1)
    parts |= {"anchors": anchors, "potential": 0.1 * normal(1, 7, 9)[0], "epsilon": torch.tensor(0.2)}
    return Alignment(kind, **parts, network=network, info={"n_text": 5})


def barycentre(y: Tensor, anchors: Tensor, potential: Tensor, epsilon: float) -> Tensor:
    cost = (y[:, None] - anchors).square().sum(-1)
    weights = ((potential - cost) / epsilon).exp()
    return weights @ anchors / weights.sum(-1, keepdim=True)


def gap(text: Tensor, video: Tensor) -> float:
    return float((F.normalize(text, dim=-1).mean(0) - F.normalize(video, dim=-1).mean(0)).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_does_what_its_table_says(kind: Kind, seed: int) -> None:
    alignment = example(kind)
    y, x = 3 * normal(7, seed), 2 * normal(7, seed + 1)
    n_y, n_x = F.normalize(y, dim=-1), F.normalize(x, dim=-1)
    m_y, m_x, network = (getattr(example("center_ot"), part) for part in ("text_mean", "video_mean", "network"))
    linear = n_y @ example("affine").matrix + example("affine").offset
    entropic = example("barycentric")
    text = {
        "none": n_y,
        "mean_shift": n_y + m_x - m_y,
        "center": n_y - m_y,
        "affine": linear,
        "procrustes": linear,
        "ridge": linear,
        "barycentric": barycentre(n_y, entropic.anchors, entropic.potential, 0.2),
        "ot": network(n_y),
        "center_ot": network(F.normalize(n_y - m_y, dim=-1)),
    }[kind]
    video = n_x - m_x if kind in ("center", "center_ot") else n_x
    torch.testing.assert_close(alignment.text(y), F.normalize(text, dim=-1))
    torch.testing.assert_close(alignment.video(x), F.normalize(video, dim=-1))
    torch.testing.assert_close(alignment.text(5 * y), alignment.text(y))  # scale does not matter
    torch.testing.assert_close(alignment.text(y[0]), alignment.text(y)[0])  # nor do leading dimensions
    torch.testing.assert_close(alignment.text(y[:, None]), alignment.text(y)[:, None])


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_wider_dtype_is_computed_in(kind: Kind, given: torch.dtype, own: torch.dtype, seed: int) -> None:
    alignment, exact = example(kind).to(own), example(kind).to(own).double()
    wide = given if kind == "none" else torch.promote_types(given, own)
    z = normal(7, seed).to(given)
    for got, wanted in ((alignment.text(z), exact.text(z.double())), (alignment.video(z), exact.video(z.double()))):
        assert got.dtype == wide
        if wide.itemsize > 2:  # what the narrow ones hold is exact in the wide one, and nothing was computed in them
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4 if wide == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_digit(kind: Kind, seed: int) -> None:
    alignment, z = example(kind), normal(7, seed)
    wanted = alignment.text(z), alignment.video(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert (z @ z.T).dtype == torch.bfloat16  # it is on
        got = alignment.text(z), alignment.video(z)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_takes_every_kind_in_every_dtype(kind: Kind, seed: int) -> None:
    frames, prompts = some_videos(2, seed)
    reward = QualityReward(tiny_encoder(), example(kind, 8))
    before = reward(frames, prompts)
    reward.alignment.double()
    after = reward(frames, prompts)
    assert after.dtype == (torch.float32 if kind == "none" else torch.float64)
    torch.testing.assert_close(after.float(), before, rtol=0, atol=1e-4)
    reward.alignment.bfloat16()
    assert reward(frames, prompts).dtype == torch.float32
    assert torch.isfinite(reward.bfloat16()(frames, prompts)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_alignment(kind: Kind, tmp_path: Path) -> None:
    alignment = example(kind)
    loaded = Alignment.load(alignment.save(tmp_path / "new" / "map.safetensors"))
    assert (loaded.kind, loaded.dim, loaded.info) == (kind, alignment.dim, {"n_text": 5})
    z = normal(4, 5)
    assert torch.equal(loaded.text(z), alignment.text(z))
    assert torch.equal(loaded.video(z), alignment.video(z))


@pytest.mark.parametrize("layout", ["raw", "structured", "parallel"])
def test_checkpoints_of_the_authors_load(layout: str, tmp_path: Path) -> None:
    network = NeuralOTMap(E, hidden=16)
    assert {k.rsplit(".", 1)[0] for k in network.state_dict()} == {f"net.{i}" for i in (0, 2, 3, 5, 6)}
    state = network.state_dict()
    content = {
        "raw": state,
        "structured": {"T": state, "f": {}, "step": 160000},
        "parallel": {f"module.{name}": value for name, value in state.items()},
    }[layout]
    torch.save(content, tmp_path / "map.pt")
    loaded = Alignment.load(tmp_path / "map.pt")
    assert loaded.kind == "ot"
    z = normal(4, 6)
    torch.testing.assert_close(loaded.text(z), F.normalize(network(F.normalize(z, dim=-1)), dim=-1))


class Surprise:
    """Pickles to a call; unpickling it must not happen."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_files_that_are_no_alignment_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        Alignment.load(tmp_path / "gone.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="format None"):
        Alignment.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        example("ot").save(tmp_path / "map.pt")
    for name, content in (
        ("a.pt", {"weight": torch.zeros(2)}),
        ("b.pt", [1, 2]),
        ("c.pt", {"T": Surprise()}),
        ("e.pt", {"epoch": 1}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            Alignment.load(tmp_path / name)
    wrong = NeuralOTMap(E, 16).state_dict() | {"net.6.weight": torch.zeros(3, 16)}
    torch.save(wrong, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="no map of width 6 - 16"):
        Alignment.load(tmp_path / "d.pt")
    (tmp_path / "e.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no torch file"):
        Alignment.load(tmp_path / "e.pt")


def test_incomplete_alignments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of none, mean_shift"):
        Alignment("shift")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs text_mean"):
        Alignment("center")
    with pytest.raises(ValueError, match="needs network"):
        Alignment("ot")
    with pytest.raises(ValueError, match="one width"):
        Alignment("center", text_mean=torch.zeros(3), video_mean=torch.zeros(4))
    with pytest.raises(ValueError, match="needs matrix and offset"):
        Alignment("affine", matrix=torch.eye(3))
    with pytest.raises(ValueError, match=r"\(E, E\)"):
        Alignment("ridge", matrix=torch.zeros(4, 3), offset=torch.zeros(3))
    with pytest.raises(ValueError, match="one number an anchor"):
        Alignment("barycentric", anchors=torch.zeros(4, 3), potential=torch.zeros(3), epsilon=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 6\)"):
        example("center").text(torch.zeros(2, 5))


def test_closed_forms_of_the_fit(seed: int) -> None:
    text, video = normal(50, seed) + 1, normal(40, seed + 1) - 1
    for kind in ("mean_shift", "center"):
        alignment = fit_alignment(text, video, kind=kind)  # type: ignore[arg-type]
        assert alignment.text_mean is not None
        torch.testing.assert_close(alignment.text_mean, F.normalize(text, dim=-1).mean(0))
    assert not any(p.requires_grad for p in alignment.parameters())
    # the scale of the embeddings does not matter: both sides are normalised before the fit as before the use
    scaled = fit_alignment(7 * text, 0.1 * video, kind="center")
    torch.testing.assert_close(scaled.text(text), alignment.text(text))
    torch.testing.assert_close(fit_alignment(text, video, kind="none").text(text), F.normalize(text, dim=-1))


@pytest.mark.parametrize("kind", ["ot", "center_ot"])
def test_the_map_recovers_a_known_transport(kind: Kind) -> None:
    """Gaussian clouds around directions that differ by a known affine map: the gap shrinks five times or more."""
    dim = 8
    base, target = normal(1, 10, dim), normal(1, 11, dim)
    scale = torch.linspace(0.6, 1.4, dim)
    text = base + 0.35 * normal(1200, 12, dim)
    video = target + 0.35 * scale * normal(1200, 13, dim)
    alignment = fit_alignment(text[:1000], video[:1000], kind=kind, hidden=64, steps=150, lr=1e-3, progress=False)
    held_text, held_video = text[1000:], video[1000:]
    q, v = alignment.text(held_text), alignment.video(held_video)
    before = gap(held_text, held_video)
    assert before > 0.5
    assert float((q.mean(0) - v.mean(0)).norm()) < before / 5
    # not only the means: the clouds themselves are closer
    plain = (F.normalize(held_text, dim=-1), F.normalize(held_video, dim=-1))
    assert sinkhorn_divergence(q, v, epsilon=0.1) < sinkhorn_divergence(*plain, epsilon=0.1) / 5
    # transport moves little more than it must: what was near stays near
    start = fit_alignment(text[:1000], video[:1000], kind="none" if kind == "ot" else "center").text(held_text)
    assert spearman(torch.pdist(start), torch.pdist(q)) > 0.7


def test_fits_repeat_with_their_seed_and_leave_global_randomness_alone() -> None:
    text, video = normal(64, 1), normal(64, 2)
    settings = {"kind": "ot", "hidden": 8, "steps": 3, "batch_size": 16, "progress": False}
    state = torch.get_rng_state()
    with torch.no_grad():  # where embeddings are usually made
        first, second, other = (fit_alignment(text, video, seed=s, **settings) for s in (0, 0, 1))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.text(text), second.text(text))
    assert not torch.equal(first.text(text), other.text(text))
    assert first.info == {
        "n_text": 64,
        "n_video": 64,
        "hidden": 8,
        "steps": 3,
        "batch_size": 16,
        "lr": 1e-4,
        "cost_weight": 1.0,
        "objective": "max_min",
        "seed": 0,
    }


def test_fits_of_nothing_are_refused() -> None:
    text = normal(8, 1)
    with pytest.raises(ValueError, match="width 6 and video 5"):
        fit_alignment(text, normal(8, 1, 5))
    with pytest.raises(ValueError, match="at least two"):
        fit_alignment(text[:1], text)
    with pytest.raises(ValueError, match="int64"):
        fit_alignment(text.long(), text)
    with pytest.raises(ValueError, match="non-finite"):
        fit_alignment(text, torch.full_like(text, torch.nan))
    for name in ("hidden", "steps", "batch_size"):
        with pytest.raises(ValueError, match=name):
            fit_alignment(text, text, **{name: 0})
    for kind in PAIRED:
        with pytest.raises(ValueError, match="8 texts and 7 videos, expected pairs"):
            fit_alignment(text, text[:7], kind=kind)
    with pytest.raises(ValueError, match="objective is 'magic'"):
        fit_alignment(text, text, objective="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it would change nothing"):
        fit_alignment(F.normalize(text, dim=-1), text, kind="ot", normalize_text=False)
    with pytest.raises(ValueError, match="expected kind 'ot'"):
        fit_alignment(text, text, kind="center_ot", normalize_text=False)
    with pytest.raises(ValueError, match="held_out has"):
        fit_alignment(text, text, held_out=HeldOut(text, text[:3], ["x"] * 8))
    with pytest.raises(ValueError, match="kind is 'bures'"):
        fit_alignment(text, text, kind="bures")  # type: ignore[arg-type]


def test_rho_by_hand() -> None:
    text = torch.tensor([[2.0, 1.0], [2.0, -1.0]])  # mean (2, 0), deviations +-(0, 1)
    video = torch.tensor([[1.0, 0.0], [-1.0, 3.0], [0.0, -3.0]])
    # shared part: v . (2, 0) = 2, -2, 0, variance 4; the rest: +-(0, 3, -3), variance 9
    assert rho(text, video) == pytest.approx(4 / 9)
    # centred texts share nothing
    assert rho(text - text.mean(0), video) == pytest.approx(0)


def test_retrieval_of_perfect_blind_and_repeated_captions(seed: int) -> None:
    x = F.normalize(normal(200, seed, 16), dim=-1)
    label = torch.arange(200)
    assert retrieval_at_1(x, x, label) == 1
    assert retrieval_at_1(x, x.roll(1, 0), label) == 0
    assert retrieval_at_1(x, F.normalize(normal(200, seed + 1, 16), dim=-1), label) < 0.1
    assert retrieval_at_1(x, x.roll(1, 0), torch.zeros(200, dtype=torch.long)) == 1


def test_metrics_do_not_depend_on_how_many_rows_are_held(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(53, seed), normal(53, seed + 1)
    label = torch.arange(53) // 2
    whole = retrieval_at_1(x, x + y, label), mutual_knn(x, x + y, k=5)
    for held in (1, 53 * 7, 10**9):
        monkeypatch.setattr("pisces.ot_map.metrics.SIMILARITIES", held)
        assert (retrieval_at_1(x, x + y, label), mutual_knn(x, x + y, k=5)) == whole


def test_mutual_knn_of_equal_moved_and_foreign_clouds(seed: int) -> None:
    x = normal(300, seed, 16)
    assert mutual_knn(x, x) == 1
    rotation = torch.linalg.qr(normal(16, seed + 1, 16)).Q
    assert mutual_knn(x, x @ rotation) > 0.99
    assert mutual_knn(x, normal(300, seed + 2, 16)) == pytest.approx(10 / 299, abs=0.03)
    for bad in (0, 300):
        with pytest.raises(ValueError, match=r"expected equal numbers and 1 <= k < 300\. Pass"):
            mutual_knn(x, x, k=bad)


def test_spearman_is_scipys(seed: int) -> None:
    x, y = normal(1, seed, 80)[0], normal(1, seed + 1, 80)[0]
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-6)
    ties = (3 * x).round()
    assert len(ties.unique()) < 80
    assert spearman(ties, y) == pytest.approx(stats.spearmanr(ties.numpy(), y.numpy()).statistic, abs=1e-6)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)


def test_ranks_of_many_are_exact() -> None:
    """Above 2^23 float32 has no halves, and equal pairs have ranks that end in one."""
    n = 2**23 + 6
    ranks = average_ranks(torch.arange(n, dtype=torch.int32).div(2, rounding_mode="floor"))
    assert ranks.dtype == torch.float64
    assert ranks[-4:].tolist() == [n - 2.5, n - 2.5, n - 0.5, n - 0.5]


def test_the_divergence_is_that_of_stored_costs(seed: int) -> None:
    """Of |a - b|^2 / 2 with epsilon 0.05, solved densely in float64."""
    text, video = normal(60, seed) + 1, normal(60, seed + 1)
    q, v = (F.normalize(z, dim=-1).double() for z in (text, video))

    def transport(a: Tensor, b: Tensor) -> float:
        return float(sinkhorn(torch.cdist(a, b).square() / 2, epsilon=0.05, max_iters=20_000, tol=1e-9).value)

    wanted = transport(q, v) - (transport(q, q) + transport(v, v)) / 2
    captions = [str(i) for i in range(60)]
    got = alignment_metrics(Alignment("none"), text, video, captions)["sinkhorn_divergence"]
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert alignment_metrics(Alignment("none"), text, text, captions)["sinkhorn_divergence"] == pytest.approx(
        0, abs=1e-5
    )


def test_metrics_of_no_alignment_are_the_plain_ones(seed: int) -> None:
    text, video = normal(40, seed), normal(40, seed + 1)
    captions = [f"caption {i % 20}" for i in range(40)]
    metrics = alignment_metrics(Alignment("none"), text, video, captions)
    assert list(metrics) == ["gap", "cosine", "r_at_1", "rho", "sinkhorn_divergence", "mutual_knn", "spearman"]
    assert metrics["gap"] == pytest.approx(gap(text, video), rel=1e-4)
    assert metrics["cosine"] == pytest.approx(float(F.cosine_similarity(text, video).mean()), rel=1e-3, abs=1e-6)
    assert metrics["spearman"] == pytest.approx(1)
    with pytest.raises(ValueError, match="39 captions"):
        alignment_metrics(Alignment("none"), text, video, captions[1:])
    with pytest.raises(ValueError, match="alignment_metrics"):
        alignment_metrics(Alignment("none"), text, video[1:], captions)


@pytest.mark.filterwarnings("ignore:alignment_metrics")
def test_metrics_of_many_pairs_rank_some_of_them(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text, video = normal(41, seed), normal(41, seed + 1)
    captions = [str(i) for i in range(41)]
    alignment = fit_alignment(text, video, kind="affine")
    every, other = (alignment_metrics(alignment, text[::step], video[::step], captions[::step]) for step in (1, 2))
    monkeypatch.setattr("pisces.ot_map.metrics.MOST_PAIRS", 21)
    some = alignment_metrics(alignment, text, video, captions)
    for name in ("spearman", "sinkhorn_divergence"):
        assert some[name] == pytest.approx(other[name], rel=1e-5)
        assert some[name] != pytest.approx(every[name], rel=1e-5)
    rest = set(every) - {"spearman", "sinkhorn_divergence"}
    assert {name: some[name] for name in rest} == {name: every[name] for name in rest}


def test_a_map_that_harms_is_reported_and_one_that_helps_is_not() -> None:
    shared = F.normalize(normal(60, 20, 16), dim=-1)
    offset = torch.zeros(16)
    offset[0] = 1.5
    # texts with a large common part, along which the videos vary: centring removes it
    text, video = shared + offset, shared + 0.8 * normal(60, 21, 1) * offset
    captions = [str(i) for i in range(60)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = alignment_metrics(fit_alignment(text, video, kind="center"), text, video, captions)
    plain = alignment_metrics(Alignment("none"), text, video, captions)
    assert good["rho"] < plain["rho"]
    assert good["r_at_1"] >= plain["r_at_1"]
    network = NeuralOTMap(16, 8)
    torch.nn.init.zeros_(network.net[6].weight)  # every text becomes the same: nothing can be found any more
    torch.nn.init.ones_(network.net[6].bias)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alignment_metrics(Alignment("ot", network=network), shared, shared, captions)
    assert [w for w in caught if "lowers r_at_1 from 1.000" in str(w.message)]
    assert [w for w in caught if "raises rho" in str(w.message)]


@pytest.mark.parametrize("kind", ["none", "center", "ot"])
def test_metrics_of_one_single_caption_say_so(kind: Kind, seed: int) -> None:
    """Its texts differ by rounding at most, and figures made of rounding are none."""
    text = normal(1, seed, E).expand(30, E) + 1e-8 * normal(30, seed + 1, E)
    video = normal(30, seed + 2)
    with pytest.warns(UserWarning, match="all captions are the same") as caught:
        metrics = alignment_metrics(example(kind), text, video, ["a dog"] * 30)
    assert len(caught) == 1  # and nothing about what rises or falls
    assert math.isnan(metrics["rho"])
    assert math.isnan(metrics["spearman"])
    assert metrics["r_at_1"] == 1
    assert all(math.isfinite(metrics[name]) for name in ("gap", "cosine", "sinkhorn_divergence", "mutual_knn"))
    assert rho(F.normalize(text, dim=-1), F.normalize(video, dim=-1)) == math.inf
    two = alignment_metrics(Alignment("none"), normal(30, seed), video, ["a dog"] * 29 + ["a cat"])
    assert math.isfinite(two["rho"])
    assert math.isfinite(two["spearman"])


def test_metrics_row_by_row_are_those_of_whole_matrices(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisces.ot_map.metrics.ROWS", 7)
    text, video = (torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64), dim=-1) for _ in range(2))
    label = torch.arange(40)
    assert retrieval_at_1(text, video, label) == pytest.approx(
        float(((text @ video.T).argmax(1) == label).double().mean())
    )
    rewards = text @ video.T
    typical = rewards.mean(0)
    assert rho(text, video) == pytest.approx(float(typical.var() / (rewards - typical).var(1).mean()))
    near = [
        [set((z @ z.T).fill_diagonal_(-torch.inf)[i].topk(5).indices.tolist()) for i in range(40)]
        for z in (text, video)
    ]
    overlap = [len(a & b) / 5 for a, b in zip(*near, strict=True)]
    assert mutual_knn(text, video, k=5) == pytest.approx(sum(overlap) / 40)
