"""Frames of latents with their exact gradient, in the memory of one chunk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pisces.decode import cogvideox, hunyuan, hunyuan15, images, ltx, mochi, wan
from pisces.decode.replay import SWEEPS, Decode, Replay
from pisces.decode.stream import Stream
from pisces.decode.whole import decode_plain, decode_recomputed, is_image_class

MEMORY = ("chunked", "plain")

StreamOf = Callable[[Any, Tensor, Tensor | None], tuple[Stream, Tensor]]
"""(autoencoder, latents, timestep or None) -> its decoder as a stream, and what that reads of the latents."""

STREAMS: dict[str, StreamOf] = {
    "AutoencoderKLWan": wan.stream,
    "AutoencoderKLCogVideoX": cogvideox.stream,
    "AutoencoderKLMochi": mochi.stream,
    "AutoencoderKLHunyuanVideo": hunyuan.stream,
    "AutoencoderKLHunyuanVideo15": hunyuan15.stream,
    "AutoencoderKLLTXVideo": ltx.stream,
}
"""Video autoencoders of diffusers that are decoded in chunks, by class name."""


def decode(
    vae: Any,
    latents: Tensor,
    *,
    memory: str = "chunked",
    states: str = "sqrt",
    chunk: int = 1,
    checkpoint: bool = False,
    frames: Sequence[int] | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """Decode a batch of videos so that any loss of the frames can be differentiated in the memory of one chunk.

    The frames are those of ``vae.decode(latents).sample``; the gradient is that of autograd through it, not an
    approximation: with (frames_k, cache_{k+1}) = step_k(latents_k, cache_k) for the chunks k of the video, the backward
    pass runs them again from the last to the first and hands the gradient of each causal cache to the chunk before.
    ``pisces.decode.describe`` says for which of a class's decodes that holds.

    Args:
        vae: a diffusers autoencoder: :data:`STREAMS`, an image autoencoder (frame by frame), or any other with a
            ``decode`` (in one piece, recomputed, with a warning). Its tiling and slicing switches are respected. It is
            not changed.
        latents: [B, C, t, h, w], in the autoencoder's dtype, scaled as it wants them. What the gradient flows to, as
            well as to the autoencoder's parameters that require it.
        memory: "chunked", or "plain": autograd through ``vae.decode``, fastest where it fits.
        states: of the chunked decode, what becomes of the caches between its n chunks. "keep": all stay. "sqrt":
            some stay and the others recomputed from them, about sqrt(2 n) alive at a time, for one more forward pass.
            "cbrt": about the cube root of 6 n, for two more. "offload": all are kept in host memory.
        chunk: latent frames of a chunk, at least 1: larger is faster and takes more memory.
        checkpoint: also recompute the activations inside a chunk, block by block, for one more forward pass.
        frames: which frames to return, in this order, negative from the end; None is all. Chunks that cannot reach
            them cost no gradient; chunks behind them are not decoded.
        temb: timestep [B] for LTX decoders that are conditioned on one.

    Returns:
        [B, 3, T, H, W] in the class's own range (most: [-1, 1]), T frames as chosen.

    Gradient: of ``latents`` and of the autoencoder's parameters; once (no double backward). The caller's autocast state
    and, where the decoder draws random numbers, the generator's state are those of the forward pass.

    Raises:
        TypeError: if ``vae`` has no ``decode``, or ``latents`` is no floating-point tensor.
        ValueError: if a size, an option or a frame's number is not possible.

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderKLWan
        >>> from pisces.decode import decode
        >>> vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
        >>> latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
        >>> frames = decode(vae.requires_grad_(False), latents)
        >>> frames.shape
        torch.Size([1, 3, 5, 8, 8])
        >>> frames.square().mean().backward()
        >>> latents.grad.shape
        torch.Size([1, 4, 3, 4, 4])
    """
    _check(vae, latents, memory, states, chunk)
    bring_back(vae)
    if memory == "chunked" and getattr(vae, "use_slicing", False) and len(latents) > 1:
        options: dict[str, Any] = {"states": states, "chunk": chunk, "checkpoint": checkpoint, "frames": frames}
        embeddings = [None] * len(latents) if temb is None else list(temb.split(1))
        return torch.cat(
            [decode(vae, z, temb=own, **options) for z, own in zip(latents.split(1), embeddings, strict=True)]
        )
    stream_of = stream_function(vae)
    if memory == "plain" or stream_of is None:
        if stream_of is None and memory == "chunked":
            warnings.warn(
                f"decode: {type(vae).__name__} is not known here, so it is decoded in one piece, a video at a time, "
                "and recomputed in the backward pass: exact, but its memory grows with the video's length. "
                f"In chunks: {', '.join(STREAMS)}.",
                stacklevel=2,
            )
            whole = decode_recomputed(vae, latents, temb)
        else:
            whole = decode_plain(vae, latents, temb)
        return whole if frames is None else whole[:, :, frame_numbers(frames, whole.shape[2])]
    stream, entering = stream_of(vae, latents, temb)
    numbers = None if frames is None else frame_numbers(frames, sum(stream.counts))
    wanted = None if numbers is None else sorted(set(numbers))
    replay = Replay(
        stream=stream,
        size=chunk,
        wanted=wanted,
        states=states,
        checkpoint=checkpoint,
        stochastic=_is_stochastic(vae),
        device=latents.device,
        before=lambda: bring_back(vae),
    )
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (entering.requires_grad or parameters):
        video: Tensor = Decode.apply(replay, entering, *parameters)
    else:
        video = replay.forward(entering, save=False)[0]
    if numbers is None or wanted == numbers:
        return video
    place = {number: index for index, number in enumerate(wanted or ())}
    return video[:, :, [place[number] for number in numbers]]


def decode_and_backward(vae: Any, latents: Tensor, loss: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """Decode, compute a loss of the frames and back-propagate it into what the latents come from.

    The memory of the decode and of the loss is free again before the gradient goes on into the denoiser:

        g = d loss(decode(latents)) / d latents,   then latents.backward(g)

    Args:
        vae: as for :func:`decode`.
        latents: [B, C, t, h, w], with a graph behind them or a leaf that requires a gradient.
        loss: of the frames [B, 3, T, H, W], one number; -reward.mean(), say.
        **options: of :func:`decode`.

    Returns:
        The loss, detached.

    Raises:
        ValueError: if ``latents`` require no gradient, or the loss is not one number.

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderKLWan
        >>> from pisces.decode import decode_and_backward
        >>> vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
        >>> latents = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
        >>> loss = decode_and_backward(vae.requires_grad_(False), latents, lambda frames: -frames.mean())
        >>> latents.grad.isfinite().all()
        tensor(True)
    """
    if not latents.requires_grad:
        raise ValueError(
            "decode_and_backward: latents require no gradient, so nothing would learn. Pass them attached."
        )
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(decode(vae, leaf, **options))
    if value.numel() != 1:
        raise ValueError(
            f"decode_and_backward: the loss has shape {tuple(value.shape)}, expected one number. Take its mean."
        )
    value.backward()  # parameters of the autoencoder and of the reward get theirs here
    if leaf.grad is not None:
        latents.backward(leaf.grad)
    return value.detach()


def describe(vae: Any, latents: Tensor, *, temb: Tensor | None = None) -> str:
    """Of which decode the chunked gradient is exact for this autoencoder.

    Args:
        vae: the autoencoder, with its switches as they are.
        latents: what would be decoded: the size decides whether a class tiles.
        temb: as for :func:`decode`.

    Returns:
        One sentence or two.
    """
    stream_of = stream_function(vae)
    if stream_of is None:
        return "Exact for the class's own decode, in one piece: nothing is known of its structure."
    with torch.no_grad():
        return stream_of(vae, latents, temb)[0].exact


def stream_function(vae: Any) -> StreamOf | None:
    """The function that makes a stream of an autoencoder of this class, or of a class it derives from."""
    if is_image_class(vae):
        return images.stream
    for base in type(vae).__mro__:
        if base.__name__ in STREAMS:
            return STREAMS[base.__name__]
    return None


def frame_numbers(frames: Sequence[int], n_frames: int) -> list[int]:
    """Numbers from the front of the chosen frames."""
    numbers = [int(number) for number in frames]
    wrong = [number for number in numbers if not -n_frames <= number < n_frames]
    if wrong or not numbers:
        got = f"has {wrong}" if wrong else "is empty"
        raise ValueError(f"decode: frames {got}, expected numbers from {-n_frames} to {n_frames - 1}. None takes all.")
    return [number % n_frames for number in numbers]


def bring_back(vae: Any) -> None:
    """What diffusers' own decode does first: an offloading hook brings the weights to their device."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def _is_stochastic(vae: Any) -> bool:
    dropout = any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in vae.modules())
    return dropout or (hasattr(vae, "decoder") and ltx.injects_noise(vae.decoder))


def _check(vae: Any, latents: Tensor, memory: str, states: str, chunk: int) -> None:
    if not isinstance(vae, nn.Module) or not hasattr(vae, "decode"):
        raise TypeError(f"decode: vae is a {type(vae).__name__}, expected an autoencoder with a decode method.")
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"decode: latents are {got}, expected a floating-point tensor [B, C, t, h, w].")
    if latents.dim() != 5 or 0 in latents.shape:
        raise ValueError(
            f"decode: latents have shape {tuple(latents.shape)}, expected [B, C, t, h, w], none of them 0. "
            "A single video or a single frame needs a dimension of 1."
        )
    for name, value, known in (("memory", memory, MEMORY), ("states", states, tuple(SWEEPS))):
        if value not in known:
            raise ValueError(f"decode: {name} is {value!r}, expected one of {', '.join(map(repr, known))}.")
    if chunk < 1:
        raise ValueError(f"decode: chunk is {chunk}, expected at least 1 latent frame.")
