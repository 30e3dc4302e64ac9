"""Tiny random models of transformers, with tokenizers and image processors, as directories on the disk."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

# X-CLIP pools at the greatest index, which is that of the end
WORDS = ["<pad>", "<unk>", "<bos>", "a", "red", "blue", "dog", "runs", "over", "hill", "<eos>"]
LETTERS = ["<pad>", "<unk>", "<bos>", "▁", *"abcdefghijklmnopqrstuvwxyz", "<eos>"]
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    **TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 12,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": len(WORDS) - 1, "sep_token_id": len(WORDS) - 1,
}  # fmt: skip
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
NAMES = ("clip", "siglip", "siglip2", "xclip", "blip")


def tiny_model(name: str) -> nn.Module:
    """Random weights, in eval mode, large enough for outputs to differ between inputs."""
    import transformers as t

    if name == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    elif name == "siglip":
        model = t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION))
    elif name == "siglip2":
        vision = {**TOWER, "num_patches": 4, "patch_size": 8}
        text = {**TEXT, "vocab_size": len(LETTERS), "eos_token_id": len(LETTERS) - 1, "max_position_embeddings": 40}
        model = t.Siglip2Model(t.Siglip2Config(text_config=text, vision_config=vision))
    elif name == "xclip":
        mit = {"mit_hidden_size": 8, "mit_intermediate_size": 8, "mit_num_hidden_layers": 1}
        vision = {**VISION, "num_frames": 4, "mit_num_attention_heads": 2, **mit}
        config = t.XCLIPConfig(
            text_config=TEXT, vision_config=vision, projection_dim=8, prompt_layers=1, prompt_num_attention_heads=2
        )
        model = t.XCLIPModel(config)
    else:
        config = t.BlipConfig(
            text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION, image_text_hidden_size=8
        )
        model = t.BlipForImageTextRetrieval(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.0 / p[0].numel() ** 0.5)
    return model.eval()


def save_tiny(name: str, directory: Path) -> nn.Module:
    """Write a directory as published ones are; returns the model in it."""
    import transformers as t

    t.utils.logging.disable_progress_bar()
    model = tiny_model(name)
    model.save_pretrained(directory)
    save_tokenizer(name, directory)
    kinds = {
        "siglip": t.SiglipImageProcessorPil,
        "siglip2": t.Siglip2ImageProcessorPil,
        "blip": t.BlipImageProcessorPil,
    }
    kinds.get(name, t.CLIPImageProcessorPil)(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(
        directory
    )
    return model


def save_tokenizer(name: str, directory: Path) -> None:
    """Words of their own, or letters for SigLIP 2, whose tokenizer has rules of its own and pads on the left."""
    import transformers as t

    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    siglip = name.startswith("siglip")
    ends = [(end, (LETTERS if name == "siglip2" else WORDS).index(end)) for end in ("<bos>", "<eos>")]
    template = TemplateProcessing(single="$A <eos>" if siglip else "<bos> $A <eos>", special_tokens=ends)
    if name == "siglip2":
        pieces = t.Siglip2Tokenizer(vocab={piece: i for i, piece in enumerate(LETTERS)}, merges=[], **names)
        pieces.backend_tokenizer.post_processor = template
    else:
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.post_processor = Whitespace(), template
        pieces = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    pieces.save_pretrained(directory)
