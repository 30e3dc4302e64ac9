"""InternVideo2: the layout of its checkpoint, strict loading, directories, positions in time."""

from __future__ import annotations

import json
import math
import random
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_internvideo2 import SMALL, VOCABULARY, official_state, save_official, small_model, some_frames, some_prompts
from torch import Tensor

from pisces.encoders import InternVideo2, InternVideo2Config, load_encoder
from pisces.encoders.internvideo2.checkpoint import UNUSED, interpolate_positions

OFFICIAL_VISION = json.loads((Path(__file__).parent / "data" / "internvideo2_vision_keys.json").read_text())
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


pytestmark = pytest.mark.usefixtures("one_thread")


def official_text() -> dict[str, tuple[int, ...]]:
    """bert-large-uncased with cross-attention to 1,408 features in its last five layers, and the heads."""
    d, hidden = 1024, 4096
    shapes: dict[str, tuple[int, ...]] = {
        "text_encoder.bert.embeddings.position_ids": (1, 512),
        "text_encoder.bert.embeddings.word_embeddings.weight": (30522, d),
        "text_encoder.bert.embeddings.position_embeddings.weight": (512, d),
        "text_encoder.bert.embeddings.token_type_embeddings.weight": (2, d),
        "text_proj.weight": (512, d),
        "text_proj.bias": (512,),
        "vision_proj.weight": (512, 768),
        "vision_proj.bias": (512,),
        "itm_head.weight": (2, d),
        "itm_head.bias": (2,),
        "temp": (),
    }
    norms = ["text_encoder.bert.embeddings.LayerNorm"]
    for i in range(24):
        layer = f"text_encoder.bert.encoder.layer.{i}"
        linears = {"intermediate.dense": (hidden, d), "output.dense": (d, hidden)}
        for kind, context in (("attention", d), ("crossattention", 1408)) if i >= 19 else (("attention", d),):
            linears |= {f"{kind}.self.query": (d, d), f"{kind}.output.dense": (d, d)}
            linears |= {f"{kind}.self.{part}": (d, context) for part in ("key", "value")}
            norms.append(f"{layer}.{kind}.output.LayerNorm")
        for name, (out, into) in linears.items():
            shapes |= {f"{layer}.{name}.weight": (out, into), f"{layer}.{name}.bias": (out,)}
        norms.append(f"{layer}.output.LayerNorm")
    return shapes | {f"{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}


def test_the_official_model_has_the_names_and_shapes_of_its_checkpoint() -> None:
    official = {f"vision_encoder.{name}": tuple(shape) for name, shape in OFFICIAL_VISION.items()}
    assert len(official) == 569
    assert sum(map(math.prod, official.values())) == 1_049_117_056
    unused = {name for name in official if name.startswith(UNUSED)}
    named = {"clip_pos_embed", "clip_img_pos_embed", "img_pos_embed"}
    assert {name.split(".")[1] for name in unused} == named | {"clip_decoder", "final_clip_decoder"}
    with torch.device("meta"):
        model = InternVideo2()
    assert all(p.is_meta for p in model.parameters())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {name: shape for name, shape in official.items() if name not in unused} | official_text()
    assert sum(p.numel() for p in model.vision_encoder.parameters()) == 1_049_117_056 - 29_850_240 == 1_019_266_816
    assert (model.n_frames, model.size, model.embed_dim) == (4, 224, 512)
    assert model.config.grid.n_tokens == 1025


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_checkpoint_with_its_unused_heads_loads(tmp_path: Path, ending: str) -> None:
    model = small_model()
    if ending == "pt":
        path = save_official(model, tmp_path / "model.pt", optimizer={"lr": 1e-3})
    else:
        path = tmp_path / "model.safetensors"
        save_file(official_state(model), path)
    loaded = InternVideo2.from_checkpoint(path, VOCABULARY, config=SMALL, dtype=torch.float64)
    assert not loaded.training
    with path.open("r+b") as file:  # nothing is left in it
        file.write(bytes(path.stat().st_size))
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    frames, prompts = some_frames(2), some_prompts(2)
    values = [m.match(m.encode_text(prompts), m.encode_video(frames)) for m in (model, loaded)]
    assert torch.equal(*values)
    half = InternVideo2.from_checkpoint(save_official(model, tmp_path / "again.pt"), config=SMALL, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.text_encoder["bert"].embeddings.position_ids.dtype == torch.int64


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model = small_model()

    def load(state: dict[str, Tensor]) -> InternVideo2:
        torch.save({"module": state}, tmp_path / "model.pt")
        return InternVideo2.from_checkpoint(tmp_path / "model.pt", config=SMALL)

    load({name: value for name, value in official_state(model).items() if not name.startswith(UNUSED)})
    for name in random.sample(sorted(model.state_dict()), 3):
        state = official_state(model)
        value = state.pop(name)
        with pytest.raises(ValueError, match=rf"1 missing: {name}"):
            load(state)
        with pytest.raises(ValueError, match=rf"1 missing: {name}; 1 unexpected: {name}\.old"):
            load(state | {f"{name}.old": value})
        with pytest.raises(ValueError, match=rf"1 of another shape: {name} has shape .*, expected \("):
            load(state | {name: torch.zeros(2, 3, 5)})
    with pytest.raises(ValueError, match=r"1 unexpected: vision_encoder\.clip_decoders\.weight"):
        load(official_state(model) | {"vision_encoder.clip_decoders.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: .*, \.\.\."):  # the official sizes
        InternVideo2.from_checkpoint(tmp_path / "model.pt")
    # As many positions, but in pictures of another size.
    twice = replace(SMALL, size=2 * SMALL.size, n_frames=1)
    torch.save({"module": official_state(model)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="patches a frame, expected"):
        InternVideo2.from_checkpoint(tmp_path / "model.pt", config=twice)
    with pytest.raises(FileNotFoundError, match="no file"):
        InternVideo2.from_checkpoint(tmp_path / "nowhere.pt")
    torch.save({"module": {"temp": "warm"}}, tmp_path / "words.pt")
    with pytest.raises(ValueError, match="something else than named tensors"):
        InternVideo2.from_checkpoint(tmp_path / "words.pt")
    torch.save({"module": {}, "trainer": small_model}, tmp_path / "code.pt")
    # code in a checkpoint is not run, nor is torch's advice to run it passed on
    with pytest.raises(
        ValueError, match=r"code\.pt holds a tiny_internvideo2\.small_model, expected nothing but"
    ) as got:
        InternVideo2.from_checkpoint(tmp_path / "code.pt")
    assert "weights_only" not in "".join(traceback.format_exception(got.value))


def test_positions_are_interpolated_linearly_in_time(tmp_path: Path) -> None:
    cls, grid = torch.randn(1, 1, 5, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    positions = torch.cat([cls, grid.flatten(0, 1)[None]], dim=1)
    assert interpolate_positions(positions, 4, 6) is positions
    for n in (1, 2, 3, 8, 26):
        got = interpolate_positions(positions, n, 6)
        assert got.shape == (1, 1 + 6 * n, 5)
        assert torch.equal(got[:, :1], cls)
        for i, frame in enumerate(got[0, 1:].unflatten(0, (n, 6))):
            place = min(max((i + 0.5) * 4 / n - 0.5, 0.0), 3.0)
            low = min(int(place), 2)
            want = grid[low] + (place - low) * (grid[low + 1] - grid[low])
            torch.testing.assert_close(frame, want, **DOUBLE)
    model = small_model()
    path = save_official(model, tmp_path / "model.pt")
    loaded = InternVideo2.from_checkpoint(path, config=replace(SMALL, n_frames=7), dtype=torch.float64)
    want = interpolate_positions(model.vision_encoder.pos_embed, 7, 4)
    assert torch.equal(loaded.vision_encoder.pos_embed, want)
    assert loaded.encode_video(some_frames(1)).tokens.shape[1] == 1 + 7 * 4


def test_a_directory_of_files_is_an_encoder(tmp_path: Path) -> None:
    model = small_model().float()
    save_official(model, tmp_path / "weights.pt")
    settings = {name: value for name, value in vars(SMALL).items() if value != vars(InternVideo2Config())[name]}
    config = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(tmp_path)
    config.write_text(json.dumps({"model_type": "internvideo2", **settings}))
    with pytest.raises(FileNotFoundError, match=r"no vocab\.txt"):
        load_encoder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    loaded = load_encoder(tmp_path)
    assert isinstance(loaded, InternVideo2)
    assert loaded.config == SMALL
    frames, prompts = some_frames(2).float(), some_prompts(2)
    values = [m.match(m.encode_text(prompts), m.encode_video(frames)) for m in (model, loaded)]
    assert torch.equal(*values)
    changed = {**settings, "model_type": "internvideo2", "n_frames": 8, "checkpoint": True, "dtype": "bfloat16"}
    config.write_text(json.dumps(changed))
    loaded = load_encoder(tmp_path)
    assert loaded.vision_encoder.checkpoint
    assert loaded.n_frames == 8
    assert loaded.temp.dtype == torch.bfloat16
    for bad, words in (({"widht": 3}, "widht"), ({"dtype": "int8"}, "dtype"), ({"size": 30}, "patch_size")):
        config.write_text(json.dumps(changed | bad))
        with pytest.raises(ValueError, match=words):
            load_encoder(tmp_path)
    config.unlink()
    with pytest.raises(
        ValueError, match="21 word pieces, expected 30522"
    ):  # without config.json it is the official one
        load_encoder(tmp_path)
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ValueError, match="expected one file of weights"):
        load_encoder(tmp_path)
    for path in (tmp_path / "other.safetensors", tmp_path / "weights.pt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_frames": 0}, "n_frames is 0"),
        ({"n_frames": True}, "n_frames is True, expected an integer"),
        ({"size": 28.0}, "size is 28.0, expected an integer"),
        ({"checkpoint": "false"}, "checkpoint is 'false', expected true or false"),
        ({"checkpoint": 1}, "checkpoint is 1, expected true or false"),
        ({"size": 30}, "size 30 is not a multiple of patch_size 14"),
        ({"vision_heads": 5}, "vision_heads 5"),
        ({"pool_heads": 5}, "pool_heads 5"),
        ({"text_heads": 3}, "text_heads 3"),
        ({"max_tokens": 40}, "text_positions"),
        ({"embedding_tokens": 20}, "embedding_tokens"),
        ({"gelu": "fast"}, "gelu is 'fast'"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)
