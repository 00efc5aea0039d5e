"""Tiny models with random weights, from their configs, and a batch for each. Libraries are imported when asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, BLOCKS = 99, 32, 3


class Architecture(NamedTuple):
    """A model and a batch of keyword arguments; ``generates``: greedy decoding with and without a cache is compared."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    generates: bool = False


SIZES: dict[str, Any] = {  # a config gets those that it knows
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_inner": 48, "n_positions": 64, "rotary_dim": 4, "ffn_dim": 48,
    "word_embed_proj_dim": WIDTH, "d_model": WIDTH, "n_heads": 4, "n_layers": BLOCKS, "max_seq_len": 64, "d_ff": 48,
    "d_kv": 8, "num_layers": BLOCKS, "num_decoder_layers": BLOCKS, "num_heads": 4, "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "embedding_size": WIDTH, "dim": WIDTH, "hidden_dim": 48, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "image_size": 16, "patch_size": 4,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 48, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "state_size": 4, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "dropout": 0.0, "dropout_rate": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "expert_capacity": 64, "initializer_range": 0.2, "drop_path_rate": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "layerdrop": 0.0, "max_target_positions": 32, "max_source_positions": 12,
    "num_mel_bins": 8, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "sliding_window": 16,
}  # fmt: skip


DELTAS: dict[str, Any] = {  # layers of a gated delta net around one of attention
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LEFT_OUT = object()  # a size that a config must not be given


def tiny_config(name: str, **changes: Any) -> Any:
    """``transformers.<name>Config`` with small sizes and without dropout."""
    import transformers

    kind = getattr(transformers, name + "Config")
    known = kind()
    fixed = {key for key, value in vars(kind).items() if isinstance(value, property)}
    sizes = {key: value for key, value in SIZES.items() if hasattr(known, key) and key not in fixed} | changes
    config = kind(**{key: value for key, value in sizes.items() if value is not LEFT_OUT})
    config._experts_implementation = "eager"  # the others know no float64
    return config


def built(name: str, head: str, **changes: Any) -> Callable[[], nn.Module]:
    """Makes ``transformers.<name><head>``, or what ``Auto<head>`` takes for the config."""

    def make() -> nn.Module:
        import transformers

        config = tiny_config(name, **changes)
        kind = getattr(transformers, name.removesuffix("Text") + head, None) or getattr(transformers, name + head, None)
        model: nn.Module = (
            kind(config) if kind is not None else getattr(transformers, "Auto" + head).from_config(config)
        )
        return model

    return make


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY - 9, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def text() -> dict[str, Any]:
    return {"input_ids": tokens(2, 7)}


def two_texts() -> dict[str, Any]:
    return {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 6, 1)}


def image(size: int = 16) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": noise(2, 3, size, size)}


def text_and_image() -> dict[str, Any]:
    return {"input_ids": tokens(2, 16), "pixel_values": noise(2, 3, 16, 16)}  # as many tokens as patches


def decoders() -> list[Architecture]:
    plain = {name: {} for name in (
        "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi", "Phi3", "Olmo", "Olmo2", "Cohere",
        "Cohere2", "Granite", "StableLm", "Starcoder2", "GPTNeoX", "GPTJ", "OPT", "Bloom", "Falcon", "Mpt", "CodeGen",
        "Persimmon", "Glm", "Glm4", "Helium", "Nemotron", "SmolLM3", "Exaone4", "SeedOss", "BioGpt", "Arcee",
        "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "Phimoe", "Glm4Moe", "DeepseekV2", "DeepseekV3",
        "Mamba", "Mamba2", "FalconMamba", "GPTBigCode", "Ernie4_5", "Lfm2", "Apertus", "Bamba", "Jamba", "Llama4Text",
        "RecurrentGemma", "Afmoe", "AriaText", "BitNet", "Cohere2Moe", "Cwm", "DeepseekV4", "DiffLlama", "Doge",
        "Dots1", "Ernie4_5_Moe", "ExaoneMoe", "FlexOlmo", "GptOss", "GraniteMoeShared", "HYV3", "HunYuanDenseV1",
        "HunYuanMoEV1", "HyperCLOVAX", "Jais2", "Laguna", "Lfm3", "Mellum", "MiMoV2Flash", "MiniMax", "MiniMaxM2",
        "Ministral", "Ministral3", "ModernBertDecoder", "NanoChat", "Olmo3", "OlmoHybrid", "SolarOpen", "VaultGemma",
    )}  # fmt: skip
    plain["GPTNeo"] = {"attention_types": [[["global", "local"], 2]], "num_hidden_layers": 4, "num_layers": 4}
    plain["Mamba2"] = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    plain["Bamba"] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
                      "mamba_chunk_size": 4, "attn_layer_indices": [1]}  # fmt: skip
    plain["Jamba"] = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    plain["Jamba"] |= {"use_mamba_kernels": False}
    plain["DeepseekV2"] = {"topk_method": "greedy", "num_key_value_heads": 4, "head_dim": 4}
    plain["DeepseekV3"] = {"num_key_value_heads": 4, "head_dim": 4}
    plain["RecurrentGemma"] = {"lru_width": WIDTH, "attention_window_size": 8}
    plain["Lfm2"] = {"layer_types": ["conv", "full_attention", "conv"]}
    latent = {"num_key_value_heads": 4, "head_dim": 4}  # of keys and values
    plain |= {name: latent for name in ("Youtu", "MiniCPM3", "LongcatFlash", "AXK1")}
    plain |= {name: latent | {"index_n_heads": 4, "index_head_dim": 8} for name in ("GlmMoeDsa", "DeepseekV32")}
    plain["Mistral4"] = latent | {"head_dim": LEFT_OUT, "qk_head_dim": 12}
    plain["Glm4MoeLite"] = latent | {"qk_head_dim": 12}
    plain |= {name: DELTAS for name in ("Qwen3Next", "Qwen3_5Text", "Qwen3_5MoeText")}
    plain["Lfm2Moe"] = {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1}
    plain["Zaya"] = {"num_experts_per_tok": 1}
    plain["GraniteMoeHybrid"] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
                                 "mamba_chunk_size": 4, "layer_types": ["mamba", "attention", "mamba"],
                                 "shared_intermediate_size": 48}  # fmt: skip
    by_layer = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}  # fmt: skip
    plain["Gemma3nText"] = by_layer | {"num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2}
    plain["Gemma3nText"] |= {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4}
    plain["Llama4Text"] = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
    found = [
        Architecture(name, "decoder", built(name, "ForCausalLM", **changes), text, True)
        for name, changes in plain.items()
    ]
    of_gemma4 = {
        "Gemma4": {},
        "Gemma4 (shared keys)": {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        "Gemma4 (experts)": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        "Gemma4 (values are keys)": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    }
    return found + [
        Architecture(name, "decoder", gemma4(**(by_layer | {"num_kv_shared_layers": 0} | changes)), text, True)
        for name, changes in of_gemma4.items()
    ]


def gemma4(**changes: Any) -> Callable[[], nn.Module]:
    """Whose config has sizes by layer, which cannot be asked for as those of others."""

    def make() -> nn.Module:
        from transformers import Gemma4ForCausalLM, Gemma4TextConfig

        known = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
                 "initializer_range", "sliding_window", "moe_intermediate_size")  # fmt: skip
        config = Gemma4TextConfig(**({name: SIZES[name] for name in known} | {"global_head_dim": 16} | changes))
        config._experts_implementation = "eager"
        return Gemma4ForCausalLM(config)

    return make


def encoders() -> list[Architecture]:
    plain: dict[str, Mapping[str, Any]] = {name: {} for name in (
        "Bert", "Roberta", "DistilBert", "Albert", "Electra", "MPNet", "ModernBert", "Nystromformer", "ConvBert", "Esm",
        "RoFormer", "SqueezeBert", "MobileBert", "XLNet", "RemBert", "FNet", "IBert", "MegatronBert", "LayoutLM",
        "BigBird", "Longformer", "Funnel",
    )}  # fmt: skip
    plain["XLNet"] = {"max_position_embeddings": LEFT_OUT}
    plain["Funnel"] = {"num_hidden_layers": LEFT_OUT, "block_sizes": [2, 2]}
    plain["BigBird"] = {"attention_type": "original_full"}
    plain["Longformer"] = {"attention_window": 4}
    plain["MobileBert"] = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    plain["MobileBert"] |= {"normalization_type": "layer_norm"}  # without norms its values explode
    shared = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    shared |= {"share_att_key": True, "norm_rel_ebd": "layer_norm"}
    made = {name: built(name, "Model", **changes) for name, changes in plain.items()}
    made["DebertaV2 (shared key)"] = built("DebertaV2", "Model", **shared)
    made["Deberta"] = built("Deberta", "Model", relative_attention=True, pos_att_type=["c2p", "p2c"])
    found = [Architecture(name, "encoder", make, text) for name, make in made.items()]
    chunks = built("Bert", "Model", chunk_size_feed_forward=2)
    return [*found, Architecture("Bert (chunked)", "encoder", chunks, lambda: {"input_ids": tokens(2, 8)})]


def encoder_decoders() -> list[Architecture]:
    plain: dict[str, Mapping[str, Any]] = {name: {} for name in (
        "T5", "MT5", "UMT5", "Bart", "MBart", "Pegasus", "Marian", "M2M100", "Blenderbot", "LongT5", "PLBart",
        "SwitchTransformers", "NllbMoe", "ProphetNet", "LED",
    )}  # fmt: skip
    plain["T5"] = {"decoder_start_token_id": 1}
    plain["SwitchTransformers"] = {"num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3}
    plain["NllbMoe"] = {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
    plain["LED"] = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    plain["ProphetNet"] = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    plain["ProphetNet"] |= {"num_hidden_layers": LEFT_OUT, "num_encoder_layers": 3}
    head = {"Marian": "MTModel"}
    made = {name: built(name, head.get(name, "ForConditionalGeneration"), **changes) for name, changes in plain.items()}
    return [Architecture(name, "encoder-decoder", make, two_texts, True) for name, make in made.items()]


def vision() -> list[Architecture]:
    free = {"num_hidden_layers": LEFT_OUT, "num_layers": LEFT_OUT}
    stages = free | {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2}
    stages["num_attention_heads"] = LEFT_OUT
    pyramid = free | {
        "num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
        "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
    }  # fmt: skip
    plain: dict[str, Mapping[str, Any]] = {name: {} for name in (
        "ViT", "DeiT", "Beit", "Dinov2", "IJepa", "Data2VecVision", "ViTMSN", "Dinov2WithRegisters", "DINOv3ViT",
    )}  # fmt: skip
    plain |= {"Swin": stages, "Swinv2": stages, "Segformer": pyramid}
    plain["ConvNext"] = free | {"depths": [2, 2], "hidden_sizes": [16, 32], "num_stages": 2}
    plain["Yolos"] = {"num_detection_tokens": 3, "image_size": [16, 16]}
    return [Architecture(name, "vision", built(name, "Model", **changes), image()) for name, changes in plain.items()]


SMALL = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
TEXT = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
IMAGE = SMALL | {"image_size": 16, "patch_size": 4}


IMAGE_TOKEN, VIDEO_TOKEN = VOCABULARY - 1, VOCABULARY - 2


def after_image_tokens(count: int, rows: int = 2, **more: Any) -> Callable[[], dict[str, Any]]:
    """Image tokens, then a text, with what else a model of both is given."""

    def batch() -> dict[str, Any]:
        ids = torch.cat([torch.full((rows, count), IMAGE_TOKEN), tokens(rows, 5)], 1)
        given = {key: value(ids) if callable(value) else value for key, value in more.items()}
        return {"input_ids": ids, "pixel_values": noise(rows, 3, 16, 16)} | given

    return batch


def multimodal() -> list[Architecture]:
    two = {"text_config": TEXT, "vision_config": IMAGE}
    llama = TEXT | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
    clip = IMAGE | {"model_type": "clip_vision_model"}
    llava = two | {"text_config": llama, "vision_config": clip, "image_token_index": IMAGE_TOKEN}
    llava |= {"vision_feature_layer": -1, "image_seq_length": 16}
    siglip = IMAGE | {"model_type": "siglip_vision_model"}
    pali = {"text_config": llama | {"model_type": "gemma"}, "vision_config": siglip, "projection_dim": WIDTH}
    pali |= {"image_token_id": IMAGE_TOKEN}
    blip = {"text_config": TEXT | {"encoder_hidden_size": WIDTH}, "vision_config": IMAGE, "projection_dim": WIDTH}
    gemma3 = {"text_config": llama | {"model_type": "gemma3_text"}, "vision_config": IMAGE, "mm_tokens_per_image": 4}
    small = {"text_config": llama, "vision_config": IMAGE, "scale_factor": 2}
    pixtral = IMAGE | {"model_type": "pixtral", "head_dim": 8}
    mistral3 = {"text_config": llama, "vision_config": pixtral, "spatial_merge_size": 2}
    qwen = llama | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    del qwen["model_type"]
    view = {"depth": BLOCKS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 4}
    view |= {"in_channels": 3, "intermediate_size": 48, "temporal_patch_size": 2, "out_hidden_size": WIDTH}
    viewed = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
    generated: dict[str, tuple[str, Any, Callable[[], dict[str, Any]]]] = {
        "Llava": ("Llava", llava, after_image_tokens(16)),
        "PaliGemma": ("PaliGemma", pali, after_image_tokens(16)),
        "Gemma3": ("Gemma3", gemma3 | {"image_token_id": IMAGE_TOKEN}, after_image_tokens(
            4, token_type_ids=lambda ids: (ids == IMAGE_TOKEN).long())),
        "SmolVLM": ("SmolVLM", small | {"image_token_id": IMAGE_TOKEN}, after_image_tokens(
            4, pixel_values=noise(2, 1, 3, 16, 16))),
        "Mistral3": ("Mistral3", mistral3 | {"image_token_index": IMAGE_TOKEN}, after_image_tokens(
            4, image_sizes=torch.tensor([[16, 16]] * 2))),
    }  # fmt: skip
    views = after_image_tokens(
        4, 1, pixel_values=noise(16, 96), image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=lambda ids: (ids == IMAGE_TOKEN).int(),
    )  # fmt: skip
    generated |= {
        name: (name, viewed | {"text_config": text_config, "vision_config": view | more}, views)
        for name, text_config, more in (
            ("Qwen2VL", qwen, {"mlp_ratio": 2}),
            ("Qwen2_5_VL", qwen, {"window_size": 16, "fullatt_block_indexes": [1]}),
            ("Qwen3VL", qwen, {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}),
            ("Qwen3_5", qwen | DELTAS, {"num_position_embeddings": 16}),
        )
    }
    names = ("CLIP", "Siglip", "ChineseCLIP", "AltCLIP", "CLIPSeg")
    found = [(name, built(name, "Model", **two), text_and_image) for name in names]
    found += [(n, built(kind, "ForConditionalGeneration", **c), batch) for n, (kind, c, batch) in generated.items()]
    found += [
        ("Blip", built("Blip", "Model", **blip), text_and_image),
        ("Vilt", built("Vilt", "Model"), lambda: text() | image()()),
        ("Git", built("Git", "ForCausalLM", vision_config=IMAGE), lambda: {"input_ids": tokens(2, 6)} | image()()),
    ]
    alone = built("Llava", "ForConditionalGeneration", **llava)
    return [
        *(Architecture(name, "multimodal", make, batch) for name, make, batch in found),
        Architecture("Llava (text only)", "multimodal", alone, text, True),
    ]


def speech() -> list[Architecture]:
    convolutions = {
        "conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4], "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False, "num_feat_extract_layers": 2,
    }  # fmt: skip
    spectrum = {"max_length": 24, "patch_size": 4, "frequency_stride": 4, "time_stride": 4}
    features = {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64}
    whole = "ForConditionalGeneration"
    heard, frames = {"input_features": noise(2, 8, 24)}, {"input_features": noise(2, 24, 8)}
    found: list[tuple[str, Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = [
        (name, built(name, "Model", **convolutions), lambda: {"input_values": noise(2, 200)})
        for name in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "SEW", "Data2VecAudio", "UniSpeechSat")
    ]
    found += [
        ("Whisper", built("Whisper", whole), partial(dict, heard, decoder_input_ids=tokens(2, 12))),
        ("ASTransformer", built("AST", "Model", **spectrum), lambda: {"input_values": noise(2, 24, 8)}),
        ("Speech2Text", built("Speech2Text", whole, **features), partial(dict, frames, decoder_input_ids=tokens(2, 6))),
    ]
    return [Architecture(name, "speech", make, batch) for name, make, batch in found]


def diffusion() -> list[Architecture]:
    """diffusers' by class, with what it is made of and what it is given."""
    states = {"encoder_hidden_states": noise(2, 7, 16)}
    places = {"hidden_states": noise(2, 4, 8, 8)}
    rows = {"hidden_states": noise(2, 16, 4)}
    film = {"hidden_states": noise(2, 4, 2, 8, 8)}
    steps = {"timestep": torch.tensor([3, 3])}
    share = {"timestep": torch.tensor([0.3, 0.3], dtype=torch.float64)}
    mask = {"encoder_attention_mask": torch.ones(2, 7)}
    heads = {"num_attention_heads": 4, "attention_head_dim": 8}
    wide = {"num_attention_heads": 3, "attention_head_dim": 16, "joint_attention_dim": 16}
    four = {"in_channels": 4, "out_channels": 4}
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UNet2DConditionModel": (
            four | {
                "sample_size": 8, "layers_per_block": 2, "block_out_channels": (32, 64), "cross_attention_dim": 16,
                "norm_num_groups": 8, "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            },
            steps | states | {"sample": noise(2, 4, 8, 8)},
        ),
        "PixArtTransformer2DModel": (
            heads | {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3, "cross_attention_dim": 32,
                     "patch_size": 2, "caption_channels": 16, "use_additional_conditions": False},
            steps | places | states | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
        "SD3Transformer2DModel": (
            heads | four | {"sample_size": 8, "patch_size": 2, "num_layers": 3, "joint_attention_dim": 16,
                            "caption_projection_dim": 32, "pooled_projection_dim": 16},
            steps | places | states | {"pooled_projections": noise(2, 16)},
        ),
        "DiTTransformer2DModel": (
            heads | {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3, "num_embeds_ada_norm": 10,
                     "patch_size": 2},
            steps | places | {"class_labels": torch.tensor([1, 2])},
        ),
        "FluxTransformer2DModel": (
            heads | {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3,
                     "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)},
            share | rows | states | {"pooled_projections": noise(2, 16), "img_ids": torch.zeros(16, 3),
                                     "txt_ids": torch.zeros(7, 3)},
        ),
        "Flux2Transformer2DModel": (
            wide | {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3,
                    "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
            share | rows | states | {"img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(7, 4),
                                     "guidance": share["timestep"]},
        ),
        "QwenImageTransformer2DModel": (
            wide | {"in_channels": 16, "out_channels": 4, "num_layers": 3, "axes_dims_rope": (8, 4, 4)},
            share | states | {"hidden_states": noise(2, 16, 16), "img_shapes": [[(1, 4, 4)]] * 2,
                              "encoder_hidden_states_mask": torch.ones(2, 7).long()},
        ),
        "ZImageTransformer2DModel": (
            {"in_channels": 4, "dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
             "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
            {"x": [noise(4, 1, 8, 8)] * 2, "t": share["timestep"], "cap_feats": [noise(7, 16)] * 2},
        ),
        "WanTransformer3DModel": (
            four | {"num_attention_heads": 4, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48,
                    "num_layers": 3, "rope_max_seq_len": 32},
            steps | film | states,
        ),
        "LTXVideoTransformer3DModel": (
            heads | four | {"cross_attention_dim": 32, "num_layers": 3, "caption_channels": 16},
            steps | rows | states | mask | {"num_frames": 1, "height": 4, "width": 4},
        ),
        "HunyuanVideoTransformer3DModel": (
            four | {"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2, "num_single_layers": 3,
                    "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
            steps | film | states | mask | {"pooled_projections": noise(2, 8), "guidance": share["timestep"]},
        ),
        "SanaTransformer2DModel": (
            heads | four | {"num_layers": 3, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8,
                            "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8},
            steps | places | states,
        ),
    }  # fmt: skip

    def make(kind: str, sizes: dict[str, Any]) -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, kind)(**sizes)
        return model

    return [
        Architecture(
            re.sub(r"(Transformer.D)?Model", "", kind), "diffusion", partial(make, kind, sizes), partial(dict, batch)
        )
        for kind, (sizes, batch) in found.items()
    ]


def image_models() -> list[Architecture]:
    """timm's, where it is installed."""
    from importlib.util import find_spec

    if find_spec("timm") is None:
        return []

    def make(name: str, **sizes: Any) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, img_size=16, patch_size=4, **sizes)
        return model

    vit = {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": 4}
    made = {
        "timm vit": partial(make, "vit_tiny_patch16_224", **vit),
        "timm deit3": partial(make, "deit3_small_patch16_224", **vit),
        "timm mixer": partial(make, "mixer_s16_224", embed_dim=WIDTH, num_blocks=BLOCKS),
    }
    return [Architecture(name, "timm", model, lambda: {"x": noise(2, 3, 16, 16)}) for name, model in made.items()]


ARCHITECTURES = [
    *decoders(), *encoders(), *encoder_decoders(), *vision(), *multimodal(), *speech(), *diffusion(), *image_models(),
]  # fmt: skip
