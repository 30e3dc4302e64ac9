"""Encoder directories that are damaged: an error in the user's words that names the file, never one of a library."""

from __future__ import annotations

import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import tiny_encoder
from tiny_internvideo2 import SMALL, VOCABULARY, official_state, save_official, small_model
from tiny_transformers import save_tiny
from typer.testing import CliRunner

from pisces.cli import app
from pisces.encoders import load_encoder
from pisces.ot_map import Alignment
from pisces.tensor_files import read_tensors
from pisces.video import write_video

pytestmark = pytest.mark.usefixtures("plain_terminal", "one_thread")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>" + b"x" * 500 + b"</body></html>"
WEIGHTS = {"tiny": "model.safetensors", "internvideo2": "model.pt", "clip": "model.safetensors"}
WEIGHTS |= {"xclip": "model.safetensors", "blip": "model.safetensors"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound directory of each kind."""
    root = tmp_path_factory.mktemp("whole")
    tiny_encoder().save_pretrained(root / "tiny")
    (root / "internvideo2").mkdir()
    save_official(small_model().float(), root / "internvideo2" / "model.pt")
    (root / "internvideo2" / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    (root / "internvideo2" / "config.json").write_text(json.dumps({"model_type": "internvideo2", **vars(SMALL)}))
    for name in ("clip", "xclip", "blip"):
        save_tiny(name, root / name)
    return root


@pytest.fixture
def folder(kind: str, whole: Path, tmp_path: Path, seed: int) -> Path:
    """A copy to damage, which loads while it is not."""
    shutil.copytree(whole / kind, tmp_path / kind)
    load_encoder(tmp_path / kind)
    return tmp_path / kind


def refused(load: Callable[[], object], *parts: str, kind: type[Exception] = ValueError) -> None:
    """`load` raises an error of exactly this kind; all parts are in it and none of torch's advice in its traceback."""
    with pytest.raises(kind) as got:
        load()
    assert type(got.value) is kind, got.value
    for part in parts:
        assert part in str(got.value), (part, str(got.value))
    assert "weights_only" not in "".join(traceback.format_exception(got.value))


def cut(file: Path) -> None:
    """Leave the beginning of a file, as a download that broke off does."""
    file.write_bytes(file.read_bytes()[: random.randrange(1, file.stat().st_size)])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_none_are_named(kind: str, folder: Path) -> None:
    file = folder / WEIGHTS[kind]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(lambda: load_encoder(folder), str(file), "damaged, cut short or no", "Download it again.")
    for _ in range(3):
        file.write_bytes(content)
        cut(file)
        refused(lambda: load_encoder(folder), str(file), "damaged, cut short or no", "Download it again.")
    file.write_bytes(random.randbytes(2000))
    refused(lambda: load_encoder(folder), str(file), "damaged, cut short or no")
    for bytes_, what in ((POINTER, "a Git-LFS pointer"), (PAGE, "a web page"), (b"", "is empty")):
        file.write_bytes(bytes_)
        refused(lambda: load_encoder(folder), str(file), what, "again.")
    file.unlink()
    refused(lambda: load_encoder(folder), str(folder), "model.safetensors" if kind == "tiny" else "weights",
            kind=FileNotFoundError)  # fmt: skip
    file.write_bytes(content)
    load_encoder(folder)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_config_that_is_none_is_named(kind: str, folder: Path) -> None:
    file = folder / "config.json"
    content = file.read_bytes()
    for bytes_, what in (
        (content[: len(content) // 2], "no JSON file"),
        (b"", "is empty"),
        (POINTER, "a Git-LFS pointer"),
        (PAGE, "a web page"),
        (b"\xff\xfe\x00", "no text file"),
        (b"[" * 100_000, "no JSON file"),
        (b"[1, 2]", "a JSON list, expected an object"),
        (b'"internvideo2"', "a JSON str, expected an object"),
    ):
        file.write_bytes(bytes_)
        refused(lambda: load_encoder(folder), str(file), what, "again.")
    for strange in (None, 3, ["clip"], {}):
        file.write_text(json.dumps({"model_type": strange}))
        refused(lambda: load_encoder(folder), f"{file} has model_type {strange!r}, expected one of")


@pytest.mark.parametrize("kind", ["clip", "xclip", "blip"])
def test_a_directory_of_transformers_with_other_damage_is_named(kind: str, folder: Path) -> None:
    for name, what in (("tokenizer.json", "tokenizer"), ("preprocessor_config.json", "image processor")):
        content = (folder / name).read_bytes()
        for bytes_ in (content[: len(content) // 2], POINTER, PAGE, b"[]"):
            (folder / name).write_bytes(bytes_)
            refused(lambda name=name: load_encoder(folder), str(folder / name), "again.")  # type: ignore[misc]
        (folder / name).unlink()
        refused(lambda: load_encoder(folder), f"{folder} has no {what}", kind=FileNotFoundError)
        (folder / name).write_bytes(content)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vision_config": 3}))
    refused(lambda: load_encoder(folder), f"{kind}", "transformers cannot read the weights", "config.json")
    file.write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    load_encoder(folder)
    for damage in (POINTER, PAGE, (folder / "pytorch_model.bin").read_bytes()[:3000]):
        (folder / "pytorch_model.bin").write_bytes(damage)
        refused(lambda: load_encoder(folder), "pytorch_model.bin", "again.")


def change(file: Path, **settings: Any) -> None:
    """Change entries of a JSON file; None takes one out."""
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", ["tiny"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widht": 3}, "has the unknown ['widht'], expected some of"),
        ({"vocabulary": None}, "has no vocabulary, expected a list of words"),
        ({"vocabulary": 3}, "has no vocabulary"),
        ({"vocabulary": ["[pad]", "[unk]", "[sep]", 3]}, "has no vocabulary"),
        ({"vocabulary": ["[pad]", "dot"]}, "vocabulary starts with"),
        ({"width": 32}, "of another shape: place has shape (1, 1, 16, 16), expected (1, 1, 16, 32)"),
        ({"width": "16"}, "width is '16', expected an integer"),
        ({"heads": 0}, "heads is 0, expected an integer"),
        ({"n_frames": 9.0}, "n_frames is 9.0, expected an integer"),
        ({"temperature": "warm"}, "temperature is 'warm', expected a positive number"),
        ({"fusion_layers": 3}, "missing: fusion_blocks.2."),
        ({"fusion_layers": 1}, "unexpected: fusion_blocks.1."),
    ],
)
def test_settings_of_a_tiny_encoder_that_do_not_fit_are_named(
    kind: str, folder: Path, settings: dict[str, Any], words: str
) -> None:
    change(folder / "config.json", **settings)
    refused(lambda: load_encoder(folder), str(folder), words)


@pytest.mark.parametrize("kind", ["internvideo2"])
def test_settings_and_words_of_internvideo2_that_do_not_fit_are_named(kind: str, folder: Path) -> None:
    file = folder / "config.json"
    content = file.read_bytes()
    for settings, words in (
        ({"dtype": ["float32"]}, "dtype is ['float32']"),
        ({"text_heads": "2"}, "text_heads is '2', expected an integer"),
        ({"gelu": [1]}, "gelu is [1]"),
    ):
        change(file, **settings)
        refused(lambda: load_encoder(folder), str(file), words)
        file.write_bytes(content)
    change(file, pool_width=24)
    refused(lambda: load_encoder(folder), "of another shape: vision_encoder.")
    file.write_bytes(content)
    for bytes_, words in ((POINTER, "has no ['[PAD]'"), (PAGE, "has no ['[PAD]'"), (b"\xff\xfe", "no text file")):
        (folder / "vocab.txt").write_bytes(bytes_)
        refused(lambda: load_encoder(folder), str(folder / "vocab.txt"), words)
    # the other format
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    (folder / "model.pt").unlink()
    weights = folder / "model.safetensors"
    save_file(official_state(small_model().float()), weights)
    load_encoder(folder)
    cut(weights)
    refused(lambda: load_encoder(folder), str(weights), "no safetensors file")


def test_files_of_tensors_in_both_layouts_of_torch(tmp_path: Path, seed: int) -> None:
    tensors = {"a": torch.randn(30, 4), "b": torch.randn(7)}
    file = tmp_path / "some.pt"
    for archive in (True, False):
        for content in (tensors, {"module": tensors, "step": 3}):
            torch.save(content, file, _use_new_zipfile_serialization=archive)
            got = read_tensors(file, "test", under="module")
            assert all(torch.equal(got[name], value) for name, value in tensors.items())
        for _ in range(20):
            torch.save(tensors, file, _use_new_zipfile_serialization=archive)
            cut(file)
            # without an archive around them a class's name may be what was cut, and then it is that which is named
            refused(lambda: read_tensors(file, "test"), f"test: {file}", "damaged, cut" if archive else "expected")
        torch.save({**tensors, "code": small_model}, file, _use_new_zipfile_serialization=archive)
        refused(lambda: read_tensors(file, "test"), "tiny_internvideo2.small_model", "expected nothing but tensors")
    torch.save({"a": torch.zeros(1), "step": 3}, file)
    refused(lambda: read_tensors(file, "test", under="module"), "'step', a int", "at its top or under 'module'")
    torch.save([torch.zeros(1)], file)
    refused(lambda: read_tensors(file, "test"), "holds a list, expected named tensors")
    refused(lambda: read_tensors(tmp_path, "test"), "no file", kind=FileNotFoundError)


@pytest.mark.parametrize("name", ["map.pt", "map.safetensors"])
def test_maps_are_read_as_carefully(name: str, tmp_path: Path, seed: int) -> None:
    for content, what in ((POINTER, "a Git-LFS pointer"), (PAGE, "a web page"), (random.randbytes(999), "no")):
        (tmp_path / name).write_bytes(content)
        refused(lambda: Alignment.load(tmp_path / name), f"Alignment.load: {tmp_path / name}", what, "again.")


@pytest.mark.parametrize("kind", ["tiny", "internvideo2", "blip"])
def test_the_command_line_says_it_in_one_sentence(kind: str, folder: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "x.mp4", torch.rand(5, 3, 32, 32))

    def score() -> tuple[int, list[str]]:
        words = ["score", "--encoder", folder, "--video", video, "--prompt", "a red dog"]
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        return result.exit_code, result.stderr.strip().splitlines()

    assert score() == (0, [])
    config = (folder / "config.json").read_bytes()
    for name in ("config.json", WEIGHTS[kind]):
        for content in (POINTER, PAGE, b"{"):
            (folder / name).write_bytes(content)
            code, lines = score()
            assert (code, len(lines)) == (2, 1), lines
            assert lines[0].startswith("pisces: ")
            assert str(folder / name) in lines[0]
        (folder / "config.json").write_bytes(config)
