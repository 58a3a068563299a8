"""Architectures of transformers, built from small configs with random weights: no files are fetched."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]
_VOCABULARY, _TOKENS, _BATCH = 64, 9, 2
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
_BART: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 3,
    "mask_time_prob": 0.0,
}


def hugging_face_models() -> dict[str, Build]:
    """{name: function that builds the model and its example inputs}."""
    return _ENCODERS | _DECODERS | _EXPERTS | _ENCODER_DECODERS | _VISION | _AUDIO


def _model(kind: str, config: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Build:
    def build() -> tuple[nn.Module, Any]:
        return getattr(transformers, kind)(getattr(transformers, config)(**options)), inputs()

    return build


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, _VOCABULARY, (_BATCH, _TOKENS))}


def _both_tokens() -> dict[str, Any]:
    return _tokens() | {"decoder_input_ids": torch.randint(3, _VOCABULARY, (_BATCH, 7))}


def _pixels(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(_BATCH, 3, size, size)}


def _encoder(family: str, kind: str = "ForSequenceClassification", **options: Any) -> Build:
    return _model(f"{family}{kind}", f"{family}Config", _SIZES | options, _tokens)


def _decoder(family: str, kind: str = "ForCausalLM", **options: Any) -> Build:
    return _model(f"{family}{kind}", f"{family}Config", _DECODER | options, _tokens)


def _encoder_decoder(family: str, **options: Any) -> Build:
    return _model(f"{family}ForConditionalGeneration", f"{family}Config", _BART | options, _both_tokens)


def _vision(family: str, size: int = 32, **options: Any) -> Build:
    sizes = {**_SIZES, "image_size": size, "patch_size": 8, "num_labels": 5, **options}
    for unused in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        del sizes[unused]
    return _model(f"{family}ForImageClassification", f"{family}Config", sizes, _pixels(size))


def _stages(family: str, **options: Any) -> Build:
    """A vision model of two stages, one layer each."""
    sizes = {"depths": [1, 1], "num_labels": 5, **options}
    return _model(f"{family}ForImageClassification", f"{family}Config", sizes, _pixels(32))


def _speech(family: str, **options: Any) -> Build:
    inputs: Callable[[], dict[str, Any]] = lambda: {"input_values": torch.randn(_BATCH, 800)}  # noqa: E731
    return _model(f"{family}ForSequenceClassification", f"{family}Config", _SPEECH | options, inputs)


_ENCODERS = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "camembert": _encoder("Camembert"),
    "xlm-roberta": _encoder("XLMRoberta"),
    "electra": _encoder("Electra", embedding_size=16),
    "albert": _encoder("Albert", embedding_size=16),
    "mpnet": _encoder("MPNet"),
    "distilbert": _encoder("DistilBert", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    "deberta-v2": _encoder("DebertaV2"),
    "modernbert": _encoder("ModernBert", cls_token_id=1, sep_token_id=2),
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DECODERS = {
    "gpt2": _decoder("GPT2", "LMHeadModel", **_GPT),
    "gpt-j": _decoder("GPTJ", rotary_dim=4, **_GPT),
    "gpt-neo": _decoder(
        "GPTNeo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4
    ),
    "gpt-neox": _decoder("GPTNeoX"),
    "opt": _decoder("OPT", ffn_dim=64, word_embed_proj_dim=32),
    "bloom": _decoder("Bloom", n_layer=2, n_head=4),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral", sliding_window=None),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma"),
    "gemma2": _decoder("Gemma2", query_pre_attn_scalar=8),
    "phi": _decoder("Phi"),
    "stablelm": _decoder("StableLm"),
    "olmo": _decoder("Olmo"),
}
_EXPERTS = {
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _decoder(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
    "olmoe": _decoder("Olmoe", num_experts=4, num_experts_per_tok=2),
    "granite-moe": _decoder("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
}
_ENCODER_DECODERS = {
    "t5": _model(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": _VOCABULARY,
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        _both_tokens,
    ),
    "bart": _encoder_decoder("Bart"),
    "mbart": _encoder_decoder("MBart"),
    "pegasus": _encoder_decoder("Pegasus"),
    "m2m-100": _encoder_decoder("M2M100"),
}
_VISION = {
    "vit": _vision("ViT"),
    "deit": _vision("DeiT"),
    "beit": _vision("Beit", use_mask_token=False),
    "dinov2": _vision("Dinov2"),
    "swin": _stages("Swin", image_size=32, patch_size=2, embed_dim=16, num_heads=[2, 4], window_size=4),
    "convnext": _stages("ConvNext", patch_size=4, hidden_sizes=[16, 24], num_stages=2),
    "resnet": _stages("ResNet", embedding_size=16, hidden_sizes=[16, 32]),
    "segformer": _stages(
        "Segformer", num_encoder_blocks=2, hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1]
    ),
}
_AUDIO = {
    "wav2vec2": _speech("Wav2Vec2"),
    "hubert": _speech("Hubert"),
    "whisper": _model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
        lambda: {
            "input_features": torch.randn(_BATCH, 8, 32),
            "decoder_input_ids": torch.randint(3, _VOCABULARY, (_BATCH, 7)),
        },
    ),
    "audio-spectrogram": _model(
        "ASTForAudioClassification",
        "ASTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
            "num_labels": 3,
        },
        lambda: {"input_values": torch.randn(_BATCH, 32, 16)},
    ),
}
