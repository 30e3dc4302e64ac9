"""Time and peak memory of the semantic reward from encoded videos on, beside the released loop: docs/reward/.

    python -m benchmarks.reward                          # 8, 26, 128 frames; 4 videos of 8: about an hour on a core
    python -m benchmarks.reward --calls 8x1 8x4          # some: frames x videos
    python -m benchmarks.reward --vision                 # InternVideo2's vision tower, which all have in common
    python -m benchmarks.reward --page                   # write the page again from what was measured

A call reads encoded videos [B, 1 + 256 T, 1408] and captions of 40 words with InternVideo2's fusion tower of official
size (5 layers, 16 heads, width 1024, random weights, float32) and gives log P(match); its gradient is that with respect
to the video tokens. Methods differ in what they do to the attention only. They take turns on one thread; the figure is
the median. Memory is the resident set's high-water mark in a process of its own, beyond weights and inputs.
A method whose gradient is wrong has no figure. What is measured already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.encoders import InternVideo2
from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures
from pisces.encoders.internvideo2.config import InternVideo2Config
from pisces.rewards import Transport, TransportRefiner
from pisces.tokens import TokenGrid
from pisces_kernels import transport_attention

from . import memory, peers
from .contender import Prepared
from .decode import write
from .machine import machine
from .problems import Tokens

Record = dict[str, Any]
CALLS = ("8x1", "8x4", "26x1", "128x1")
MODES = ("score", "gradient")
LOGIT_DEVIATION = (
    3.0  # of the attention's logits over the video tokens: attention that is peaked, as a trained one's is
)
TOLERANCE = 0.02
VISION = InternVideo2Config(n_frames=8, text_layers=1, fusion_layers=1, checkpoint=True)
ROUNDS, BUDGET_SECONDS = 7, 30.0


@dataclass(frozen=True)
class Sizes:
    """Of the fusion tower and its inputs; the defaults are the official ones."""

    width: int = 1024
    mlp: int = 4096
    heads: int = 16
    layers: int = 5
    video_width: int = 1408
    words: int = 40
    side: int = 16

    def config(self) -> InternVideo2Config:
        """An InternVideo2 whose other towers are as small as they can be: they are not called."""
        return InternVideo2Config(
            n_frames=1, size=14 * self.side, vision_width=self.video_width, vision_layers=1, vision_mlp=1,
            text_width=self.width, text_heads=self.heads, text_mlp=self.mlp, text_layers=1, fusion_layers=self.layers,
            vocabulary_size=1,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of the reward: the encoder and what it reads."""

    encoder: InternVideo2
    text: TextFeatures
    video: VideoFeatures

    def score(self, refine: AttentionRefiner | None) -> Tensor:
        """log P(match) [B]."""
        return F.logsigmoid(self.encoder.match(self.text, self.video, refine=refine))

    def gradient(self, refine: AttentionRefiner | None) -> Tensor:
        """Of the scores' sum with respect to the video tokens [B, M, D]."""
        tokens = self.video.tokens.detach().requires_grad_()
        video = VideoFeatures(tokens, self.video.embedding, self.video.frame_index, self.video.positions)
        score = F.logsigmoid(self.encoder.match(self.text, video, refine=refine))
        return torch.autograd.grad(score.sum(), tokens)[0]

    def run(self, mode: str, refine: AttentionRefiner | None) -> Tensor:
        """What is timed."""
        if mode == "gradient":
            return self.gradient(refine)
        with torch.no_grad():
            return self.score(refine)

    def double(self) -> Call:
        """The same in float64."""
        text = TextFeatures(self.text.tokens.double(), self.text.embedding, self.text.mask, self.text.lexical)
        video = VideoFeatures(
            self.video.tokens.double(), self.video.embedding, self.video.frame_index.double(),
            self.video.positions.double(),
        )  # fmt: skip
        encoder = InternVideo2(self.encoder.config).double().requires_grad_(False)
        encoder.load_state_dict(self.encoder.state_dict())
        return Call(encoder.eval(), text, video)


def make_call(frames: int, videos: int, sizes: Sizes | None = None) -> Call:
    """Random weights and inputs, the same every time."""
    sizes = sizes or Sizes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = InternVideo2(sizes.config()).eval().requires_grad_(False)
        grid = TokenGrid(frames, sizes.side, sizes.side, cls=True)
        tokens = torch.randn(videos, grid.n_tokens, sizes.video_width) + 0.5
        words = torch.randn(videos, sizes.words + 2, sizes.width)  # [CLS] and [SEP] around the caption
        lexical = torch.ones(videos, sizes.words + 2, dtype=torch.bool)
        lexical[:, 0] = lexical[:, -1] = False
        nothing = torch.empty(videos, 0)
        call = Call(
            encoder,
            TextFeatures(words, nothing, torch.ones_like(lexical), lexical),
            VideoFeatures(tokens, nothing, grid.frame_index(), grid.positions()),
        )
        for layer in encoder.text_encoder["bert"].encoder["layer"][-sizes.layers :]:
            _sharpen(layer.crossattention, words, tokens)
    return call


def _sharpen(attention: Any, words: Tensor, tokens: Tensor) -> None:
    """Scale the queries until the logits of a layer vary by `LOGIT_DEVIATION`."""
    query, key = attention.self.query, attention.self.key
    q = query(words[0]).unflatten(-1, (attention.heads, -1))
    k = key(tokens[0, :512]).unflatten(-1, (attention.heads, -1))
    logits = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    scale = LOGIT_DEVIATION / logits.std(-1).mean()
    query.weight.mul_(scale)
    query.bias.mul_(scale)


def pair_by_pair(contender: Callable[[Tokens], Prepared]) -> AttentionRefiner:
    """A contender of the attention workload as a hook: the words of one video after the other."""

    def refine(
        query: Tensor, key: Tensor, attention: Tensor, frame_index: Tensor, positions: Tensor, lexical: Tensor
    ) -> Tensor:
        refined = []
        for b, words in enumerate(lexical):
            rows = words.nonzero()[:, 0]
            pair = Tokens(query[b : b + 1, rows], key[b : b + 1], attention[b : b + 1, :, rows], frame_index, positions)
            refined.append(attention[b].index_copy(1, rows, contender(pair).call()[0]))
        return torch.stack(refined)

    return refine


OURS, PLAIN, OFFICIAL = "ours", "attention as it is", "official loop"
METHODS: dict[str, Callable[[], AttentionRefiner | None]] = {
    PLAIN: lambda: None,
    OURS: lambda: TransportRefiner(Transport()),
    "torch.compile, all heads at once": lambda: pair_by_pair(
        partial(peers.torch_attention, compile_it=True, exponentials=False)
    ),
    "torch, all heads at once": lambda: pair_by_pair(
        partial(peers.torch_attention, compile_it=False, exponentials=False)
    ),
    OFFICIAL: lambda: pair_by_pair(peers.official_attention),
}


def exact(
    query: Tensor, key: Tensor, attention: Tensor, frame_index: Tensor, positions: Tensor, lexical: Tensor
) -> Tensor:
    """The hook's truth: the reference back end at its fixed point, a head at a time as it needs much memory."""
    heads = [
        transport_attention(
            query, key, attention[:, h : h + 1], frame_index, positions, row_mask=lexical, epsilon=0.05, tau=0.9,
            tol=1e-8, max_iters=2000, backend="reference",
        )
        for h in range(attention.shape[1])
    ]  # fmt: skip
    return torch.cat(heads, dim=1)


def errors(call: Call, names: Sequence[str] | None = None) -> dict[str, float]:
    """Distance of each method's gradient to the true one, in units of what transport changes in it.

    1 is therefore who does nothing to the attention.
    """
    double = call.double()
    truth = double.gradient(exact)
    change = (double.gradient(None) - truth).norm()
    return {name: float((call.gradient(METHODS[name]()).double() - truth).norm() / change) for name in names or METHODS}


def seconds(call: Call, mode: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Turns of the methods, until `ROUNDS` or the budget of a method is used up, but three at least."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        call.run(mode, METHODS[name]())  # compiles what has to be
    for turn in range(ROUNDS):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            if len(taken[name]) >= 3 and sum(taken[name]) > BUDGET_SECONDS:
                continue
            refine = METHODS[name]()
            started = time.perf_counter()
            call.run(mode, refine)
            taken[name].append(time.perf_counter() - started)
    return taken


def peak(call: Call, mode: str, name: str) -> int:
    """Bytes beyond weights and inputs, of the second call in this process: a first one compiles."""
    call.run(mode, METHODS[name]())
    return memory.peak_of(lambda: call.run(mode, METHODS[name]()))


def in_fresh_process(size: str, mode: str, name: str) -> int:
    """`peak` of a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.reward", "--peak", size, mode, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.reward: {' '.join(command)} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def parse(size: str) -> tuple[int, int]:
    """ "8x4" -> (8 frames, 4 videos)."""
    frames, _, videos = size.partition("x")
    return int(frames), int(videos)


def measure(size: str) -> dict[str, Record]:
    """All methods of one size."""
    torch.compiler.reset()  # its shapes are those of this size: it would give up after a few
    call = make_call(*parse(size))
    found = errors(call)
    table: dict[str, Record] = {name: {"error": error} for name, error in found.items()}
    right = [name for name, error in found.items() if error < TOLERANCE or name == PLAIN]
    for mode in MODES:
        for name, taken in seconds(call, mode, right).items():
            table[name][mode] = {"seconds": statistics.median(taken), "rounds": taken}
    del call
    for name in right:
        for mode in MODES:
            table[name][mode]["bytes"] = in_fresh_process(size, mode, name)
    return table


def measure_vision(config: InternVideo2Config) -> Record:
    """The vision tower on one video, blocks computed again in the backward pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = InternVideo2(config).eval().requires_grad_(False)
        pixels = torch.rand(1, config.n_frames, 3, config.size, config.size)
    record: Record = {"frames": config.n_frames}
    for mode in MODES:
        leaf = pixels.clone().requires_grad_(mode == "gradient")
        started = time.perf_counter()
        tokens = encoder.encode_video(leaf).tokens
        if mode == "gradient":
            torch.autograd.grad(tokens, leaf, torch.ones_like(tokens))
        record[mode] = time.perf_counter() - started
    return record


PREFACE = """# Measured: the semantic reward from encoded videos on

`python -m benchmarks.reward`, on {machine}, one thread, float32. One call reads encoded videos and captions
of 40 words with InternVideo2's fusion tower of official size (5 layers, 16 heads, width 1024; random weights, the
attention's logits with a deviation of {deviation:g}) and gives log P(match); "gradient" is forward and backward to
the video tokens. Only what is done to the attention differs: nothing ("{plain}"; its probabilities are never
stored), partial transport by this library, by plain torch with all heads at once, and by the released loop over heads,
which takes one video at a time. Time is the median of rounds in which the methods take turns; memory the high-water
mark of a process of its own, beyond weights and inputs. The vision and text towers, the same for every method, are not
in it.
The machine is shared, and other work ran on its second core meanwhile: a ratio is good to a tenth or two, and what
transport adds cannot be told from 0 where it is less than that.

A method's error is the distance of its gradient to that of the float64 reference, as a share of what transport changes
in it; above {tolerance:g} it has no figure.
"""
ADDED = "The projections of the video tokens are most of a call without transport; this is the rest of each method."
COMMON = """
## What all have in common

`python -m benchmarks.reward --vision`: the vision tower of official size (1,019 M parameters, random) on one video of
{frames} frames takes {score:.3g} s, with its gradient to the pixels and activation checkpointing {gradient:.3g} s.
It is the same for every method: from the pixels on, it is most of the reward's time on a CPU.
"""


def page(results: Record) -> str:
    """Tables of time, memory and error."""
    lines = [PREFACE.format(machine=results["machine"], deviation=LOGIT_DEVIATION, plain=PLAIN, tolerance=TOLERANCE)]
    calls = {size: results["calls"][size] for size in sorted(results["calls"], key=parse)}
    heads = []
    for size in calls:
        frames, videos = parse(size)
        heads.append(f"{frames} frames" + (f", {videos} videos" if videos > 1 else f" ({1 + 256 * frames:,} tokens)"))
    for mode in MODES:
        lines += [f"## {mode.capitalize()}", "", f"![{mode}]({mode}.svg)", ""]
        lines += [f"| s (beside ours), MB | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name in METHODS:
            cells = [_cell(table, name, mode) for table in calls.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## What transport adds", "", ADDED, ""]
    lines += [f"| s more than '{PLAIN}': score, gradient | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in [name for name in METHODS if name != PLAIN]:
        lines.append(f"| {name} | {' | '.join(_added(table, name) for table in calls.values())} |")
    lines += ["", "## Error", "", f"| share of the change | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in METHODS:
        cells = [f"{table[name]['error']:.1e}" for table in calls.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if "vision" in results:
        lines.append(COMMON.format(**results["vision"]).rstrip())
    return "\n".join(lines) + "\n"


def _cell(table: dict[str, Record], name: str, mode: str) -> str:
    if mode not in table[name]:
        return "wrong"
    record, ours = table[name][mode], table[OURS].get(mode)
    ratio = f" ({record['seconds'] / ours['seconds']:.2g}x)" if ours else ""
    return f"{record['seconds']:.3g}{ratio}, {record['bytes'] / 1e6:,.0f}"


def _added(table: dict[str, Record], name: str) -> str:
    if any(mode not in table[name] for mode in MODES):
        return "wrong"
    return ", ".join(f"{table[name][mode]['seconds'] - table[PLAIN][mode]['seconds']:.2g}" for mode in MODES)


def draw(results: Record, folder: Path) -> None:
    """Time and memory against frames, a file a mode."""
    from .plots import log_panels

    sizes = sorted((size for size in results["calls"] if parse(size)[1] == 1), key=parse)
    for mode in MODES:
        curves = {}
        for name in METHODS:
            right = [size for size in sizes if mode in results["calls"][size][name]]
            curves[name] = {parse(size)[0]: results["calls"][size][name][mode] for size in right}
        log_panels(
            curves, folder / f"{mode}.svg", title=f"{mode} of the semantic reward, one video, one thread",
            axis="frames of 256 tokens", quantities=(("seconds", 1.0, "time / s"), ("bytes", 1e6, "peak memory / MB")),
            dashed=(PLAIN,),
        )  # fmt: skip


def main() -> None:
    """Measure what is missing; write the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", nargs="+", default=list(CALLS), metavar="FRAMESxVIDEOS")
    parser.add_argument("--vision", action="store_true", help="measure the vision tower only: 7 GB, some minutes")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=Path("docs/reward"))
    parser.add_argument(
        "--peak", nargs=3, metavar=("CALL", "MODE", "METHOD"), help="print a peak in bytes, and no more"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        size, mode, name = arguments.peak
        print(peak(make_call(*parse(size)), mode, name))
        return
    file = arguments.output / "results.json"
    results: Record = json.loads(file.read_text()) if file.exists() else {"calls": {}}

    if arguments.vision:
        results["vision"] = measure_vision(VISION)
        write(file, results)
    elif not arguments.page:
        for size in arguments.calls:
            if size not in results["calls"]:
                print(f"{size} (frames x videos)", flush=True)
                results["calls"][size] = measure(size)
                results["machine"] = machine()["cpu"]
                write(file, results)
    (arguments.output / "README.md").write_text(page(results))
    draw(results, arguments.output)


if __name__ == "__main__":
    main()
