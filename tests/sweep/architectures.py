"""Tiny models with random weights, from their configs, and a batch for each. Libraries are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    plain["Jamba"] = {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    }
    plain["DeepseekV2"] = {"topk_method": "greedy", "num_key_value_heads": 4, "head_dim": 4}
    plain["DeepseekV3"] = {"num_key_value_heads": 4, "head_dim": 4}
    plain["RecurrentGemma"] = {"lru_width": WIDTH, "attention_window_size": 8}
    plain["Lfm2"] = {"layer_types": ["conv", "full_attention", "conv"]}
    latent = {"num_key_value_heads": 4, "head_dim": 4}  # of keys and values
    plain |= {name: latent for name in ("Youtu", "MiniCPM3", "LongcatFlash", "AXK1")}
    plain |= {name: latent | {"index_n_heads": 4, "index_head_dim": 8} for name in ("GlmMoeDsa", "DeepseekV32")}
    plain["Mistral4"] = latent | {"head_dim": LEFT_OUT, "qk_head_dim": 12}
    plain["Glm4MoeLite"] = latent | {"qk_head_dim": 12}
    deltas = {f"linear_{part}": size for part, size in (
        ("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8), ("value_head_dim", 8),
    )}  # fmt: skip
    deltas |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    plain |= {name: deltas for name in ("Qwen3Next", "Qwen3_5Text", "Qwen3_5MoeText")}
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
    found = [Architecture(name, "encoder", built(name, "Model", **changes), text) for name, changes in plain.items()]
    found.append(Architecture("DebertaV2 (shared key)", "encoder", built("DebertaV2", "Model", **shared), text))
    found.append(
        Architecture(
            "Deberta", "encoder", built("Deberta", "Model", relative_attention=True, pos_att_type=["c2p", "p2c"]), text
        )
    )
    found.append(
        Architecture(
            "Bert (chunked)",
            "encoder",
            built("Bert", "Model", chunk_size_feed_forward=2),
            lambda: {"input_ids": tokens(2, 8)},
        )
    )
    return found


def encoder_decoders() -> list[Architecture]:
    plain: dict[str, Mapping[str, Any]] = {name: {} for name in (
        "T5", "MT5", "UMT5", "Bart", "MBart", "Pegasus", "Marian", "M2M100", "Blenderbot", "LongT5", "PLBart",
        "SwitchTransformers", "NllbMoe", "ProphetNet", "LED",
    )}  # fmt: skip
    plain["T5"] = {"decoder_start_token_id": 1}
    plain["SwitchTransformers"] = {
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
    }
    plain["NllbMoe"] = {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
    plain["LED"] = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
    plain["ProphetNet"] = {
        "num_hidden_layers": LEFT_OUT,
        "num_encoder_layers": 3,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    }
    return [
        Architecture(
            name,
            "encoder-decoder",
            built(name, "ForConditionalGeneration" if name != "Marian" else "MTModel", **changes),
            two_texts,
            True,
        )
        for name, changes in plain.items()
    ]


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


def multimodal() -> list[Architecture]:
    two = {"text_config": TEXT, "vision_config": IMAGE}
    llama = TEXT | {"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8}
    found = [
        Architecture(name, "multimodal", built(name, "Model", **two), text_and_image)
        for name in ("CLIP", "Siglip", "ChineseCLIP", "AltCLIP", "CLIPSeg")
    ]

    def with_image_tokens() -> dict[str, Any]:
        ids = torch.cat([torch.full((2, 16), VOCABULARY - 1), tokens(2, 5)], 1)
        return {"input_ids": ids, "pixel_values": noise(2, 3, 16, 16)}

    llava = {
        "text_config": llama,
        "vision_config": IMAGE | {"model_type": "clip_vision_model"},
        "image_token_index": VOCABULARY - 1,
        "vision_feature_layer": -1,
        "image_seq_length": 16,
    }
    pali = {
        "text_config": llama | {"model_type": "gemma"},
        "vision_config": IMAGE | {"model_type": "siglip_vision_model"},
        "image_token_id": VOCABULARY - 1,
        "projection_dim": WIDTH,
    }
    blip = {"text_config": TEXT | {"encoder_hidden_size": WIDTH}, "vision_config": IMAGE, "projection_dim": WIDTH}
    found.append(
        Architecture("Llava", "multimodal", built("Llava", "ForConditionalGeneration", **llava), with_image_tokens)
    )
    found.append(
        Architecture("Llava (text only)", "multimodal", built("Llava", "ForConditionalGeneration", **llava), text, True)
    )
    found.append(
        Architecture(
            "PaliGemma", "multimodal", built("PaliGemma", "ForConditionalGeneration", **pali), with_image_tokens
        )
    )
    found.append(Architecture("Blip", "multimodal", built("Blip", "Model", **blip), text_and_image))
    found.append(Architecture("Vilt", "multimodal", built("Vilt", "Model"), lambda: text() | image()()))
    found.append(
        Architecture(
            "Git",
            "multimodal",
            built("Git", "ForCausalLM", vision_config=IMAGE),
            lambda: {"input_ids": tokens(2, 6), "pixel_values": noise(2, 3, 16, 16)},
        )
    )
    return found


def speech() -> list[Architecture]:
    convolutions = {
        "conv_dim": [16, 16],
        "conv_stride": [4, 2],
        "conv_kernel": [8, 4],
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "num_feat_extract_layers": 2,
    }
    found = [
        Architecture(name, "speech", built(name, "Model", **convolutions), lambda: {"input_values": noise(2, 200)})
        for name in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "SEW", "Data2VecAudio", "UniSpeechSat")
    ]
    found.append(
        Architecture(
            "Whisper",
            "speech",
            built("Whisper", "ForConditionalGeneration"),
            lambda: {"input_features": noise(2, 8, 24), "decoder_input_ids": tokens(2, 12)},
        )
    )
    found.append(
        Architecture(
            "ASTransformer",
            "speech",
            built("AST", "Model", max_length=24, patch_size=4, frequency_stride=4, time_stride=4),
            lambda: {"input_values": noise(2, 24, 8)},
        )
    )
    found.append(
        Architecture(
            "Speech2Text",
            "speech",
            built(
                "Speech2Text",
                "ForConditionalGeneration",
                input_feat_per_channel=8,
                conv_channels=16,
                max_source_positions=64,
            ),
            lambda: {"input_features": noise(2, 24, 8), "decoder_input_ids": tokens(2, 6)},
        )
    )
    return found


def diffusion() -> list[Architecture]:
    def diffusers_model(kind: str, **arguments: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            import diffusers

            model: nn.Module = getattr(diffusers, kind)(**arguments)
            return model

        return make

    def latents(**more: Any) -> Callable[[], dict[str, Any]]:
        return lambda: {"timestep": torch.tensor([3, 3])} | {k: v() if callable(v) else v for k, v in more.items()}

    unet = diffusers_model(
        "UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=2,
        block_out_channels=(32, 64), cross_attention_dim=16, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    states = {"encoder_hidden_states": lambda: noise(2, 7, 16)}
    pixart = diffusers_model(
        "PixArtTransformer2DModel", sample_size=8, in_channels=4, out_channels=8, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, cross_attention_dim=32, patch_size=2, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip
    sd3 = diffusers_model(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16,
        out_channels=4,
    )  # fmt: skip
    dit = diffusers_model(
        "DiTTransformer2DModel", sample_size=8, in_channels=4, out_channels=8, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, num_embeds_ada_norm=10, patch_size=2,
    )  # fmt: skip
    flux = diffusers_model(
        "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    sample = {"hidden_states": lambda: noise(2, 4, 8, 8)}
    pooled = {"pooled_projections": lambda: noise(2, 16)}
    rows = {
        "hidden_states": lambda: noise(2, 16, 4),
        "img_ids": lambda: torch.zeros(16, 3),
        "txt_ids": lambda: torch.zeros(7, 3),
        "timestep": lambda: torch.tensor([0.3, 0.3], dtype=torch.float64),
    }
    return [
        Architecture("UNet2DCondition", "diffusion", unet, latents(sample=lambda: noise(2, 4, 8, 8), **states)),
        Architecture(
            "PixArt",
            "diffusion",
            pixart,
            latents(**sample, **states, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        ),
        Architecture("SD3", "diffusion", sd3, latents(**sample, **states, **pooled)),
        Architecture("DiT", "diffusion", dit, latents(**sample, class_labels=torch.tensor([1, 2]))),
        Architecture("Flux", "diffusion", flux, latents(**rows, **states, **pooled)),
    ]


def image_models() -> list[Architecture]:
    """timm's, where it is installed."""
    from importlib.util import find_spec

    if find_spec("timm") is None:
        return []

    def make(name: str, **sizes: Any) -> Callable[[], nn.Module]:
        def create() -> nn.Module:
            import timm

            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **sizes)
            return model

        return create

    def batch() -> dict[str, Any]:
        return {"x": noise(2, 3, 16, 16)}

    vit = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": 4}
    mixer = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "num_blocks": BLOCKS}
    return [
        Architecture("timm vit", "timm", make("vit_tiny_patch16_224", **vit), batch),
        Architecture("timm deit3", "timm", make("deit3_small_patch16_224", **vit), batch),
        Architecture("timm mixer", "timm", make("mixer_s16_224", **mixer), batch),
    ]


ARCHITECTURES = [
    *decoders(), *encoders(), *encoder_decoders(), *vision(), *multimodal(), *speech(), *diffusion(), *image_models(),
]  # fmt: skip
