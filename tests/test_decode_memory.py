"""Peak memory of chunked decoding with gradient, against autograd through the class's own decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from meter import memory_meter
from tiny_vaes import build, own_decode
from torch import Tensor

import pisces.decode.replay as replay
from pisces.decode import decode, ltx

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {
    "wan": {
        "base_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 8,
    },
    "cogvideox": {
        "block_out_channels": (8, 16, 16, 32),
        "layers_per_block": 3,
        "norm_num_groups": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    },
    "hunyuan": {"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4},
    "ltx": {
        "block_out_channels": (8, 16, 32, 32),
        "decoder_block_out_channels": (8, 16, 32, 32),
        "decoder_layers_per_block": (2, 2, 2, 2, 2),
        "spatio_temporal_scaling": (True, True, True, False),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "patch_size": 1,
    },
}
FRAME_BYTES = 2 * 3 * 24 * 24 * 4  # of one frame of the 3 x 3 latents below, in float32


@cache
def peak(name: str, n_latents: int, function: Callable[..., Tensor], **options: Any) -> int:
    """Most bytes alive while the gradient of a loss of the frames is computed."""
    vae = build(name, seed=0, dtype=torch.float32, **WIDE[name])
    # Two videos: for one, the CPU unfolds the largest convolutions into a buffer that outweighs a chunk.
    latents = torch.randn(2, 4, n_latents, 3, 3, requires_grad=True)
    with memory_meter() as memory:
        torch.autograd.grad(function(vae, latents, **options).square().mean(), latents)
    return memory.peak


@pytest.fixture
def host_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory that the meter does not see, as it is beside a device: files."""
    numbers = iter(range(10**6))

    def store(tensor: Tensor) -> Tensor:
        path = tmp_path / f"{next(numbers)}.bin"
        tensor.numpy().tofile(path)
        return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=tuple(tensor.shape)))

    monkeypatch.setattr(replay, "to_host", store)
    monkeypatch.setattr(replay, "to_device", lambda tensor, device: tensor.clone())


def slope(name: str, function: Callable[..., Tensor], **options: Any) -> float:
    """Bytes a frame between 33 and 65 frames, beyond the pixels: the frames, their gradient and the loss' square."""
    growth = peak(name, 17, function, **options) - peak(name, 9, function, **options)
    return growth / 32 - 3 * FRAME_BYTES


@pytest.mark.parametrize("states", ["sqrt", "offload"])
def test_memory_hardly_grows_with_the_length_of_a_wan_video(states: str, host_in_files: None) -> None:
    assert slope("wan", decode, states=states) < 0.05 * slope("wan", own_decode)


def test_memory_of_kept_caches_grows() -> None:
    """The control: the comparison above can fail."""
    assert slope("wan", decode, states="keep") > 0.05 * slope("wan", own_decode)


def test_memory_of_tiles_in_time_is_flat() -> None:
    assert slope("hunyuan", decode) < 0.01 * slope("hunyuan", own_decode)


def test_memory_of_a_wan_video_of_65_frames() -> None:
    plain = peak("wan", 17, own_decode)
    assert peak("wan", 17, decode) < plain / 7
    assert peak("wan", 17, decode, checkpoint=True) < plain / 10


def test_memory_of_a_cogvideox_video_of_65_frames() -> None:
    assert peak("cogvideox", 17, decode, states="keep") < peak("cogvideox", 17, own_decode) / 4


def test_memory_of_an_ltx_video_of_65_frames() -> None:
    """Its decoder lags behind by more latents than there are: what waits comes out bit by bit."""
    assert peak("ltx", 9, decode) < peak("ltx", 9, own_decode) / 2


def test_no_step_writes_more_frames_than_a_latent_has() -> None:
    vae = build("ltx", seed=0, dtype=torch.float32, **WIDE["ltx"])
    for n_latents in (1, 2, 9, 30):
        stream, _ = ltx.stream(vae, torch.zeros(1, 4, n_latents, 3, 3), None)
        assert sum(stream.counts) == 8 * n_latents - 7
        assert max(stream.counts) <= 8


def test_memory_of_unwanted_frames_is_free() -> None:
    """Chunks behind the chosen frames are not decoded, the other frames are not kept."""
    assert peak("wan", 17, decode, frames=(0,)) < 1.15 * peak("wan", 1, decode)


def test_memory_is_free_after_the_backward_pass() -> None:
    vae = build("wan", seed=0, dtype=torch.float32, **WIDE["wan"])
    latents = torch.randn(1, 4, 9, 4, 4, requires_grad=True)
    frames = decode(vae, latents, states="keep")
    (node,) = (frames.grad_fn,)
    assert node is not None
    assert node.saved.caches  # type: ignore[attr-defined]
    torch.autograd.grad(frames.square().mean(), latents)
    assert not node.saved.caches  # type: ignore[attr-defined]
