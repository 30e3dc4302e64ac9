"""Whether an encoder keeps the contract of `VideoTextEncoder`: every promise that a reward builds on, tried out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, VideoTextEncoder, resample
from pisces.video import INTERPOLATIONS

T = TypeVar("T")

PROMPTS = ("a dog", "a small red dog runs over the hill", "two dogs")
"""What `check_encoder` reads: of different lengths, so that a batch of them is padded."""


def check_encoder(encoder: VideoTextEncoder, prompts: Sequence[str] = PROMPTS) -> None:
    """Try an encoder out on random videos and say which promise of its contract it breaks first.

    Tried are, in this order: attributes; shapes, types, unit length and numbers of encoded videos of any length and
    size, which have to be what `resample` makes of them, and of encoded prompts; refusal of an empty prompt; the same
    answer twice; a batch against its samples; gradients in the pixels; the match head, its hook and `token_texts`. Not
    tried: whether a gradient is the right one. Equal is to within 1e-3 for float32 parameters and a tenth for 16 bits:
    check an encoder in float32 as well.

    Args:
        encoder: in eval mode, with or without a match head.
        prompts: at least two, of different lengths, that the encoder can read.

    Raises:
        ValueError: a broken promise; the message names the method, what it gave and what is expected.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "red", "dot"), width=16))
        >>> check_encoder(encoder.eval(), prompts=["a red dot", "dot"])
    """
    prompts = list(prompts)
    if len({len(prompt) for prompt in prompts}) < 2:
        raise ValueError(f"check_encoder: prompts is {prompts}, expected at least two of different lengths.")
    with torch.enable_grad():
        _Check(encoder, prompts).run()


class _Check:
    """One encoder with the videos and prompts that it is tried out on."""

    def __init__(self, encoder: VideoTextEncoder, prompts: list[str]) -> None:
        self.encoder, self.prompts, self.n = encoder, prompts, len(prompts)
        parameters = list(encoder.parameters()) if isinstance(encoder, nn.Module) else []
        floats = [p.dtype for p in parameters if p.is_floating_point()] or [torch.float32]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.dtype = torch.promote_types(floats[0], torch.float32)
        # a batch adds in another order than a sample does: some digits of the widest numbers that are computed in
        self.tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(floats[0], 0.1)

    def run(self) -> None:
        """Everything, in the order of the docstring above."""
        for name in ("n_frames", "size", "embed_dim"):
            value = getattr(self.encoder, name, None)
            if type(value) is not int or value < 1:
                self._fail(name, f"is {value!r}", "an integer of at least 1")
        how = getattr(self.encoder, "interpolation", None)
        if how not in INTERPOLATIONS:
            self._fail("interpolation", f"is {how!r}", " or ".join(map(repr, INTERPOLATIONS)))
        frames = self._frames(self.encoder.n_frames, self.encoder.size, self.encoder.size)
        video, text = self._video(frames), self._text(self.prompts)
        self._any_size(video)
        self._empty_prompt()
        self._same_twice(frames, text, video)
        self._samples(frames, text, video)
        self._gradient("encode_video", frames, lambda x: self._video(x).embedding)
        if getattr(self.encoder, "has_match_head", True):
            self._match(frames, text, video)
            self._hook(text, video)
        else:
            self._no_match(text, video)
        self._token_texts(text)

    # what the encoder is called for

    def _frames(self, t: int, h: int, w: int) -> Tensor:
        """A random video a prompt; the same ones for every encoder of these sizes."""
        generator = torch.Generator().manual_seed(0)
        frames = torch.rand(self.n, t, 3, h, w, generator=generator, dtype=torch.float64)
        return frames.to(self.device, self.dtype)

    def _video(self, frames: Tensor) -> VideoFeatures:
        method, before = "encode_video", frames.detach().clone()
        shape = tuple(frames.shape)
        video = self._call(method, lambda: self.encoder.encode_video(frames), f"frames of shape {shape}")
        if not torch.equal(frames.detach(), before):
            self._fail(method, "changed the frames that it was given", "them left as they are")
        b, tokens = len(frames), video.tokens
        if tokens.dim() != 3 or len(tokens) != b:
            self._fail(method, f"gave tokens of shape {tuple(tokens.shape)}", f"({b}, M, D)")
        self._embedding(method, video.embedding, b)
        m, index, places = tokens.shape[1], video.frame_index, video.positions
        if index.shape != (m,) or places.shape != (m, 2):
            got = f"gave frame_index {tuple(index.shape)} and positions {tuple(places.shape)}"
            self._fail(method, got, f"({m},) and ({m}, 2), one a token")
        nowhere = index == -1
        inside = ((places >= 0) & (places <= 1)).all(1)
        if not torch.where(nowhere, (places == -1).all(1), inside & (index >= 0)).all():
            got = f"gave frame_index from {float(index.min()):g} and positions {_range(places)}"
            self._fail(
                method, got, "frames from 0 and places in [0, 1], or -1 and (-1, -1) for a token without a place"
            )
        return video

    def _text(self, prompts: list[str]) -> TextFeatures:
        method, b = "encode_text", len(prompts)
        text = self._call(method, lambda: self.encoder.encode_text(prompts), f"{b} prompts")
        if text.tokens.dim() != 3 or len(text.tokens) != b:
            self._fail(method, f"gave tokens of shape {tuple(text.tokens.shape)}", f"({b}, N, D)")
        self._embedding(method, text.embedding, b)
        for name, mask in (("mask", text.mask), ("lexical", text.lexical)):
            if mask.shape != text.tokens.shape[:2] or mask.dtype != torch.bool:
                got = f"gave {name} of shape {tuple(mask.shape)} and type {mask.dtype}"
                self._fail(method, got, f"{tuple(text.tokens.shape[:2])} and torch.bool")
        if (text.lexical & ~text.mask).any():
            self._fail(method, "gave a lexical that marks padding", "words only, which mask marks as well")
        if not text.lexical.any(1).all():
            self._fail(method, "gave a prompt without a lexical token", "at least one word in each prompt")
        return text

    def _logits(self, text: TextFeatures, video: VideoFeatures, refine: AttentionRefiner | None = None) -> Tensor:
        what = "texts and videos" if refine is None else "texts, videos and a hook"
        logits = self._call("match", lambda: self.encoder.match(text, video, refine=refine), what)
        b = len(text.tokens)
        if logits.shape != (b,):
            self._fail("match", f"gave shape {tuple(logits.shape)}", f"({b},), log-odds of each pair")
        self._wide("match", "log-odds", logits)
        return logits

    # the promises

    def _any_size(self, video: VideoFeatures) -> None:
        n, size = self.encoder.n_frames, self.encoder.size
        for t, h, w in ((1, size, size), (2 * n + 1, size + 3, 2 * size - 1), (n, 5, 7)):
            frames = self._frames(t, h, w)
            other = self._video(frames)
            if other.tokens.shape != video.tokens.shape:
                got = f"gave tokens {tuple(other.tokens.shape)} for {t} frames of {h} x {w}"
                self._fail("encode_video", got, f"{tuple(video.tokens.shape)} as for any other: use resample")
            ready = self._video(resample(frames, n, size, mode=self.encoder.interpolation))
            what = f"{t} frames of {h} x {w} brought to {n} of {size} x {size} by resample"
            self._same("encode_video", "embedding", other.embedding, ready.embedding, what)

    def _empty_prompt(self) -> None:
        try:
            self.encoder.encode_text([self.prompts[0], " "])
        except ValueError as error:
            if not re.search(r"\b1\b", str(error)):
                self._fail("encode_text", f"said {str(error)!r} of an empty prompt", "its index, prompts[1]")
        except Exception as error:
            self._fail("encode_text", f"raised {_named(error)} for an empty prompt", "a ValueError", error)
        else:
            self._fail("encode_text", "took an empty prompt", "a ValueError that names its index")

    def _same_twice(self, frames: Tensor, text: TextFeatures, video: VideoFeatures) -> None:
        for method, first, again in (
            ("encode_video", video, self._video(frames)),
            ("encode_text", text, self._text(self.prompts)),
        ):
            if not (torch.equal(first.embedding, again.embedding) and torch.equal(first.tokens, again.tokens)):
                self._fail(method, "gave something else the second time", "the same bits: call eval(), draw nothing")

    def _samples(self, frames: Tensor, text: TextFeatures, video: VideoFeatures) -> None:
        for i, prompt in enumerate(self.prompts):
            one, alone = self._video(frames[i : i + 1]), self._text([prompt])
            self._same("encode_video", "embedding", one.embedding[0], video.embedding[i], f"video {i} alone")
            self._same("encode_text", "embedding", alone.embedding[0], text.embedding[i], f"prompt {i} alone")

    def _gradient(self, method: str, frames: Tensor, value: Callable[[Tensor], Tensor]) -> None:
        x = frames.clone().requires_grad_()
        y = value(x)[0]
        if not y.requires_grad:
            self._fail(method, "gave a result without a gradient", "one that is differentiable in the frames")
        weights = torch.linspace(0.5, 1.5, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x, allow_unused=True)
        if gradient is None or not gradient[0].any():
            self._fail(method, "has no gradient in the frames", "one that is not zero everywhere")
        if not gradient.isfinite().all():
            self._fail(method, "has a gradient with NaN or infinity", "finite numbers")
        if gradient[1:].any():
            self._fail(method, "has a gradient of sample 0 in other samples", "samples that do not know each other")

    def _match(self, frames: Tensor, text: TextFeatures, video: VideoFeatures) -> None:
        logits = self._logits(text, video)
        if not torch.equal(logits, self._logits(text, video)):
            self._fail("match", "gave something else the second time", "the same bits: call eval(), draw nothing")
        for i, prompt in enumerate(self.prompts):
            one = self._logits(self._text([prompt]), self._video(frames[i : i + 1]))
            self._same("match", "log-odds", one[0], logits[i], f"pair {i} alone")
        self._gradient("match", frames, lambda x: self._logits(text, self._video(x)))
        try:
            self.encoder.match(self._text(self.prompts[:1]), video)
        except ValueError:
            return
        except Exception as error:
            self._fail("match", f"raised {_named(error)} for 1 text and {self.n} videos", "a ValueError", error)
        self._fail("match", f"took 1 text and {self.n} videos", "a ValueError: row i is scored against row i")

    def _hook(self, text: TextFeatures, video: VideoFeatures) -> None:
        calls = 0

        def keep(*arguments: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            self._arguments(text, video, *arguments)
            return arguments[2]

        kept = self._logits(text, video, keep)
        if not calls:
            self._fail("match", "never called refine", "one call in every fusion layer")
        self._same("match", "log-odds", kept, self._logits(text, video), "refine that changes nothing")
        together, calls = calls, 0
        text, video = self._text(self.prompts[:1]), self._video(self._frames_of_first())
        self._logits(text, video, keep)
        if calls != together:
            got = f"called refine {together} times for {self.n} pairs and {calls} times for one"
            self._fail("match", got, "as many calls: one a fusion layer, with the whole batch")

        def last(*arguments: Tensor) -> Tensor:
            attention, lexical = arguments[2], arguments[5]
            one = torch.zeros_like(attention)
            one[..., -1] = 1
            return torch.where(lexical[:, None, :, None], one, attention)

        if torch.equal(self._logits(text, video, last), self._logits(text, video, keep)):
            self._fail("match", "does not use what refine returns", "log-odds of the refined attention")

    def _arguments(
        self,
        text: TextFeatures,
        video: VideoFeatures,
        query: Tensor,
        key: Tensor,
        attention: Tensor,
        frame_index: Tensor,
        positions: Tensor,
        lexical: Tensor,
    ) -> None:
        """What the hook was given; an encoder may match its video in equal parts, each a row of the hook's batch."""
        b, n, m = len(text.tokens), text.tokens.shape[1], video.tokens.shape[1]
        rows = len(query)
        if rows % b or m % (rows // b or 1):
            self._fail("match", f"gave refine a batch of {rows}", f"{b}, or {b} times as many as a video has parts")
        parts = rows // b
        heads = attention.shape[1] if attention.dim() == 4 else 0
        d = query.shape[-1]
        for name, got, wanted in (
            ("query", query, (rows, n, d)),
            ("key", key, (rows, m // parts, d)),
            ("attention", attention, (rows, heads, n, m // parts)),
            ("frame_index", frame_index, (m // parts,)),
            ("positions", positions, (m // parts, 2)),
            ("lexical", lexical, (rows, n)),
        ):
            if tuple(got.shape) != wanted:
                self._fail("match", f"gave refine {name} of shape {tuple(got.shape)}", f"{wanted}")
        if d % heads:
            self._fail("match", f"gave refine query of width {d} and {heads} heads", "all heads side by side")
        if not torch.equal(lexical.unflatten(0, (b, parts)), text.lexical[:, None].expand(b, parts, n)):
            self._fail(
                "match", "gave refine another lexical than that of the texts", "the same, parts of a video together"
            )
        sums = attention.sum(-1)
        if attention.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=self.tolerance):
            self._fail("match", f"gave refine attention with sums {_range(sums)}", "probabilities: rows that sum to 1")

    def _no_match(self, text: TextFeatures, video: VideoFeatures) -> None:
        try:
            self.encoder.match(text, video)
        except ValueError:
            return
        except Exception as error:
            self._fail("match", f"raised {_named(error)}", "a ValueError, as has_match_head is False", error)
        self._fail("match", "gave something", "a ValueError, as has_match_head is False")

    def _token_texts(self, text: TextFeatures) -> None:
        method = getattr(self.encoder, "token_texts", None)
        if method is None:  # it is optional
            return
        words = self._call("token_texts", lambda: method(self.prompts), f"{self.n} prompts")
        got, wanted = [len(row) for row in words], text.lexical.sum(1).tolist()
        if got != wanted:
            self._fail("token_texts", f"gave {got} texts", f"{wanted}, one a lexical token")

    # what they have in common

    def _frames_of_first(self) -> Tensor:
        return self._frames(self.encoder.n_frames, self.encoder.size, self.encoder.size)[:1]

    def _embedding(self, method: str, embedding: Tensor, b: int) -> None:
        wanted = (b, self.encoder.embed_dim)
        if tuple(embedding.shape) != wanted:
            self._fail(method, f"gave an embedding of shape {tuple(embedding.shape)}", f"{wanted} = (B, embed_dim)")
        self._wide(method, "an embedding", embedding)
        lengths = embedding.norm(dim=-1)
        if not torch.allclose(lengths, torch.ones_like(lengths), rtol=0, atol=1e-3):
            self._fail(method, f"gave embeddings of length {_range(lengths)}", "1: use torch.nn.functional.normalize")

    def _wide(self, method: str, what: str, values: Tensor) -> None:
        if values.dtype not in (torch.float32, torch.float64):
            self._fail(method, f"gave {what} of type {values.dtype}", "float32 at least: rewards differ in fine digits")
        if not values.isfinite().all():
            self._fail(method, f"gave {what} with NaN or infinity", "finite numbers")

    def _same(self, method: str, what: str, got: Tensor, wanted: Tensor, when: str) -> None:
        off = float((got - wanted).detach().abs().max())
        if off > self.tolerance * (1 + float(wanted.detach().abs().max())):
            self._fail(method, f"has other {what} for {when}: {off:.2g} off", "the same as in the batch, or without it")

    def _call(self, method: str, call: Callable[[], T], what: str) -> T:
        try:
            return call()
        except _Broken:
            raise
        except Exception as error:
            self._fail(method, f"raised {_named(error)} for {what}", "an answer", error)

    def _fail(self, method: str, got: str, wanted: str, error: Exception | None = None) -> NoReturn:
        raise _Broken(f"check_encoder: {type(self.encoder).__name__}.{method} {got}, expected {wanted}.") from error


class _Broken(ValueError):
    """A promise that is not kept; apart from the errors of the encoder, through which the hook's come."""


def _named(error: Exception) -> str:
    return f"{type(error).__name__} ({error})"


def _range(values: Tensor) -> str:
    low, high = torch.aminmax(values.detach())
    return f"from {float(low):.3g} to {float(high):.3g}"
