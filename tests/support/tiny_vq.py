"""Tiny VQ models of others with random weights, in folders as transformers saves them."""

from pathlib import Path

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
)

from dualtoken.visual_tokenizer.vq_config import VQTokenizerConfig
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer

SIZE, POSITIONS, CODES, DIM = 16, 16, 24, 4
KINDS = ("emu3_vqgan", "janus_vqgan", "chameleon_vqgan")
_SHARED = {"embed_dim": DIM, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
_JANUS = {**_SHARED, "num_embeddings": CODES, "latent_channels": 8}
FIELDS = {
    "emu3_vqgan": {
        **_SHARED, "codebook_size": CODES, "attn_resolutions": [2], "hidden_size": 32,
        "temporal_downsample_factor": 2,
    },
    "janus_vqgan": {**_JANUS, "num_patches": SIZE // 4, "projection_dim": 8, "image_token_embed_dim": 8},
    "chameleon_vqgan": {**_JANUS, "resolution": SIZE},
}  # fmt: skip
_TEXT = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def vq_tokenizer(kind: str, seed: int = 0, **overrides) -> VQTokenizer:
    """One whose codes differ from position to position."""
    torch.manual_seed(seed)
    fields = {"vq_config": {"model_type": kind, **FIELDS[kind]}, "image_size": SIZE, **overrides}
    return VQTokenizer(VQTokenizerConfig(**fields))


def image_processor(kind: str):
    """As the released models have it, but for the size."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind == "emu3_vqgan":
        return Emu3ImageProcessor(**half)
    if kind == "janus_vqgan":
        return JanusImageProcessor(**half, size={"height": SIZE, "width": SIZE})
    size = {"height": SIZE, "width": SIZE}
    return ChameleonImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)


def save_alone(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save the VQ model by itself, with its image processor."""
    vq_tokenizer(kind, seed).vq.save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    return folder


def save_whole(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save the whole model that the VQ model of `save_alone` is a part of, with its image processor."""
    vq = vq_tokenizer(kind, seed).vq
    fields = FIELDS[kind]
    if kind == "emu3_vqgan":
        words = {"<image>": 3, **{f"<|visual token {code:06d}|>": 10 + code for code in range(CODES)}}
        config = Emu3Config(vq_config=fields, text_config=_TEXT, vocabulary_map=words)
        model = Emu3ForConditionalGeneration(config)
    elif kind == "janus_vqgan":
        vision = {
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE,
            "patch_size": 4, "projection_dim": 8, "mlp_ratio": 1.0,
        }  # fmt: skip
        text = {"model_type": "llama", **_TEXT}
        config = JanusConfig(vq_config=fields, text_config=text, vision_config=vision)
        model = JanusForConditionalGeneration(config)
    else:
        words = {"<image>": 3, **{f"IMGIMG{chr(65 + code % 10)}Z": 10 + code for code in range(CODES)}}
        model = ChameleonForConditionalGeneration(
            ChameleonConfig(vq_config=fields, vocabulary_map=words, **_TEXT)
        )
    model.model.vqmodel.load_state_dict(vq.state_dict())
    model.save_pretrained(folder)
    image_processor(kind).save_pretrained(folder)
    return folder
