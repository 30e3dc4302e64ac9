"""Reading the official checkpoint: what it holds, what of it is used, positions for other numbers of frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pisces.tensor_files import check_fit, read_tensors

UNUSED = (
    "vision_encoder.clip_decoder.",  # heads of the distillation
    "vision_encoder.final_clip_decoder.",
    "vision_encoder.clip_pos_embed",  # positions for them
    "vision_encoder.clip_img_pos_embed",
    "vision_encoder.img_pos_embed",  # positions of single images, which rewards never see
    "text_encoder.cls.",  # the head of masked language modelling
)
"""Beginnings of the names in the official checkpoint that no reward needs."""

WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
"""Endings of files that `read_weights` reads."""

_POSITIONS = "vision_encoder.pos_embed"
_PICTURE_POSITIONS = "vision_encoder.img_pos_embed"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by name, on the CPU.

    Args:
        path: a .safetensors file, or one of torch.save with the tensors under "module" or at the top. Nothing but
            tensors and plain containers is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or something else than tensors in it.
    """
    return read_tensors(path, "InternVideo2", under="module")


def interpolate_positions(positions: Tensor, n_frames: int, patches: int) -> Tensor:
    """Position embeddings for another number of frames: linear in time, place by place; the CLS token keeps its own.

    Frame i of n lies at (i + 1/2) F / n - 1/2 among the F frames of `positions`, not beyond the first or last.

    Args:
        positions: [1, 1 + F patches, D], CLS first.
        n_frames: frames wanted.
        patches: tokens of a frame.

    Returns:
        [1, 1 + n_frames patches, D]; `positions` itself where it has as many frames.

    Example:
        >>> positions = torch.tensor([7.0, 0.0, 1.0, 2.0, 3.0]).view(1, 5, 1)
        >>> interpolate_positions(positions, 2, 1).flatten().tolist()
        [7.0, 0.5, 2.5]
    """
    cls, grid = positions[:, :1], positions[:, 1:]
    if grid.shape[1] == n_frames * patches:
        return positions
    wide = torch.promote_types(positions.dtype, torch.float32)
    grid = rearrange(grid.to(wide), "1 (f p) d -> p d f", p=patches)
    grid = F.interpolate(grid, size=n_frames, mode="linear", align_corners=False)
    return torch.cat([cls, rearrange(grid, "p d f -> 1 (f p) d").to(positions.dtype)], dim=1)


def fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], n_frames: int, patches: int) -> dict[str, Tensor]:
    """What a model wants of a checkpoint, every name and shape checked.

    Args:
        state: tensors of the checkpoint; those that begin as `UNUSED` says are left out.
        wanted: state of the model, for its names and shapes.
        n_frames, patches: of the model; positions are interpolated in time to these.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs; the message says which.
    """
    used = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
    positions = used.get(_POSITIONS)
    picture = state.get(_PICTURE_POSITIONS)
    other_size = []
    if picture is not None and picture.dim() == 3 and picture.shape[1] - 1 != patches:
        # Four frames of 16 x 16 patches are as many positions as one of 32 x 32.
        other_size = [f"{_POSITIONS} has {picture.shape[1] - 1} patches a frame, expected {patches} for this size"]
    if (
        positions is not None
        and positions.dim() == 3
        and len(positions) == 1
        and positions.shape[1] > 1
        and (positions.shape[1] - 1) % patches == 0
    ):
        used[_POSITIONS] = interpolate_positions(positions, n_frames, patches)
    check_fit(
        used,
        wanted,
        "InternVideo2: the checkpoint",
        also=other_size,
        do="Use a stage-2 checkpoint of the sizes in the configuration.",
    )
    return used
