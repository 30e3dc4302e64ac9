"""Training the small generators: a WanTransformer3DModel with a UMT5 encoder, packed as a diffusers WanPipeline.

Two are trained by the same recipe on different data. The good one sees clean videos with true captions. The base is
deliberately weak, so that post-training has something to improve: it trains for a short time, on damaged videos and
captions of which many lie, as web data does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pisces.world.recipe import Log, Muon, run_steps, set_learning_rate, split_for_muon, step_generator
from pisces.world.scene import VOCABULARY, captions, corrupt_frames, corrupt_scenes, render, sample_scenes

MAX_TOKENS = 20  # two objects, seven fillers and the end token
TEXT_WIDTH = 64
FLOW_SHIFT = 2.0
# Without it the scheduler's last step starts at sigma .004: a full evaluation without effect, and without gradient.
LAST_SIGMA = 0.2
BATCH = 32
CAPTION_DROP = 0.1  # for classifier-free guidance


@dataclass(frozen=True)
class GeneratorData:
    """What a generator is trained on.

    Attributes:
        videos: number of videos.
        steps: training steps.
        damage: probability of each damage of `corrupt_frames`.
        lies: probability that an attribute in a caption is replaced by a random one.
        fillers: probability that a caption has filler words.
    """

    videos: int
    steps: int
    damage: float = 0.0
    lies: float = 0.0
    fillers: float = 0.0


GOOD = GeneratorData(videos=3072, steps=2400, fillers=0.3)
BASE = GeneratorData(videos=3072, steps=700, damage=0.3, lies=0.3, fillers=0.5)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the small world's vocabulary."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[unk]"))
    words.pre_tokenizer = WhitespaceSplit()
    end = VOCABULARY.index("[sep]")
    words.post_processor = TemplateProcessing(single="$A [sep]", special_tokens=[("[sep]", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[pad]",
        unk_token="[unk]",
        eos_token="[sep]",
        model_max_length=MAX_TOKENS,
    )


def build_pipeline(vae: AutoencoderKLWan, seed: int) -> WanPipeline:
    """The whole pipeline with an untrained transformer and text encoder."""
    torch.manual_seed(seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(VOCABULARY),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=VOCABULARY.index("[sep]"),
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    )
    channels = vae.config.z_dim
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=288,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT, shift_terminal=LAST_SIGMA),
    )


@torch.no_grad()
def latent_bank(vae: AutoencoderKLWan, data: GeneratorData, seed: int) -> tuple[Tensor, list[str]]:
    """(normalised latents [n, C, t, h, w], captions) of training videos without the held-out combinations."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents, texts = [], []
    for start in range(0, data.videos, 64):
        scenes = sample_scenes(min(64, data.videos - start), generator, split="train")
        frames = corrupt_frames(render(scenes, generator), generator, data.damage)
        posterior = vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist
        latents.append((posterior.mean - mean) / std)
        texts += captions(corrupt_scenes(scenes, generator, data.lies), generator, fillers=data.fillers)
    return torch.cat(latents), texts


def encode_ids(text_encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """[B, L, D] text states, zero behind the end token, as WanPipeline makes them."""
    mask = ids != 0
    return text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]


def flow_loss(pipe: WanPipeline, latents: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """E || v(x_sigma, sigma, text) - (noise - x0) ||^2 with x_sigma = sigma noise + (1 - sigma) x0, sigma shifted."""
    u = torch.sigmoid(torch.randn(len(latents), generator=generator))
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=generator)
    s = sigma.view(-1, 1, 1, 1, 1)
    text = encode_ids(pipe.text_encoder, ids)
    velocity = pipe.transformer(s * noise + (1 - s) * latents, sigma * 1000, text, return_dict=False)[0]
    return (velocity - (noise - latents)).square().mean()


def train_generator(
    vae: AutoencoderKLWan, data: GeneratorData, state_file: Path, *, name: str, seed: int = 0, log: Log = print
) -> WanPipeline:
    """Train transformer and text encoder together, or go on from `state_file`; a few minutes on one core.

    Args:
        vae: the trained VAE, left as it is.
        data: what to train on.
        state_file: everything that resuming needs; left behind for the caller to remove.
        name: the word that opens each line of the log.
        seed: of the weights, the data and every batch.
        log: takes one line of progress.

    Returns:
        The pipeline with the exponential moving average of the weights.
    """
    vae = vae.requires_grad_(False).eval()
    pipe = build_pipeline(vae, seed)
    model = nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    latents, texts = latent_bank(vae, data, seed=500 + seed)
    ids = _tokenize(pipe.tokenizer, texts)
    nothing = _tokenize(pipe.tokenizer, [""])

    big, rest = split_for_muon(
        model.named_parameters(),
        matrices=lambda key, p: ".blocks." in key and p.dim() == 2 and min(p.shape) > 16,
    )
    muon = Muon(big, lr=0.01)
    adam = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=_warm_average, use_buffers=True)

    def step(i: int) -> dict[str, float]:
        generator = step_generator(seed, i)
        index = torch.randint(0, len(latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROP
        loss = flow_loss(pipe, latents[index], torch.where(dropped[:, None], nothing, ids[index]), generator)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in (muon, adam):
            remaining = 1 - i / data.steps
            set_learning_rate(optimizer, min(1, (i + 1) / 50) * max(0.02, min(1, remaining / 0.5)))
            optimizer.step()
        average.update_parameters(model)
        return {"loss": loss.item()}

    stateful = {"model": model, "average": average, "muon": muon, "adam": adam}
    settings = {"seed": seed, **asdict(data)}
    run_steps(name, steps=data.steps, step=step, stateful=stateful, state_file=state_file, settings=settings, log=log)
    model.load_state_dict(average.module.state_dict())
    model.requires_grad_(False).eval()
    return pipe


def _warm_average(average: Tensor, new: Tensor, n: Tensor | int) -> Tensor:
    """Decay min(.99, (n+1)/(n+20)): short runs forget their start."""
    decay = min(0.99, (int(n) + 1) / (int(n) + 20))
    return average + (1 - decay) * (new - average)


def _tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """[n, MAX_TOKENS] long, zero behind the end token."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
