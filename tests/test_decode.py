"""Chunked decoding against autograd through the class's own decode, in float64, on the real diffusers classes."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_vaes import VAES, build, own_decode, random_latents, timestep
from torch import Tensor, nn

import pisces.decode.replay as replay
from pisces.decode import decode, decode_and_backward, describe
from pisces.decode.cache import replaced
from pisces.decode.tiles import blend

pytestmark = pytest.mark.usefixtures("one_thread")

BIT_FOR_BIT = ("wan", "wan22", "cogvideox", "hunyuan", "image")  # what the class itself decodes piece by piece
CHUNKED = ("wan", "wan22", "cogvideox", "mochi", "hunyuan15", "ltx", "ltx_conditioned")  # with a cache that matters
TOLERANCE = 1e-12


@pytest.fixture(params=VAES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' RMSNorm sums its squares in float32 whatever the input is: 1e-7 that the order of memory decides."""
    from diffusers.models.normalization import RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normalised if self.weight is None else normalised * self.weight

    monkeypatch.setattr(RMSNorm, "forward", forward)


def some_loss(frames: Tensor) -> Tensor:
    """Non-linear, and it couples neighbouring frames."""
    loss = torch.sin(3 * frames).mean()
    return loss if frames.shape[2] == 1 else loss + (frames[:, :, 1:] - frames[:, :, :-1]).square().mean()


def gradient(function: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    """The frames and the gradient of their loss."""
    leaf = latents.detach().clone().requires_grad_()
    frames = function(leaf)
    (grad,) = torch.autograd.grad(some_loss(frames), leaf)
    return frames.detach(), grad


def away(x: Tensor, y: Tensor) -> float:
    """Relative distance."""
    return float((x - y).detach().norm() / y.norm())


def drawn(name: str, n_latents: int, **options: Any) -> tuple[Any, Tensor]:
    vae = build(name, seed=random.randrange(2**31))
    if name == "mochi" and "size" not in options:  # its normalisation wants 32 channels
        options["size"] = 2
    return vae, random_latents(vae, n_latents, **options)


@pytest.mark.parametrize("n_latents", [1, 2, 7])
def test_frames_and_gradient_equal_autograd(name: str, n_latents: int) -> None:
    if n_latents == 7 and name in ("mochi", "hunyuan15"):
        n_latents = 5  # they are the slowest
    vae, latents = drawn(name, n_latents, batch=random.choice([1, 2]))
    frames, grad = gradient(lambda z: own_decode(vae, z), latents)
    for states, chunk in zip(replay.SWEEPS, random.sample([1, 1, 2, 3], 4), strict=True):
        checkpoint = random.random() < 0.5
        options = {"states": states, "chunk": chunk, "checkpoint": checkpoint, "temb": timestep(vae, latents)}
        ours, our_grad = gradient(lambda z, options=options: decode(vae, z, **options), latents)  # type: ignore[misc]
        if name in BIT_FOR_BIT:
            assert torch.equal(ours, frames), options
        assert away(ours, frames) < TOLERANCE, options
        assert away(our_grad, grad) < TOLERANCE, options


@pytest.mark.parametrize("name", CHUNKED)
def test_a_detached_cache_fails_the_same_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = drawn(name, 5)
    temb = timestep(vae, latents)
    _, grad = gradient(lambda z: own_decode(vae, z), latents)

    def cut(*args: Any, **options: Any) -> tuple[Tensor, Any]:
        frames, cache = whole(*args, **options)
        return frames, replaced(cache, torch.Tensor.detach)

    whole = replay.run_chunk
    monkeypatch.setattr(replay, "run_chunk", cut)
    _, wrong = gradient(lambda z: decode(vae, z, temb=temb), latents)
    assert away(wrong, grad) > 0.01


def strided(tile: tuple[int, int], stride: tuple[int, int]) -> dict[str, int]:
    """Tiles and strides (height, width) in pixels, as most classes take them."""
    names = ("tile_sample_min_height", "tile_sample_min_width", "tile_sample_stride_height", "tile_sample_stride_width")
    return dict(zip(names, (*tile, *stride), strict=True))


TILES: dict[str, dict[str, float]] = {
    "wan": {**strided((12, 16), (8, 8))},
    "wan22": {**strided((24, 32), (16, 24))},
    "mochi": {**strided((24, 32), (16, 32))},
    "hunyuan": {**strided((24, 32), (16, 24))},
    "ltx": {**strided((24, 32), (16, 24))},
    "cogvideox": {
        "tile_sample_min_height": 16,
        "tile_sample_min_width": 16,
        "tile_overlap_factor_height": 0.25,
        "tile_overlap_factor_width": 0.25,
    },
    "hunyuan15": {
        "tile_sample_min_height": 64,
        "tile_sample_min_width": 64,
        "tile_latent_min_height": 4,
        "tile_latent_min_width": 4,
    },
}


@pytest.mark.parametrize("name", TILES)
def test_spatial_tiles_and_their_blending(name: str) -> None:
    vae, latents = drawn(name, 3, size=5, batch=1)
    untiled = own_decode(vae, latents)
    vae.enable_tiling(**TILES[name])
    frames, grad = gradient(lambda z: own_decode(vae, z), latents)
    assert away(frames, untiled) > 0.001, "the class did not tile"
    for options in ({"states": "keep"}, {"chunk": 2, "checkpoint": True}):
        ours, our_grad = gradient(lambda z, options=options: decode(vae, z, **options), latents)  # type: ignore[misc]
        if name in BIT_FOR_BIT:
            assert torch.equal(ours, frames)
        assert away(ours, frames) < TOLERANCE
        assert away(our_grad, grad) < TOLERANCE
    assert "tile" in describe(vae, latents)


@pytest.mark.parametrize(
    ("name", "tile", "stride", "spatial"),
    [
        ("hunyuan", 16, 12, False),
        ("hunyuan", 16, 4, False),  # a frame in more than two tiles
        ("hunyuan", 16, 12, True),
        ("ltx", 16, 8, False),
        ("ltx", 16, 8, True),
    ],
)
def test_tiles_in_time(name: str, tile: int, stride: int, spatial: bool) -> None:
    vae, latents = drawn(name, random.choice([9, 10, 11]), size=5 if spatial else 3, batch=1)
    vae.use_framewise_decoding = False
    untiled = own_decode(vae, latents)
    vae.use_framewise_decoding = True
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = tile, stride
    if spatial:
        vae.enable_tiling(**TILES[name])
    frames, grad = gradient(lambda z: own_decode(vae, z), latents)
    assert away(frames, untiled) > 0.001, "the class did not tile"
    ours, our_grad = gradient(lambda z: decode(vae, z, chunk=random.choice([1, 9])), latents)
    assert torch.equal(ours, frames) or name == "ltx"
    assert away(ours, frames) < TOLERANCE
    assert away(our_grad, grad) < TOLERANCE
    assert "tiles of time" in describe(vae, latents)


def test_blending_is_that_of_diffusers() -> None:
    vae = build("hunyuan", seed=0)
    for dtype, dim, extent in itertools.product([torch.float32, torch.bfloat16], [2, 3, 4], [0, 2, 9]):
        sizes = [1, 2, 6, 6, 6]
        before, after = (torch.randn(*sizes[:dim], n, *sizes[dim + 1 :], dtype=dtype) for n in (5, 3))
        theirs = {2: vae.blend_t, 3: vae.blend_v, 4: vae.blend_h}[dim](before, after.clone(), extent)
        assert torch.equal(blend(before, after, extent, dim=dim), theirs)


@pytest.mark.parametrize("name", [*CHUNKED, "hunyuan", "image"])
def test_chosen_frames(name: str) -> None:
    vae, latents = drawn(name, 5, batch=1)
    temb = timestep(vae, latents)
    n = own_decode(vae, latents).shape[2]
    for chosen in ([0], [-1, 2, n // 2, 2]):
        frames, grad = gradient(lambda z, chosen=chosen: own_decode(vae, z)[:, :, chosen], latents)  # type: ignore[misc]
        for memory in ("chunked", *(["plain"] if name != "hunyuan15" else [])):  # it cannot decode a batch
            options = {"frames": chosen, "memory": memory, "temb": temb}
            ours, our_grad = gradient(lambda z, options=options: decode(vae, z, **options), latents)  # type: ignore[misc]
            assert ours.shape == frames.shape
            assert away(ours, frames) < TOLERANCE
            assert away(our_grad, grad) < TOLERANCE


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[bool, list[int]]:
    """First steps of the chunks that run, with gradient and without."""
    seen: dict[bool, list[int]] = {True: [], False: []}
    whole = replay.run_chunk

    def counted(stream: Any, chunk: Any, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        seen[torch.is_grad_enabled()].append(chunk.steps.start)
        return whole(stream, chunk, *args, **options)

    monkeypatch.setattr(replay, "run_chunk", counted)
    return seen


@pytest.mark.parametrize(
    ("name", "chosen", "with_gradient", "without"),
    [
        ("wan", [5, 6], [2, 1, 0], [0, 1, 2]),  # the chunks behind are not decoded
        ("image", [3], [3], [3]),
        ("hunyuan", [14], [1, 0], [0, 1]),  # the tile, and the one that fades into it
        ("hunyuan", [31], [2], [1, 2]),  # behind where they fade
    ],
)
def test_chosen_frames_cost_what_they_reach(
    name: str, chosen: list[int], with_gradient: list[int], without: list[int], work: dict[bool, list[int]]
) -> None:
    vae, latents = drawn(name, 10)
    gradient(lambda z: decode(vae, z, frames=chosen, states="keep"), latents)
    assert work[True] == with_gradient
    assert work[False] == without


def test_chunks_beyond_the_receptive_field_cost_no_gradient(work: dict[bool, list[int]]) -> None:
    vae = build("wan", seed=0, dim_mult=[1, 1], temperal_downsample=[True], num_res_blocks=1, base_dim=4)
    latents = random_latents(vae, 40, batch=1, size=1)
    _, grad = gradient(lambda z: own_decode(vae, z)[:, :, -1:], latents)
    _, ours = gradient(lambda z: decode(vae, z, frames=[-1]), latents)
    reached = int((grad != 0).any(dim=4).any(dim=3).any(dim=1).any(dim=0).sum())
    assert reached < 30, "the test needs a video that is longer than the receptive field"
    assert away(ours, grad) < TOLERANCE
    assert reached <= len(work[True]) <= reached + 1


def test_gradients_of_the_autoencoder(name: str) -> None:
    vae, latents = drawn(name, 3)
    vae.requires_grad_(True)
    temb = timestep(vae, latents)
    frozen = next(iter(vae.decoder.parameters())).requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(some_loss(own_decode(vae, latents)), parameters, allow_unused=True)
    ours = torch.autograd.grad(some_loss(decode(vae, latents, temb=temb)), parameters, allow_unused=True)
    assert frozen.grad is None
    compared = 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None and float(other.norm()) > 0:
            # Of biases before a normalisation nothing but rounding is left.
            assert float((one - other).norm()) < TOLERANCE * max(float(other.norm()), 1.0)
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_that_of_the_forward_pass(inside: bool) -> None:
    vae = build("wan", seed=random.randrange(2**31), dtype=torch.float32).requires_grad_(True)
    latents = random_latents(vae, 3).requires_grad_()
    wanted = [latents, *(p for p in vae.decoder.parameters())]
    results = []
    for function in (lambda: own_decode(vae, latents), lambda: decode(vae, latents)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = some_loss(function())
            grads = torch.autograd.grad(loss, wanted) if inside else None
        results.append(grads or torch.autograd.grad(loss, wanted))
    for one, other in zip(*results, strict=True):
        assert away(one.double(), other.double()) < 0.05  # bfloat16's own noise
    plain = torch.autograd.grad(some_loss(own_decode(vae, latents)), latents)[0]
    assert away(results[1][0], plain) > 1e-4, "autocast had no effect"


def test_composes_with_checkpointed_steps_and_lora() -> None:
    from torch.utils.checkpoint import checkpoint

    vae, latents = drawn("wan", 3)
    base = nn.Conv3d(4, 4, 1).double().requires_grad_(False)
    down, up = (nn.Conv3d(4, 2, 1, bias=False).double(), nn.Conv3d(2, 4, 1, bias=False).double())

    def step(z: Tensor) -> Tensor:
        return z + 0.3 * torch.tanh(base(z) + up(down(z)))

    def run(function: Callable[[Tensor], Tensor], recomputed: bool) -> list[Tensor]:
        z = latents
        for _ in range(2):
            z = checkpoint(step, z, use_reentrant=False) if recomputed else step(z)
        return list(torch.autograd.grad(some_loss(function(z)), [down.weight, up.weight]))

    theirs = run(lambda z: own_decode(vae, z), False)
    for one, other in zip(run(lambda z: decode(vae, z), True), theirs, strict=True):
        assert away(one, other) < TOLERANCE
    # The decode itself inside a checkpoint
    ours = run(lambda z: checkpoint(decode, vae, z, use_reentrant=False), True)
    for one, other in zip(ours, theirs, strict=True):
        assert away(one, other) < TOLERANCE


def test_decode_and_backward() -> None:
    vae, latents = drawn("cogvideox", 4)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = some_loss(own_decode(vae, latents * scale))
    loss.backward()
    theirs, scale.grad = scale.grad, None
    value = decode_and_backward(vae, latents * scale, some_loss, states="keep")
    assert not value.requires_grad
    assert away(value, loss) < TOLERANCE
    assert scale.grad is not None
    assert theirs is not None
    assert away(scale.grad, theirs) < TOLERANCE
    with pytest.raises(ValueError, match="require no gradient"):
        decode_and_backward(vae, latents, some_loss)
    with pytest.raises(ValueError, match="one number"):
        decode_and_backward(vae, latents * scale, lambda frames: frames.mean(dim=(1, 2, 3, 4)))


def test_a_second_backward_pass_and_a_double_one() -> None:
    vae, latents = drawn("wan", 5)
    latents.requires_grad_()
    loss = some_loss(decode(vae, latents))
    first = torch.autograd.grad(loss, latents, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, latents, retain_graph=True)[0], first)
    (grad,) = torch.autograd.grad(loss, latents, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_without_gradient_nothing_is_saved() -> None:
    vae, latents = drawn("wan", 4)
    assert not decode(vae, latents).requires_grad
    with torch.no_grad():
        frames = decode(vae, latents.clone().requires_grad_())
    assert not frames.requires_grad
    assert torch.equal(frames, own_decode(vae, latents))


def test_random_numbers_are_those_of_the_forward_pass() -> None:
    vae = build("wan", seed=1, dropout=0.3).train()
    latents = random_latents(vae, 5)
    results = []
    for function in (lambda z: own_decode(vae, z), lambda z: decode(vae, z, states="cbrt", checkpoint=True)):
        torch.manual_seed(7)
        results.append(gradient(function, latents))
        results[-1] += (torch.rand(1),)  # type: ignore[assignment]
    for one, other in zip(*results, strict=True):
        assert away(one, other) < TOLERANCE


def test_noise_that_a_decoder_injects_is_repeated() -> None:
    vae = build("ltx", seed=1, decoder_inject_noise=(True,) * 5, decoder_block_out_channels=(8,) * 4)
    latents = random_latents(vae, 3)
    results = []
    for function in (lambda z: own_decode(vae, z), lambda z: decode(vae, z)):
        torch.manual_seed(7)
        results.append(gradient(function, latents))
    assert away(results[1][0], results[0][0]) < TOLERANCE
    assert away(results[1][1], results[0][1]) < TOLERANCE
    assert "noise" in describe(vae, latents)


def fingerprint(vae: nn.Module) -> list[Any]:
    """Everything that a module tree holds, by identity."""
    return [
        (name, type(module), module.training, sorted((key, id(value)) for key, value in vars(module).items()))
        for name, module in vae.named_modules()
    ]


def test_the_autoencoder_is_left_as_it_was_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = drawn(name, 5)
    before = fingerprint(vae)
    temb = timestep(vae, latents)
    gradient(lambda z: decode(vae, z, temb=temb, checkpoint=True), latents)
    assert fingerprint(vae) == before

    whole = replay.run_chunk
    for calls in (1, 3, 6):  # in the first pass, and in the second
        remaining = iter(range(calls))

        def failing(*args: Any, remaining: Iterator[int] = remaining, **options: Any) -> tuple[Tensor, Any]:
            if next(remaining, None) is None:
                raise MemoryError("half way")
            return whole(*args, **options)

        monkeypatch.setattr(replay, "run_chunk", failing)
        with contextlib.suppress(MemoryError):
            gradient(lambda z: decode(vae, z, temb=temb), latents)
        assert fingerprint(vae) == before


def test_slicing_decodes_one_video_at_a_time(work: dict[bool, list[int]]) -> None:
    vae, latents = drawn("wan", 3, batch=3)
    vae.enable_slicing()
    frames, grad = gradient(lambda z: own_decode(vae, z), latents)
    ours, our_grad = gradient(lambda z: decode(vae, z), latents)
    assert torch.equal(ours, frames)
    assert away(our_grad, grad) < TOLERANCE
    assert len(work[True]) == 9


def test_offloading_hooks_run_before_each_pass() -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            self.calls += 1

    vae, latents = drawn("wan", 2)
    hook = vae._hf_hook = Hook()
    gradient(lambda z: decode(vae, z), latents)
    assert hook.calls >= 2


def test_a_class_that_nobody_taught() -> None:
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(4, 3, 3, padding=1).double()

        def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (torch.tanh(self.layer(z)).repeat_interleave(2, dim=2),)

    vae = Stranger()
    latents = torch.randn(2, 4, 5, 3, 3, dtype=torch.float64)
    frames, grad = gradient(lambda z: vae.decode(z)[0][:, :, [3, 1]], latents)
    with pytest.warns(UserWarning, match="Stranger is not known here"):
        ours, our_grad = gradient(lambda z: decode(vae, z, frames=[3, 1]), latents)
    assert away(ours, frames) < TOLERANCE
    assert away(our_grad, grad) < TOLERANCE
    assert "one piece" in describe(vae, latents)


def test_an_untaught_class_with_caches_inside_its_modules() -> None:
    from diffusers import AutoencoderKLMagvit

    torch.manual_seed(0)
    vae = AutoencoderKLMagvit(latent_channels=4, block_out_channels=[4, 8, 8, 8], norm_num_groups=2, layers_per_block=1)
    vae = vae.double().eval().requires_grad_(False)
    latents = torch.randn(2, 4, 3, 3, 4, dtype=torch.float64)
    frames, grad = gradient(lambda z: vae.decode(z, return_dict=False)[0], latents)
    with pytest.warns(UserWarning, match="AutoencoderKLMagvit is not known here"):
        ours, our_grad = gradient(lambda z: decode(vae, z), latents)
    assert away(ours, frames) < TOLERANCE
    assert away(our_grad, grad) < TOLERANCE


def test_low_precision_rounds_as_the_class_does() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vae = build("wan", seed=random.randrange(2**31), dtype=dtype)
        latents = random_latents(vae, 3)
        frames, grad = gradient(lambda z, vae=vae: own_decode(vae, z), latents)  # type: ignore[misc]
        ours, our_grad = gradient(lambda z, vae=vae: decode(vae, z), latents)  # type: ignore[misc]
        assert torch.equal(ours, frames)
        assert our_grad.dtype == dtype
        assert away(our_grad.double(), grad.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "memory is 'chunk', expected one of 'chunked', 'plain'", {"memory": "chunk"}),
        (ValueError, "states is 'none', expected one of 'keep'", {"states": "none"}),
        (ValueError, "chunk is 0, expected at least 1", {"chunk": 0}),
        (ValueError, r"frames has \[9\], expected numbers from -9 to 8", {"frames": [0, 9]}),
        (ValueError, "frames is empty", {"frames": []}),
        (ValueError, r"shape \(4, 3, 3, 4\), expected \[B, C, t, h, w\]", {"latents": torch.zeros(4, 3, 3, 4)}),
        (ValueError, "none of them 0", {"latents": torch.zeros(1, 4, 0, 3, 4)}),
        (TypeError, "latents are torch.int64", {"latents": torch.zeros(1, 4, 3, 3, 4, dtype=torch.int64)}),
        (TypeError, "vae is a str, expected an autoencoder", {"vae": "wan"}),
    ],
)
def test_what_is_wrong_is_said(error: type[Exception], message: str, change: dict[str, Any]) -> None:
    vae = build("wan", seed=0)
    arguments = {"vae": vae, "latents": random_latents(vae, 3), **change}
    with pytest.raises(error, match=message):
        decode(arguments.pop("vae"), arguments.pop("latents"), **arguments)


def test_a_conditioned_decoder_wants_its_timestep() -> None:
    vae, latents = drawn("ltx_conditioned", 2)
    with pytest.raises(ValueError, match="Pass temb"):
        decode(vae, latents)
