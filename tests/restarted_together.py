"""Two processes that start anew over an earlier run, which the main one deletes when the other waits for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from trained_together import build

from pisces import trainer as trainer_module
from pisces.processes import Processes, join_processes
from pisces.run_folder import clear


def meet(processes: Processes, waiting: Path) -> None:
    """Let the main process delete only once the other has come to the end of what it looks at before."""
    wait = processes.wait

    def wait_seen() -> None:
        waiting.touch()
        wait()

    def clear_late(folder: Path) -> None:
        deadline = time.monotonic() + 60
        while not waiting.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the other process does not come")
            time.sleep(0.01)
        clear(folder)

    if processes.is_main:
        trainer_module.clear = clear_late
    else:
        processes.wait = wait_seen  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes()
    trainer = build(Path(sys.argv[1]), Path(sys.argv[2]), "draft", 1)
    meet(trainer.processes, Path(sys.argv[2]) / "waiting")
    trainer.fit(resume="never")
    print(trainer.processes.gather_on_main(trainer.processes.rank))
