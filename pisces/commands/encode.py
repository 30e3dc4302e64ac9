"""`pisces encode`: latents and prompt embeddings of a training run, computed ahead of it."""

from __future__ import annotations

from rich.console import Console
from tqdm import tqdm

from pisces.batches import VideoBatches
from pisces.build import build_adapter, build_batches, build_cache, validation_prompts
from pisces.config import TrainConfig
from pisces.data import VideoReadError


def encode(config: TrainConfig) -> int:
    """Fill the folder ``data.cache`` with all that training looks up there; what is there is skipped.

    Args:
        config: of the training run.

    Returns:
        How many videos could not be read; they are named on stderr.

    Raises:
        ValueError: ``data.cache`` is not set, or no video can be read.
    """
    adapter = build_adapter(config)
    cache = build_cache(config, adapter)
    if cache is None:
        raise ValueError("encode: data.cache is not set. Name a folder: --set data.cache=runs/cache.")
    batches = build_batches(config, adapter, cache)
    # the empty one: of captions that are dropped, and of guidance
    prompts = list(dict.fromkeys([*batches.texts, *validation_prompts(config, batches), ""]))
    for prompt in tqdm(prompts, desc="prompts", unit="prompt", disable=None):
        adapter.encode_prompts([prompt])
    n_videos, n_unreadable = 0, 0
    errors = Console(stderr=True, soft_wrap=True)
    if isinstance(batches, VideoBatches):
        n_videos = len(batches.texts)
        for item in tqdm(range(n_videos), desc="videos", unit="video", disable=None):
            try:
                batches.latents(item)
            except VideoReadError as error:
                n_unreadable += 1
                errors.print(f"pisces: skipped {error.path}: {error.why}", markup=False, highlight=False)
        if n_unreadable == n_videos:
            raise ValueError(f"encode: none of the {n_videos} videos in {config.data.videos!r} could be read.")
    if n_unreadable:
        errors.print(f"pisces: {n_unreadable} of {n_videos} videos could not be read")
    n_there = len(prompts) + n_videos - n_unreadable - cache.n_written
    Console().print(
        f"{cache.folder}: {len(prompts)} prompts and {n_videos - n_unreadable} videos, of which {n_there} were there",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return n_unreadable
