"""Tokenizers of the tiny pipelines: bytes for words, made without a file."""

from __future__ import annotations

from typing import Any

SPECIAL = ["<pad>", "</s>", "<unk>", "<prefix>"]
TEMPLATE_TOKENS = 95  # what HunyuanVideo 1.0 cuts off: its instructions
CHAT_TOKENS = 108  # the same of HunyuanVideo 1.5


def byte_tokenizer(max_length: int, *, normalizer: Any = None, end: bool = True) -> Any:
    """One token a byte, behind ``</s>`` if ``end``; padded to the right."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=token == "<prefix>") for token in SPECIAL])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )


def template_tokenizer() -> Any:
    """For HunyuanVideo 1.0: its instructions take the 95 tokens that the pipeline cuts off, as Llama's do."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import normalizers

    prefix = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    return byte_tokenizer(1024, normalizer=normalizers.Replace(prefix, "<prefix>" * TEMPLATE_TOKENS), end=False)


def chat_tokenizer() -> Any:
    """For HunyuanVideo 1.5: its system message takes the 108 tokens that the pipeline cuts off, as Qwen's does."""
    tokenizer = byte_tokenizer(2048, end=False)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        + "<prefix>" * CHAT_TOKENS
        + "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
    )
    return tokenizer
