"""Writing the small world as a user would have it: a folder of mp4 files and their captions."""

from __future__ import annotations

from pathlib import Path

import torch

from pisces.data import write_metadata, write_video
from pisces.world.scene import Split, captions, corrupt_frames, corrupt_scenes, render, sample_scenes

FPS = 8


def write_dataset(
    path: str | Path,
    n: int,
    *,
    seed: int = 0,
    two_objects: float = 0.0,
    split: Split | None = None,
    fillers: float = 0.5,
    damage: float = 0.0,
    lies: float = 0.0,
) -> Path:
    """Write n captioned videos: `path/00000.mp4`, ... and `path/metadata.jsonl`.

    Args:
        path: the folder; made if missing. Files of the same names are replaced.
        n: number of videos, at least 1.
        seed: the same seed writes the same videos and captions.
        two_objects: probability of a second object.
        split: "train", "held_out" or None for all combinations.
        fillers: probability that a caption has filler words.
        damage: probability of each damage of `corrupt_frames`; with `lies` the folder is like a web crawl.
        lies: probability that an attribute in a caption is replaced by a random one.

    Returns:
        The folder, readable by `pisces.data.VideoFolder`.

    Raises:
        ValueError: n below 1, a bad probability or split.

    Example:
        >>> import tempfile
        >>> from pisces.data import VideoFolder
        >>> len(VideoFolder(write_dataset(tempfile.mkdtemp(), 3)))
        3
    """
    folder = Path(path)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for start in range(0, max(n, 1), 256):
        scenes = sample_scenes(min(256, n - start), generator, two_objects=two_objects, split=split)
        videos = corrupt_frames(render(scenes, generator), generator, damage)
        texts = captions(corrupt_scenes(scenes, generator, lies), generator, fillers=fillers)
        for i, (frames, text) in enumerate(zip(videos, texts, strict=True), start):
            name = f"{i:05d}.mp4"
            write_video(folder / name, frames, fps=FPS)
            rows.append({"file_name": name, "text": text})
    write_metadata(folder, rows)
    return folder
