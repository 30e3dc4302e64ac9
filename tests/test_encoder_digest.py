"""An alignment is used with the encoder that it was fitted with, wherever the two meet; another one is refused."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import tiny_encoder
from tiny_internvideo2 import small_model
from tiny_transformers import NAMES, save_tiny
from typer.testing import CliRunner, Result

from pisces.cli import app
from pisces.encoders import DualEncoder, TinyEncoder, VideoTextEncoder, load_encoder
from pisces.ot_map import Alignment, NeuralOTMap, encoder_facts
from pisces.ot_map.encoder_digest import encoder_digest
from pisces.rewards import QualityReward
from pisces.world.dataset import write_dataset
from pisces.world.scene import VOCABULARY

SAME, OTHER = 0, 1


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def center(encoder_seed: int | None = None) -> Alignment:
    """Of the width of the tiny encoder; with a seed, fitted with the encoder of that seed."""
    facts = {} if encoder_seed is None else encoder_facts(tiny_encoder(encoder_seed))
    return Alignment("center", text_mean=torch.zeros(8), video_mean=torch.zeros(8), info=facts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned videos and two encoders of one width."""
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "videos", 16, seed=4)
    for seed in (SAME, OTHER):
        tiny_encoder(seed).save_pretrained(root / f"encoder{seed}")
    return root


@pytest.mark.parametrize("kept", [False, True])
def test_fitted_scored_and_evaluated_with_one_encoder_only(world: Path, tmp_path: Path, kept: bool) -> None:
    file = tmp_path / "map.safetensors"
    folder = ("--embeddings", tmp_path / "embeddings") if kept else ()
    fit = ("fit-ot-map", "--output", file, "--kind", "center", "--device", "cpu", *folder)
    assert run(*fit, "--videos", world / "videos", "--encoder", world / f"encoder{SAME}").exit_code == 0
    if kept:  # the digest comes from the folder where no encoder is loaded
        file.unlink()
        assert run(*fit).exit_code == 0
    info = Alignment.load(file).info
    assert info["encoder_sha256"] == encoder_digest(load_encoder(world / f"encoder{SAME}"))
    for command in (("score", "--folder", world / "videos"), ("evaluate", world / "videos")):
        for seed in (SAME, OTHER):
            result = run(*command, "--ot-map", file, "--encoder", world / f"encoder{seed}")
            assert result.exit_code == (0 if seed == SAME else 2), result.output
            if seed == OTHER:
                assert "was fitted with another encoder" in result.stderr
                assert info["encoder_sha256"][:12] in result.stderr


def test_an_encoder_in_bfloat16_is_the_same_encoder(tmp_path: Path) -> None:
    """Also one that was moved after its alignment was fitted, and one that was in 16 bits then and is not now."""
    model = tiny_encoder(SAME)
    low = copy.deepcopy(model).bfloat16()
    assert encoder_digest(low) != encoder_digest(model)
    for fitted, used in ((model, low), (low, model), (low, low)):
        alignment = center()
        alignment.info |= encoder_facts(fitted)
        QualityReward(used, alignment)
    with pytest.raises(ValueError, match="another encoder"):
        QualityReward(tiny_encoder(OTHER).bfloat16(), center(SAME))
    # a model of transformers keeps its precision in its settings, too
    save_tiny("clip", tmp_path)
    alignment = Alignment("center", text_mean=torch.zeros(8), video_mean=torch.zeros(8))
    full, half = (type(load_encoder(tmp_path)).from_pretrained(tmp_path, dtype=d) for d in (None, torch.bfloat16))
    alignment.info |= encoder_facts(full)
    QualityReward(half, alignment)


@pytest.mark.parametrize("changed", [{"seed": OTHER}, {"size": 48}, {"vocabulary": VOCABULARY[:3] + VOCABULARY[:2:-1]}])
def test_all_that_embeddings_depend_on_counts(changed: dict[str, Any]) -> None:
    other = tiny_encoder(**changed)
    alignment = center(SAME)
    for rounded in (True, False):  # files of older versions have the exact digest only
        assert ("encoder_bf16_sha256" in alignment.info) == rounded
        with pytest.raises(ValueError, match="Use that encoder, or fit"):
            QualityReward(other, alignment)
        alignment.info.pop("encoder_bf16_sha256", None)
    QualityReward(tiny_encoder(SAME), center(SAME))


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_transformers_may_move_and_its_software_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What a path is called, and which version wrote or read the settings, is no part of an encoder."""
    save_tiny(name, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    facts = encoder_facts(load_encoder(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    assert encoder_facts(load_encoder(Path("one"))) == facts
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")
    assert encoder_facts(load_encoder(tmp_path / "two")) == facts


def five_frames(seed: int = SAME, **changes: Any) -> TinyEncoder:
    """The tiny encoder of a seed at another number of frames, with which one of its tensors changes."""
    model = tiny_encoder(seed, n_frames=5, **changes)
    model.load_state_dict({**tiny_encoder(seed, **changes).state_dict(), "time": model.time})
    return model


def test_another_number_of_frames_is_said_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper fits on 8 frames and rewards 26; of weights, size and words nothing else may differ."""
    for model in (five_frames(), five_frames().bfloat16()):
        with pytest.warns(UserWarning, match="this TinyEncoder at 9 frames, and here it looks at 5"):
            QualityReward(model, center(SAME))
    for other in (five_frames(OTHER), five_frames(size=48)):
        with pytest.raises(ValueError, match="another encoder"):
            QualityReward(other, center(SAME))
    older = center(SAME)
    del older.info["encoder_any_frames_sha256"]
    with pytest.raises(ValueError, match="An earlier version took digests otherwise"):
        QualityReward(five_frames(), older)
    monkeypatch.setattr(TinyEncoder, "frame_tensors", ())
    with pytest.raises(ValueError, match=r"5 frames instead of 9 if it names .* `frame_tensors`"):
        QualityReward(five_frames(), center(SAME))


def test_frames_of_pretrained_encoders_may_differ_and_nothing_else(tmp_path: Path, seed: int) -> None:
    """CLIP has no tensor that depends on their number, InternVideo2 has its positions."""
    for name in ("one", "two"):
        save_tiny("clip", tmp_path / name)
    clips = [
        DualEncoder.from_pretrained(tmp_path / name, n_frames=n) for name, n in (("one", 8), ("one", 4), ("two", 4))
    ]
    model, other = small_model(), small_model(n_frames=5)
    longer = small_model(n_frames=5)
    positions = longer.state_dict()["vision_encoder.pos_embed"]
    longer.load_state_dict({**model.state_dict(), "vision_encoder.pos_embed": positions})
    cases: list[list[VideoTextEncoder]] = [[*clips], [model, longer, other]]
    for fitted, same, different in cases:
        alignment = center()
        alignment.info |= encoder_facts(fitted)
        with pytest.warns(UserWarning, match=f"at {fitted.n_frames} frames, and here it looks at {same.n_frames}"):
            QualityReward(same, alignment)
        with pytest.raises(ValueError, match="another encoder"):
            QualityReward(different, alignment)


class Wrapped:
    """An encoder that is no module."""

    def __init__(self, model: TinyEncoder) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_an_encoder_whose_weights_cannot_be_read_has_no_digest(tmp_path: Path) -> None:
    """Its class alone would say that two of them are one."""
    encoder = Wrapped(tiny_encoder())
    assert encoder_facts(encoder) == {"encoder": "Wrapped", "encoder_frames": 9}
    with pytest.raises(TypeError, match=r"model is a Wrapped, expected an nn\.Module"):
        encoder_digest(encoder)
    alignment = center()
    alignment.info |= encoder_facts(encoder)
    with pytest.warns(UserWarning, match="does not say with which encoder"):
        QualityReward(encoder, Alignment.load(alignment.save(tmp_path / "map.safetensors")))
    with pytest.raises(ValueError, match=r"got Wrapped of weights that cannot be read"):
        QualityReward(encoder, center(SAME))


def test_alignments_without_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file: a warning, as nobody knows; of this process: nothing. No weight is read for either."""
    digest = "pisces.ot_map.encoder_digest.encoder_digest"
    monkeypatch.setattr(digest, lambda *_, **__: pytest.fail("weights were read"))
    model = tiny_encoder()
    torch.save(NeuralOTMap(8, hidden=16).state_dict(), tmp_path / "authors.pt")
    center().save(tmp_path / "older.safetensors")
    for name in ("authors.pt", "older.safetensors"):
        with pytest.warns(UserWarning, match=rf"{name} does not say with which encoder"):
            QualityReward(model, Alignment.load(tmp_path / name))
    Alignment("none").save(tmp_path / "none.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QualityReward(model, center())
        QualityReward(model, Alignment.load(tmp_path / "none.safetensors"))
        QualityReward(model)
