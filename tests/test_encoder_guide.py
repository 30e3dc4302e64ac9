"""The contract of an encoder: the guide's adapter and all of ours keep it, and whatever breaks it is named."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import tiny_encoder
from tiny_internvideo2 import SMALL, VOCABULARY, small_model
from tiny_transformers import NAMES, save_tiny
from torch import Tensor

from pisces.encoders import InternVideo2, check_encoder, load_encoder
from pisces.rewards import explain, leverage

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
PROMPTS = ["a dog", "a red dog runs over a blue hill"]


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    """What is defined once the page's Python has run, from its top to its end."""
    names: dict[str, Any] = {"__name__": "guide"}
    with torch.random.fork_rng(devices=[]):
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_guide_runs_and_says_what_comes_out(guide: dict[str, Any]) -> None:
    frames, prompts = guide["frames"], guide["prompts"]
    for reward in (guide["quality"], guide["semantic"]):
        assert reward(frames, prompts).shape == (2,)
    assert explain(guide["encoder"], frames, prompts).words == [["a", "red", "dog"], ["a", "blue", "hill"]]
    assert leverage(guide["encoder"], frames, prompts)["partial_ot"] > 0
    for members in ("VideoTextEncoder", "VideoFeatures", "TextFeatures"):
        names = getattr(__import__("pisces.encoders", fromlist=[members]), members).__annotations__
        assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["guide", "tiny", "internvideo2", *NAMES])
def test_our_encoders_keep_the_contract(
    name: str, dtype: torch.dtype, guide: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    if name in ("guide", "tiny"):
        encoder = guide["MyEncoder"]() if name == "guide" else tiny_encoder(seed)
    elif name == "internvideo2":
        # the weights of the small model make 16 bits differ from 32 by more than half a unit
        encoder = InternVideo2(SMALL, VOCABULARY) if dtype == torch.bfloat16 else small_model()
    else:
        save_tiny(name, tmp_path)
        encoder = load_encoder(tmp_path)
    encoder = encoder.to(dtype).eval()
    check_encoder(encoder, PROMPTS)
    check_encoder(encoder.requires_grad_(False), prompts=random.Random(seed).sample([*PROMPTS, "red hill"], 3))
    with torch.no_grad():  # the caller's mode is no part of it
        check_encoder(encoder, PROMPTS)


def noisy(x: Tensor) -> Tensor:
    return x + 1e-4 * torch.randn_like(x)


def video(**changes: Callable[[Any], Any]) -> Callable[[type], dict[str, Any]]:
    """An `encode_video` whose fields are changed."""
    return lambda base: {
        "encode_video": lambda self, frames: changed(base.encode_video(self, frames), changes),
    }


def text(**changes: Callable[[Any], Any]) -> Callable[[type], dict[str, Any]]:
    """An `encode_text` whose fields are changed."""
    return lambda base: {"encode_text": lambda self, prompts: changed(base.encode_text(self, prompts), changes)}


def changed(features: Any, changes: dict[str, Callable[[Any], Any]]) -> Any:
    return dataclasses.replace(features, **{name: f(getattr(features, name)) for name, f in changes.items()})


def logits(change: Callable[[Tensor], Tensor]) -> Callable[[type], dict[str, Any]]:
    """A `match` whose log-odds are changed."""
    return lambda base: {"match": lambda self, *args, **how: change(base.match(self, *args, **how))}


def given(change: Callable[..., tuple[Any, ...]]) -> Callable[[type], dict[str, Any]]:
    """A `match` that gives its hook something else."""

    def match(base: type, self: Any, a: Any, b: Any, refine: Any) -> Tensor:
        hook = None if refine is None else lambda *args: (refine(*change(*args)), args[2])[1]
        return base.match(self, a, b, refine=hook)  # type: ignore[attr-defined, no-any-return]

    return lambda base: {"match": lambda self, a, b, *, refine=None: match(base, self, a, b, refine)}


def only(method: str, body: Callable[..., Any]) -> Callable[[type], dict[str, Any]]:
    """A method that is another one."""
    return lambda base: {method: lambda self, *args, **how: body(base, self, *args, **how)}


def lame(name: str, value: object) -> Callable[[Any, str], Any]:
    """An attribute that is another one, whatever is set."""
    return lambda self, asked: value if asked == name else object.__getattribute__(self, asked)


def first_frames(base: Any, self: Any, frames: Tensor) -> Any:
    """An `encode_video` that looks at the start of a video only."""
    return base.encode_video(self, frames[:, : self.n_frames])


def one_by_one(base: Any, self: Any, a: Any, b: Any, *, refine: Any = None) -> Tensor:
    """A `match` that calls its hook once a sample."""
    if len(a.tokens) != len(b.tokens):
        raise ValueError("not as many")

    def stretched(q: Tensor, k: Tensor, p: Tensor, f: Tensor, o: Tensor, w: Tensor) -> Tensor:
        """So that only the number of calls is wrong."""
        q, k, p = (x.expand(len(a.tokens), *x.shape[1:]) for x in (q, k, p))
        return refine(q, k, p, f, o, a.lexical)[:1]  # type: ignore[no-any-return]

    def row(features: Any, i: int) -> Any:
        batched = set(vars(features)) - {"frame_index", "positions"}
        return changed(features, dict.fromkeys(batched, lambda x: x[i : i + 1]))

    hook = None if refine is None else stretched
    return torch.cat([base.match(self, row(a, i), row(b, i), refine=hook) for i in range(len(a.tokens))])


def repeating(base: Any, self: Any, a: Any, b: Any, *, refine: Any = None) -> Tensor:
    """A `match` that repeats the texts until they are as many as the videos."""
    a = changed(a, dict.fromkeys(vars(a), lambda x: x[torch.arange(len(b.tokens)) % len(x)]))
    return base.match(self, a, b, refine=refine)  # type: ignore[no-any-return]


def unhooked(base: Any, self: Any, a: Any, b: Any, *, refine: Any = None) -> Tensor:
    return base.match(self, a, b)  # type: ignore[no-any-return]


def shifted(base: Any, self: Any, a: Any, b: Any, *, refine: Any = None) -> Tensor:
    """A `match` that is another function where there is a hook."""
    return base.match(self, a, b, refine=refine) + (refine is not None)  # type: ignore[no-any-return]


def as_long_as_it_is(base: Any, self: Any, frames: Tensor) -> Any:
    """An `encode_video` with as many tokens as the video has frames."""
    video, m = base.encode_video(self, frames), 16 * min(frames.shape[1], 4)
    cut = {"frame_index": lambda x: x[:m], "positions": lambda x: x[:m], "tokens": lambda x: x[:, :m]}
    return changed(video, cut)


def filling(base: Any, self: Any, prompts: list[str]) -> Any:
    """An `encode_text` that takes an empty prompt."""
    return base.encode_text(self, [prompt if prompt.strip() else "x" for prompt in prompts])


def darken(base: Any, self: Any, frames: Tensor) -> Any:
    with torch.no_grad():
        frames.mul_(0.5)
    return base.encode_video(self, frames)


def strict_size(base: Any, self: Any, frames: Tensor) -> Any:
    if frames.shape[1:] != (4, 3, 32, 32):
        raise RuntimeError("the size of tensor a must match")
    return base.encode_video(self, frames)


BROKEN: dict[str, tuple[Callable[[type], dict[str, Any]], str]] = {
    "frames": (lambda base: {"n_frames": property(lambda self: 4.0, lambda self, x: None)}, "n_frames is 4.0"),
    "no pixels": (lambda base: {"size": property(lambda self: 0, lambda self, x: None)}, "size is 0"),
    "width": (video(embedding=lambda x: torch.cat([x, x[:, :1]], dim=1)), r"expected \(2, 16\) = \(B, embed_dim\)"),
    "video shape": (video(tokens=lambda x: x.flatten(1)), r"encode_video gave tokens of shape"),
    "video length": (video(embedding=lambda x: 2 * x), "encode_video gave embeddings of length from 2 to 2"),
    "video type": (video(embedding=lambda x: x.bfloat16()), "encode_video gave an embedding of type torch.bfloat16"),
    "video nan": (video(embedding=lambda x: x * torch.nan), "encode_video gave an embedding with NaN"),
    "video index": (video(frame_index=lambda x: x[1:]), r"encode_video gave frame_index \(63,\)"),
    "video places": (video(positions=lambda x: 3 * x), r"positions from 0 to 3, expected frames from 0"),
    "video noise": (video(tokens=noisy), "encode_video gave something else the second time"),
    "video detached": (video(embedding=lambda x: x.detach()), "encode_video gave a result without a gradient"),
    "video mixed": (
        video(embedding=lambda x: torch.nn.functional.normalize(x + x.mean(0), dim=-1)),
        "encode_video has other embedding for video 0 alone",
    ),
    "video in place": (only("encode_video", darken), "encode_video changed the frames"),
    "video of one size": (only("encode_video", strict_size), r"raised RuntimeError .* \(2, 1, 3, 32, 32\)"),
    "video of its own size": (only("encode_video", as_long_as_it_is), r"\(2, 16, 32\) for 1 frames of 32 x 32"),
    "text shape": (text(tokens=lambda x: x[:1]), "encode_text gave tokens of shape"),
    "text length": (text(embedding=lambda x: x / 2), "encode_text gave embeddings of length from 0.5"),
    "text type": (text(embedding=lambda x: x.half()), "encode_text gave an embedding of type torch.float16"),
    "mask": (text(mask=lambda x: x.long()), "encode_text gave mask of shape .* type torch.int64"),
    "lexical": (text(lexical=lambda x: torch.ones_like(x)), "encode_text gave a lexical that marks padding"),
    "no words": (text(lexical=lambda x: x & False), "encode_text gave a prompt without a lexical token"),
    "text noise": (text(tokens=noisy), "encode_text gave something else the second time"),
    "text padding": (
        text(embedding=lambda x: torch.nn.functional.normalize(x + x.sum(0), dim=-1)),
        "encode_text has other embedding for prompt 0 alone",
    ),
    "empty prompt": (only("encode_text", filling), "encode_text took an empty prompt"),
    "token texts": (
        lambda base: {"token_texts": lambda self, p: [[*row, "more"] for row in base.token_texts(self, p)],
                      "encode_text": lambda self, p: reading(base, self, p)},
        r"token_texts gave \[3, 9\] texts, expected \[2, 8\]",
    ),
    "match shape": (logits(lambda x: x[:, None]), r"match gave shape \(2, 1\)"),
    "interpolation": (
        lambda base: {"__getattribute__": lame("interpolation", "nearest")},
        "interpolation is 'nearest'",
    ),
    "other frames": (only("encode_video", first_frames), "encode_video has other embedding for 9 frames of"),
    "match type": (logits(lambda x: x.bfloat16()), "match gave log-odds of type torch.bfloat16"),
    "match nan": (logits(lambda x: x / 0), "match gave log-odds with NaN"),
    "match noise": (logits(noisy), "match gave something else the second time"),
    "match detached": (logits(lambda x: x.detach()), "match gave a result without a gradient"),
    "match mixed": (logits(lambda x: x + x.sum()), "match has other log-odds for pair 0 alone"),
    "match pairs": (only("match", repeating), "match took 1 text and 2 videos"),
    "no hook": (only("match", unhooked), "match never called refine"),
    "hook unused": (given(lambda *args: args), "match does not use what refine returns"),
    "hook one by one": (only("match", one_by_one), "called refine 2 times for 2 pairs and 1 times for one"),
    "hook changes": (only("match", shifted), "match has other log-odds for refine that changes nothing"),
    "hook query": (given(lambda q, k, p, f, o, w: (q[..., 1:, :], k, p, f, o, w)), "gave refine query of shape"),
    "hook key": (given(lambda q, k, p, f, o, w: (q, k[..., :-1], p, f, o, w)), "gave refine key of shape"),
    "hook heads": (given(lambda q, k, p, f, o, w: (q, k, p[:, :3], f, o, w)), "query of width 32 and 3 heads"),
    "hook mean": (given(lambda q, k, p, f, o, w: (q, k, p.mean(1), f, o, w)), "gave refine attention of shape"),
    "hook scores": (given(lambda q, k, p, f, o, w: (q, k, p.log(), f, o, w)), "gave refine attention with sums"),
    "hook places": (given(lambda q, k, p, f, o, w: (q, k, p, f, o.T, w)), "gave refine positions of shape"),
    "hook lexical": (given(lambda q, k, p, f, o, w: (q, k, p, f, o, ~w)), "gave refine another lexical"),
    "no head": (lambda base: {"has_match_head": False}, "match gave something, expected a ValueError"),
}  # fmt: skip


def reading(base: Any, self: Any, prompts: list[str]) -> Any:
    """`encode_text` with the words of the sound class."""
    words = type(self).token_texts
    type(self).token_texts = base.token_texts
    try:
        return base.encode_text(self, prompts)
    finally:
        type(self).token_texts = words


@pytest.mark.parametrize("how", BROKEN)
def test_an_encoder_that_breaks_a_promise_is_named(how: str, guide: dict[str, Any], seed: int) -> None:
    base = guide["MyEncoder"]
    changes, words = BROKEN[how]
    members = changes(base)
    sound, broken = base().eval(), type("Broken", (base,), members)
    check_encoder(sound, PROMPTS)
    with pytest.raises(ValueError, match=rf"^check_encoder: Broken\.(?s:.*){words}") as got:
        check_encoder(broken().eval(), PROMPTS)
    assert str(got.value).endswith(".")
    assert ", expected " in str(got.value)


def test_prompts_that_would_hide_padding_are_refused(guide: dict[str, Any]) -> None:
    for prompts in ([], ["a dog"], ["a dog", "a cat"]):
        with pytest.raises(ValueError, match="at least two of different lengths"):
            check_encoder(guide["encoder"], prompts)
    dropping = guide["MyEncoder"]()
    dropping.words = torch.nn.Sequential(dropping.words, torch.nn.Dropout(0.5))
    dropping.words.weight = dropping.words[0].weight
    with pytest.raises(ValueError, match="encode_text gave something else the second time"):
        check_encoder(dropping.train())
    check_encoder(dropping.eval())
