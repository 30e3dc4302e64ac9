"""Laws of fits: closed forms against POT, numpy and scipy; what maps recover; choice and resume of a training."""

from __future__ import annotations

import copy
import math
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor
from torch.nn import functional as F

from pisces.ot_map import (
    KINDS,
    Alignment,
    FitInterrupted,
    HeldOut,
    Kind,
    Objective,
    affine_ot,
    alignment_metrics,
    fit_alignment,
    neural,
    paper_settings,
    procrustes,
    retrieval_at_1,
    rho,
    ridge,
)
from pisces.ot_map.barycentric import entropic_map
from pisces.ot_map.linear import shrunk_covariance
from pisces.ot_map.neural import MapSettings, train_map
from pisces.state import CheckpointError, list_checkpoints

SMALL: dict[str, Any] = {"kind": "ot", "hidden": 8, "steps": 7, "batch_size": 16, "progress": False}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spread(n: int, dim: int) -> Tensor:
    """Correlated points around a common point."""
    left, right = (torch.linalg.qr(normal(dim, dim)).Q for _ in range(2))
    return normal(n, dim) @ (left * (0.5 + 1.5 * torch.rand(dim, dtype=left.dtype))) @ right + normal(dim)


# closed forms


def test_affine_ot_is_the_map_between_gaussians(seed: int) -> None:
    text, video = spread(60, 7), spread(80, 7)
    matrix, offset = affine_ot(text, video, shrinkage=0)
    covariances = [torch.cov(z.T) for z in (text, video)]
    torch.testing.assert_close(matrix.T @ covariances[0] @ matrix, covariances[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((text @ matrix + offset).mean(0), video.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-9)  # a gradient of a convex function
    assert torch.linalg.eigvalsh(matrix).min() > 0
    numbers = [z.numpy() for z in (text.mean(0), video.mean(0), *covariances)]
    theirs, shift = ot.gaussian.bures_wasserstein_mapping(*numbers)
    np.testing.assert_allclose(matrix, theirs, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(offset, shift, rtol=1e-7, atol=1e-8)
    # neither the shift alone nor a matrix that maps the covariance by a detour is the transport
    assert float((torch.eye(7) - matrix).norm()) > 0.1
    factors = [torch.linalg.cholesky(c) for c in covariances]
    assert float((torch.linalg.inv(factors[0]).T @ factors[1].T - matrix).norm()) > 0.1


def test_a_shrunk_covariance_is_ledoit_and_wolfs(seed: int) -> None:
    """Against their formula point by point; between S and a multiple of the identity, nearer to S the more points."""
    x = spread(12, 5)
    z = (x - x.mean(0)).numpy()
    plain = z.T @ z / len(z)
    level = plain.trace() / 5 * np.eye(5)
    noise = sum(((np.outer(row, row) - plain) ** 2).sum() for row in z) / len(z) ** 2
    share = min(noise / ((plain - level) ** 2).sum(), 1)
    unbiased = len(z) / (len(z) - 1)
    np.testing.assert_allclose(shrunk_covariance(x), unbiased * ((1 - share) * plain + share * level), rtol=1e-9)
    torch.testing.assert_close(shrunk_covariance(x, 0), x.T.cov())
    torch.testing.assert_close(shrunk_covariance(7 * x), 49 * shrunk_covariance(x))
    few = spread(3, 8)
    assert torch.linalg.eigvalsh(few.T.cov()).min() < 1e-12
    assert torch.linalg.eigvalsh(shrunk_covariance(few)).min() > 0
    for pair in (few[:2], torch.stack([few[0], few[1], few[0]])):  # of two points the estimate is no noise at all
        assert torch.linalg.eigvalsh(shrunk_covariance(pair)).min() > 0


def test_affine_ot_of_few_texts_is_no_worse_than_a_shift(seed: int) -> None:
    """Fewer texts than dimensions: a warning, and a map near the shift where the unshrunk one is mostly noise."""
    dim, n = 32, 24
    shared = normal(1000, dim) * torch.linspace(0.5, 1.5, dim)
    text, video = (F.normalize(z, dim=-1) for z in (shared + normal(dim), shared + 0.3 * normal(1000, dim) + 2))
    held = (text[n:], video[n:])

    def cosine(matrix: Tensor, offset: Tensor) -> float:
        return float(F.cosine_similarity(held[0] @ matrix + offset, held[1]).mean())

    with pytest.warns(UserWarning, match="24 texts cannot determine a covariance of 32 dimensions"):
        shrunk = cosine(*affine_ot(text[:n], video[:n]))
    with pytest.warns(UserWarning, match="cannot determine"):
        noisy = cosine(*affine_ot(text[:n], video[:n], shrinkage=1e-6))
    shift = cosine(torch.eye(dim).double(), video[:n].mean(0) - text[:n].mean(0))
    assert shrunk > shift - 0.01
    assert 1 - noisy > 2 * (1 - shrunk)
    with pytest.warns(UserWarning, match="32 videos cannot determine"):
        affine_ot(text, video[:32])
    with (
        pytest.raises(ValueError, match=r"24 texts is singular.*Use shrinkage=None"),
        pytest.warns(UserWarning, match="cannot determine"),
    ):
        affine_ot(text[:n], video, shrinkage=0)
    for same in (torch.ones(4, 3), 1 + 1e-9 * normal(40, 3)):
        for fit in (affine_ot, procrustes, ridge):
            with pytest.raises(ValueError, match="same embedding"):
                fit(same, video[: len(same), :3])


def test_affine_ot_of_many_texts_is_hardly_shrunk(seed: int) -> None:
    text, video = spread(20_000, 7), spread(20_000, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (plain, _), (shrunk, offset) = affine_ot(text, video, shrinkage=0), affine_ot(text, video)
    assert float((shrunk - plain).norm() / plain.norm()) < 0.02
    torch.testing.assert_close((text @ shrunk + offset).mean(0), video.mean(0), rtol=1e-9, atol=1e-9)
    # whatever the shrinkage: the shrunk covariance goes exactly onto the shrunk one
    few, others = spread(20, 7), spread(30, 7)
    matrix, _ = affine_ot(few, others)
    torch.testing.assert_close(matrix @ shrunk_covariance(few) @ matrix, shrunk_covariance(others))


def test_procrustes_is_scipys(seed: int) -> None:
    text, video = spread(50, 6), spread(50, 6)
    matrix, offset = procrustes(text, video)
    theirs, _ = orthogonal_procrustes((text - text.mean(0)).numpy(), (video - video.mean(0)).numpy())
    np.testing.assert_allclose(matrix, theirs, atol=1e-10)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(6).double())
    torch.testing.assert_close((text @ matrix + offset).mean(0), video.mean(0))
    # it needs the pairs: of shuffled ones it is another rotation
    assert float((procrustes(text, video.flip(0))[0] - matrix).norm()) > 0.1


def test_procrustes_of_few_pairs_says_how_many_it_lacks(seed: int) -> None:
    text, video = spread(9, 8), spread(9, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        procrustes(text, video)
    for n in (8, 3):
        with pytest.warns(UserWarning, match=f"procrustes: {n} pairs determine a rotation in {n - 1} of 8 dimensions"):
            matrix, _ = procrustes(text[:n], video[:n])
        # another rotation of what the pairs leave open is as good, and as little known
        y, x = text[:n] - text[:n].mean(0), video[:n] - video[:n].mean(0)
        _, _, axes = torch.linalg.svd(y)
        turned = matrix - 2 * torch.outer(axes[-1], axes[-1] @ matrix)
        assert float((turned - matrix).norm()) == pytest.approx(2)
        assert float((y @ turned - x).norm()) == pytest.approx(float((y @ matrix - x).norm()))


def test_ridge_is_least_squares_with_rows_for_the_penalty(seed: int) -> None:
    text, video = spread(30, 5), spread(30, 5)
    penalty = 0.1
    matrix, offset = ridge(text, video, penalty=penalty)
    y, x = (text - text.mean(0)).numpy(), (video - video.mean(0)).numpy()
    weight = (penalty * (y**2).sum() / 5) ** 0.5
    theirs, *_ = np.linalg.lstsq(np.vstack([y, weight * np.eye(5)]), np.vstack([x, np.zeros((5, 5))]), rcond=None)
    np.testing.assert_allclose(matrix, theirs, atol=1e-10)
    torch.testing.assert_close((text @ matrix + offset).mean(0), video.mean(0))
    assert float((ridge(text, video)[0] - matrix).norm()) > 1e-3
    with pytest.raises(ValueError, match="penalty is 0"):
        ridge(text, video, penalty=0)


def test_the_entropic_map_of_the_fitted_texts_is_the_plans_projection(seed: int) -> None:
    text, video = (F.normalize(spread(n, 4), dim=-1) for n in (30, 40))
    epsilon = 0.3
    parts = entropic_map(text, video, epsilon=epsilon)
    plan = ot.sinkhorn([], [], ot.dist(text.numpy(), video.numpy()), epsilon, stopThr=1e-14, numItermax=20_000)
    projected = torch.from_numpy(plan / plan.sum(1, keepdims=True)) @ video
    alignment = Alignment("barycentric", **parts)
    torch.testing.assert_close(alignment.text(text), F.normalize(projected, dim=-1), rtol=0, atol=1e-6)
    # without the potential it is a mere smoother, and maps elsewhere
    flat = Alignment("barycentric", **{**parts, "potential": torch.zeros_like(parts["potential"])})
    assert float((flat.text(text) - alignment.text(text)).abs().max()) > 1e-3


def test_an_entropic_map_of_many_keeps_some(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisces.ot_map.barycentric.ANCHORS", 16)
    text, video = (F.normalize(spread(n, 4), dim=-1) for n in (40, 50))
    first, second = (entropic_map(text, video, epsilon=0.5, seed=3) for _ in range(2))
    assert first["anchors"].shape == (16, 4)
    assert torch.equal(first["potential"], second["potential"])
    assert not torch.equal(entropic_map(text, video, epsilon=0.5, seed=4)["anchors"], first["anchors"])


def test_a_solve_that_does_not_converge_is_reported(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("pisces.ot_map.barycentric.MAX_ITERS", 1)
    with pytest.warns(UserWarning, match="Use a larger epsilon"):
        entropic_map(*(F.normalize(spread(20, 4), dim=-1) for _ in range(2)))


@pytest.mark.parametrize("kind", ["affine", "procrustes", "ridge"])
def test_a_fit_is_its_closed_form(kind: Kind, seed: int) -> None:
    text, video = spread(40, 5).float(), spread(40, 5).float()
    function = {"affine": affine_ot, "procrustes": procrustes, "ridge": ridge}[kind]
    matrix, offset = function(F.normalize(text, dim=-1), F.normalize(video, dim=-1))
    wanted = F.normalize(F.normalize(text.double(), dim=-1) @ matrix + offset, dim=-1).float()
    torch.testing.assert_close(fit_alignment(text, video, kind=kind).text(text), wanted, rtol=1e-4, atol=1e-5)


# the trained map


@pytest.mark.parametrize("objective", ["max_min", "sinkhorn"])
def test_a_trained_map_recovers_a_known_affine_map(objective: Objective, seed: int, one_thread: None) -> None:
    """Between Gaussians transport is affine, and here mostly linear: no translation comes near it, the map does."""
    dim, std = 4, 0.5
    scale = torch.linspace(0.4, 2.0, dim)
    turn = torch.linalg.qr(torch.randn(dim, dim)).Q
    # positive definite: of all maps that carry one Gaussian onto the other this one is the transport
    matrix, shift = turn @ torch.diag(scale) @ turn.T, 0.2 * F.normalize(torch.randn(dim), dim=0)
    text = std * torch.randn(2000, dim)
    video = std * torch.randn(2000, dim) @ matrix + shift
    steps, lr, batch_size = (80, 2e-3, 128) if objective == "max_min" else (250, 5e-3, 256)
    network, _ = train_map(text, video, MapSettings(64, steps, batch_size, lr, 1.0, objective, 0), progress=False)
    fresh = std * torch.randn(2000, dim)
    wanted = fresh @ matrix + shift
    # the best of all translations leaves E |y matrix - y|^2 = std^2 sum (scale - 1)^2
    limit = float(std**2 * (scale - 1).square().sum()) / 5

    def error(moved: Tensor) -> float:
        return float((moved - wanted).square().sum(1).mean())

    with torch.no_grad():
        assert error(network(fresh)) < limit  # a tenth in most runs, where a fifth is asked
    assert error(fresh + video.mean(0) - text.mean(0)) > 4 * limit
    assert error(fresh) > 4 * limit


@pytest.mark.parametrize("offset", [1.2, 0.3])  # larger and smaller than the spread of the captions, which is 1
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_a_modality_gap_shrinks_fivefold_and_retrieval_stays(
    kind: Kind, offset: float, seed: int, one_thread: None
) -> None:
    dim, n = 16, 1200
    shared = F.normalize(torch.randn(n, dim), dim=-1)
    one, other = torch.linalg.qr(torch.randn(dim, 2)).Q.T  # how far apart the two clouds are is not left to chance
    text = shared + offset * one
    video = shared + 0.05 * torch.randn(n, dim) - offset * other
    settings: dict[str, Any] = {"hidden": 64, "steps": 90, "lr": 4e-3, "progress": False}
    alignment = fit_alignment(text[:1000], video[:1000], kind=kind, **settings)
    centred = fit_alignment(text[:1000], video[:1000], kind="center")
    captions = [str(i) for i in range(n - 1000)]
    plain, center, aligned = (
        alignment_metrics(a, text[1000:], video[1000:], captions) for a in (Alignment("none"), centred, alignment)
    )
    assert plain["gap"] > (1 if offset > 1 else 0.3)
    # with the large offset the gap has ruined retrieval, and keeping what is left would be little; with the small not
    assert plain["r_at_1"] < 0.7 if offset > 1 else plain["r_at_1"] > 0.95
    assert center["r_at_1"] > 0.95
    # the entropic map pulls towards means, see docs/rewards.md
    entropic = kind == "barycentric"
    assert aligned["gap"] < plain["gap"] / (1.5 if entropic and offset < 1 else 5)
    assert aligned["r_at_1"] >= (0.8 if entropic else 0.9) * center["r_at_1"]


def test_the_mismatch_of_the_released_code_can_be_reproduced(seed: int) -> None:
    text, video = 5 * torch.randn(100, 6), torch.randn(100, 6)
    right, wrong = (fit_alignment(text, video, normalize_text=n, **SMALL) for n in (True, False))
    assert wrong.info["normalize_text"] is False
    assert not torch.equal(right.text(text), wrong.text(text))
    # in use it normalises all the same
    torch.testing.assert_close(wrong.text(3 * text), wrong.text(text))
    # fitted on texts of any length, it depends on their lengths; the right one does not
    again = fit_alignment(0.2 * text, video, normalize_text=False, **SMALL)
    assert not torch.allclose(again.text(text), wrong.text(text))
    torch.testing.assert_close(fit_alignment(0.2 * text, video, **SMALL).text(text), right.text(text))


def test_the_papers_settings_are_those_of_the_paper() -> None:
    assert paper_settings(512) == {
        "kind": "ot",
        "hidden": 1024,
        "steps": 160_000,
        "batch_size": 128,
        "lr": 1e-4,
        "cost_weight": 1 / 512,
        "objective": "max_min",
    }
    assert (neural.MAP_STEPS, neural.WEIGHT_DECAY, neural.CLIP, neural.LAST_LR) == (10, 1e-10, 1.0, 0.05)


def test_outer_steps_are_those_of_the_recipe(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of T and one of f on fresh batches, each clipped, by Adam with weight decay, on a falling cosine."""
    decay, clip, last = 0.1, 0.05, 0.25  # large enough to be seen after three steps
    for name, value in (("WEIGHT_DECAY", decay), ("CLIP", clip), ("LAST_LR", last)):
        monkeypatch.setattr(neural, name, value)
    text, video = torch.randn(2, 40, 5, dtype=torch.float64)
    settings = MapSettings(hidden=6, steps=3, batch_size=7, lr=1e-2, cost_weight=0.3, objective="max_min", seed=4)
    fit = neural.MapFit(text, video + 0.5, settings)
    move, judge = copy.deepcopy(fit.network), copy.deepcopy(fit.potential)
    generator = torch.Generator().manual_seed(4)
    moments: dict[Tensor, list[Tensor]] = {}
    clipped = []

    def batch(data: Tensor) -> Tensor:
        return data[torch.randint(0, 40, (7,), generator=generator)]

    def adam(network: torch.nn.Module, loss: Tensor, rate: float, number: int) -> None:
        weights = list(network.parameters())
        gradients = torch.autograd.grad(loss, weights)
        length = torch.cat([g.flatten() for g in gradients]).norm()
        clipped.append(float(length) > clip)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                g = gradient * min(1.0, clip / float(length + 1e-6)) + decay * weight
                m, v = moments.setdefault(weight, [torch.zeros_like(g), torch.zeros_like(g)])
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                weight -= rate * m / (1 - 0.9**number) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)

    for outer in range(3):
        rate = 1e-2 * (last + (1 - last) * (1 + math.cos(math.pi * outer / 3)) / 2)
        for inner in range(10):
            y = batch(text)
            loss = 0.3 * ((move(y) - y) ** 2).sum(1).mean() - judge(move(y)).mean()
            adam(move, loss, rate, 10 * outer + inner + 1)
        y, x = batch(text), batch(video + 0.5)
        adam(judge, judge(move(y).detach()).mean() - judge(x).mean(), rate, outer + 1)
        fit.step()
        for mine, theirs in ((move, fit.network), (judge, fit.potential)):
            for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-9)
    assert any(clipped)


def test_the_best_map_is_kept(seed: int) -> None:
    text = torch.randn(80, 6)
    seen: list[tuple[float, Tensor]] = []
    scores = [0.2, 0.7, 0.7, 0.1]  # the first of equal ones stays

    def score(network: Any) -> tuple[float, ...]:
        seen.append((scores[len(seen)], network.net[0].weight.clone()))
        return (seen[-1][0],)

    settings = MapSettings(8, 7, 16, 1e-3, 1.0, "max_min", 0)
    network, facts = train_map(text, text + 1, settings, score=score, check_every=2, progress=False)
    assert facts == {"best_step": 4}
    assert torch.equal(network.net[0].weight, seen[1][1])
    assert not torch.equal(network.net[0].weight, seen[3][1])


def test_maps_are_chosen_by_retrieval(seed: int) -> None:
    shared = F.normalize(torch.randn(150, 8), dim=-1)
    held_out = HeldOut(shared[100:], shared[100:], [str(i) for i in range(50)])
    settings = {**SMALL, "steps": 20, "lr": 3e-3}
    chosen = fit_alignment(shared[:100], shared[:100], held_out=held_out, check_every=1, **settings)
    assert 1 <= chosen.info["best_step"] <= 20
    last = fit_alignment(shared[:100], shared[:100], **settings)
    label = torch.arange(50)
    found = [retrieval_at_1(a.text(shared[100:]), shared[100:], label) for a in (chosen, last)]
    assert found[0] >= found[1]
    by_rho = fit_alignment(
        shared[:100], shared[:100], held_out=replace(held_out, metric="rho"), check_every=1, **settings
    )
    spread_of = [rho(a.text(shared[100:]), shared[100:]) for a in (by_rho, chosen, last)]
    assert spread_of[0] == min(spread_of)


@pytest.mark.parametrize("objective", ["max_min", "sinkhorn"])
def test_a_resumed_fit_is_the_same_fit(
    objective: Objective, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, video = torch.randn(60, 6), torch.randn(60, 6)
    held_out = HeldOut(text[:20], video[:20], [str(i) for i in range(20)])
    settings = {**SMALL, "objective": objective, "held_out": held_out, "check_every": 2, "save_every": 3}
    whole = fit_alignment(text, video, **settings)
    step = neural.MapFit.step

    def stopped(fit: neural.MapFit) -> None:
        step(fit)
        if fit.step_number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(neural.MapFit, "step", stopped)
    with pytest.raises(FitInterrupted) as caught:
        fit_alignment(text, video, checkpoints=tmp_path, **settings)
    assert caught.value.code == 128 + signal.SIGTERM
    assert [number for number, _ in list_checkpoints(tmp_path)] == [3, 5]
    monkeypatch.setattr(neural.MapFit, "step", step)
    resumed = fit_alignment(text, video, checkpoints=tmp_path, **settings)
    assert resumed.info == whole.info
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    # the finished fit is only read back, and another one is refused
    again = fit_alignment(text, video, checkpoints=tmp_path, **settings)
    assert torch.equal(again.text(text), whole.text(text))
    with pytest.raises(CheckpointError, match=r"other lr\."):
        fit_alignment(text, video, checkpoints=tmp_path, **{**settings, "lr": 1.0})
    with pytest.raises(CheckpointError, match=r"other held_out\."):
        fit_alignment(text, video, checkpoints=tmp_path, **{**settings, "held_out": replace(held_out, metric="rho")})
    with pytest.raises(CheckpointError, match=r"other data\."):
        fit_alignment(text, video + 1, checkpoints=tmp_path, **settings)
    newest = list_checkpoints(tmp_path)[-1][1] / "network.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"network\.safetensors is corrupt"):
        fit_alignment(text, video, checkpoints=tmp_path, **settings)
