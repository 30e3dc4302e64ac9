"""A folder of embeddings filled for `test_embeddings`, as a script in several processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_encoder import tiny_encoder

from pisces.data import VideoFolder
from pisces.ot_map import embeddings
from pisces.processes import Processes, join_processes


def main(videos: Path, folder: Path) -> None:
    """Embed this process's share; the first one waits for all and says how many pairs there are."""
    torch.set_num_threads(1)
    join_processes()
    embeddings.BATCH_SIZE = 2
    model, processes = tiny_encoder(), Processes()
    opened = VideoFolder(videos, n_frames=model.n_frames, size=model.size)
    embeddings.extract(folder, opened, model, shard_pairs=4, processes=processes)
    if processes.is_main:
        embeddings.wait_for_shards(folder, seconds=0.05, patience=100)
        print(processes.count, len(embeddings.read_embeddings(folder)[0]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
