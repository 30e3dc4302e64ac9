"""Run the demo in small, as a user would, without a network, and check what the judge says of its result."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 2
LIMIT_SECONDS = 180
GAIN_OVER_BASE = 0.10
GAIN_OVER_FURTHER_PRETRAINING = 0.05


def main() -> None:
    """Exit with an error if the demo is slow, leaves traces outside its folder, or does not improve the generator."""
    with tempfile.TemporaryDirectory() as scratch:
        home, temporary, output = (Path(scratch, name) for name in ("home", "temporary", "output"))
        home.mkdir()
        temporary.mkdir()
        guard = str(ROOT / "tests" / "no_network")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL"))},
            "HOME": str(home),
            "PYTHONPATH": guard,
            "TMPDIR": str(temporary),
            # 24 steps amplify rounding: the gain of one seed is anything from .08 to .16. Hence the mean of two
            # seeds; one thread makes the run the same on machines of any number of cores.
            "OMP_NUM_THREADS": "1",
        }
        started = time.monotonic()
        command = [
            str(Path(sys.executable).parent / "pisces"),
            "demo",
            "--smoke",
            "--seeds",
            str(SEEDS),
            "--output",
            str(output),
        ]
        subprocess.run(command, env=environment, cwd=home, check=True)
        seconds = time.monotonic() - started
        # torch makes an empty folder for its compiler's cache
        left = [*home.rglob("*"), *(path for path in temporary.rglob("*") if path.is_file())]
        check(not left, f"files outside the output folder: {left}")
        check(seconds < LIMIT_SECONDS, f"took {seconds:.0f} s, expected under {LIMIT_SECONDS}")
        for name in ("index.html", "sheet.png", "curves.png", "table.md", "results.json"):
            check((output / name).stat().st_size > 0, f"{name} is empty")
        from pisces.world.demo import gain, load_results

        results = load_results(output)
        verdicts = results["judge"]
        check(verdicts["real"]["total"] > 0.97, f"the judge gives real videos {verdicts['real']}")
        for case in ("uniform noise", "grey noise", "blank"):
            check(verdicts[case]["total"] < 0.4, f"the judge gives {case} {verdicts[case]}")
        over_base, over_further = gain(results, over="base"), gain(results, over="further")
        print(
            f"judged total: {over_base:+.3f} over base, {over_further:+.3f} over further pre-training, {seconds:.0f} s"
        )
        check(over_base > GAIN_OVER_BASE, f"gain over base {over_base:.3f}, expected {GAIN_OVER_BASE}")
        check(over_further > GAIN_OVER_FURTHER_PRETRAINING, f"gain over further pre-training {over_further:.3f}")


def check(ok: bool, message: str) -> None:
    """Stop with a message."""
    if not ok:
        raise SystemExit(f"demo smoke: {message}")


if __name__ == "__main__":
    main()
