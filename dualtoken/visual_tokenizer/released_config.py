"""The ``config.json`` of the released DualToken checkpoints, both ways.

Read are the spellings of every revision of the released code whose model this one is: branches called
``sem``/``pix`` or, before, ``semantic``/``pixel``; null for what is not there; keys left out that its classes
fill in. Revisions before had other modules and are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import SiglipConfig

from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig

_BOTTLENECKS = ("rq", "rq_ema")
# The two sections of a branch: as they are called now, and before.
_BRANCHES = {"vq_sem": "vq_semantic", "vq_pix": "vq_pixel"}
_OPTIONAL = {
    "bottleneck_type": "rq",
    "decay": 0.99,
    "shared_codebook": True,
    "restart_unused_codes": True,
}
"""Keys of a branch that may be left out, with what every released file says."""

# What is read of a released config without a default.
_NEEDED = {
    "ddconfig": ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution"),
    "vq_sem": ("n_embed", "embed_dim", "code_shape"),
    "vq_pix": ("n_embed", "embed_dim", "code_shape"),
}


def config_from_released(
    path: str | Path, backbone_config: str | Path | None = None, full_attention: bool = False
) -> DualTokenVisualTokenizerConfig:
    """Translate a released ``config.json``.

    Args:
        path: the file; the section ``rqvaesiglip`` inside it is used where there is one.
        backbone_config: config of the SigLIP backbone (file or folder), if it is not where ``path`` says.
        full_attention: the attention behind the quantizers sees the whole image, as in the revision of the
            released code before it became causal. Neither config nor weights tell the two apart.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if keys are missing (all are named), or the config asks for something this model cannot
            be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no released config at {path}")
    released = _released_section(path)
    towers: Any = SiglipConfig.from_dict(_backbone_config(path, released, backbone_config))
    semantic, pixel = (_branch(released, name) for name in _BRANCHES)
    if semantic != pixel:
        raise ValueError(
            f"{path}: vq_sem and vq_pix differ ({semantic} and {pixel}); "
            "both branches must have codebooks of one size"
        )
    decoder = released["ddconfig"]
    latent_shape = released.get("decoder_latent_shape")
    config = DualTokenVisualTokenizerConfig(
        vision_config=towers.vision_config.to_dict(),
        text_config=towers.text_config.to_dict(),
        reconstruction_layer=released["layer_recon"],
        semantic_layer=released["layer_sem"],
        shortcut_layer=released.get("layer_shortcut"),
        shortcut_weight=released.get("weight_shortcut", 0.6),
        decoder_in_channels=decoder.get("decoder_in_channels", decoder.get("z_channels", 1024)),
        decoder_channels=decoder["ch"],
        decoder_channel_multipliers=list(decoder["ch_mult"]),
        decoder_num_res_blocks=decoder["num_res_blocks"],
        decoder_attention_resolutions=list(decoder["attn_resolutions"]),
        decoder_latent_size=None if latent_shape is None else latent_shape[0],
        latent_norm=False,
        causal_post_quantization=not full_attention,
        **semantic,
    )
    if decoder["resolution"] != config.reconstruction_size:
        raise ValueError(
            f"{path}: ddconfig.resolution is {decoder['resolution']}, but {config.latent_size} latents and "
            f"{len(decoder['ch_mult'])} levels make {config.reconstruction_size} pixels"
        )
    return config


def _released_section(path: Path) -> dict[str, Any]:
    """Read the tokenizer's section of a released config, with every key that is needed."""
    try:
        released = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    released = released.get("rqvaesiglip", released) if isinstance(released, dict) else released
    if not isinstance(released, dict):
        raise ValueError(f"{path} holds a {type(released).__name__}; expected a released config, a dict")
    released = _without_nulls(released)
    if "n_embed" in released:
        raise ValueError(
            f"{path} is of a revision of the released code with other modules (codebooks described at the "
            "top of the config, prequant_visual in the weights); expected one with vq_sem and vq_pix"
        )
    for name, before in _BRANCHES.items():
        if name in released and before in released:
            raise ValueError(f"{path} has both {name} and {before}; expected one of the two")
        if before in released:
            released[name] = released.pop(before)
    missing = [name for name in ("layer_recon", "layer_sem") if name not in released]
    for section, keys in _NEEDED.items():
        found = released.get(section)
        if not isinstance(found, dict):
            missing.append(section)
            continue
        missing += [f"{section}.{key}" for key in keys if key not in found]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; expected the config.json beside a released checkpoint"
        )
    return released


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys that are null, in sections too, as the released config class takes them."""
    present = {key: value for key, value in section.items() if value is not None}
    return {k: _without_nulls(value) if isinstance(value, dict) else value for k, value in present.items()}


def _backbone_config(path: Path, released: dict, given: str | Path | None) -> dict:
    named = released.get("pretrained_model")
    if given is None and named is None:
        raise ValueError(f"{path} names no backbone (pretrained_model); give the SigLIP config")
    where = path.parent / str(named) if given is None else Path(given)
    where = where / "config.json" if where.is_dir() or where.suffix != ".json" else where
    if not where.is_file():
        raise FileNotFoundError(f"no config of the SigLIP backbone at {where}; give its path")
    return json.loads(where.read_text(encoding="utf-8"))


def _branch(released: dict, name: str) -> dict[str, Any]:
    section = {**_OPTIONAL, **released[name]}
    if "decay" in released and "decay" not in released[name]:
        section["decay"] = released["decay"]
    if section["bottleneck_type"] not in _BOTTLENECKS:
        kind = section["bottleneck_type"]
        raise ValueError(f"{name} has bottleneck_type {kind!r}; expected 'rq' or 'rq_ema'")
    return {
        "codebook_size": section["n_embed"],
        "codebook_dim": section["embed_dim"],
        "num_quantizers": section["code_shape"][-1],
        "codebook_decay": section["decay"],
        "shared_codebook": section["shared_codebook"],
        "restart_unused_codes": section["restart_unused_codes"],
    }


def config_to_released(config: DualTokenVisualTokenizerConfig, backbone: str = "siglip") -> dict[str, Any]:
    """Translate a config into a released ``config.json``; ``backbone`` is the folder of the SigLIP config.

    Raises:
        ValueError: if the model has something that the released layout cannot express.
    """
    unsupported = {
        "latent_norm": config.latent_norm,
        "pixel_attention": not config.pixel_attention,
        "merged_codebook": config.merged_codebook,
        "quantizer": config.quantizer != "rvq",
        "text_config": config.text_config is None,
        "causal_post_quantization": not config.causal_post_quantization,
        "decoder_pixel_shuffle": config.decoder_pixel_shuffle != 1,
    }
    found = [f"{name}={getattr(config, name)}" for name, present in unsupported.items() if present]
    if found:
        raise ValueError(f"the released layout has no place for {', '.join(found)}")
    grid = [config.grid_size, config.grid_size]
    branch = {
        "bottleneck_type": "rq",
        "ckpt_path": None,
        "code_shape": [*grid, config.num_quantizers],
        "decay": config.codebook_decay,
        "embed_dim": config.codebook_dim,
        "latent_shape": [*grid, config.codebook_dim],
        "n_embed": config.codebook_size,
        "restart_unused_codes": config.restart_unused_codes,
        "shared_codebook": config.shared_codebook,
    }
    width = config.vision.hidden_size
    inner: dict[str, Any] = {
        "architectures": ["RQVAESiglip"],
        "model_type": "rqvaesiglip_model",
        "hidden_size": width,
        "layer_recon": config.reconstruction_layer,
        "layer_sem": config.semantic_layer,
        "layer_shortcut": config.shortcut_layer,
        "weight_shortcut": config.shortcut_weight,
        "ddconfig": {
            "attn_resolutions": list(config.decoder_attention_resolutions),
            "ch": config.decoder_channels,
            "ch_mult": list(config.decoder_channel_multipliers),
            "decoder_in_channels": config.decoder_in_channels,
            "double_z": False,
            "dropout": 0.0,
            "in_channels": 3,
            "num_res_blocks": config.decoder_num_res_blocks,
            "out_ch": 3,
            "resolution": config.reconstruction_size,
        },
        "checkpointing": False,
        "ignore_keys": None,
        "vq_sem": branch,
        "vq_pix": dict(branch),
        "pretrained_model": backbone,
    }
    if config.decoder_latent_size is not None:
        inner["decoder_latent_shape"] = [config.decoder_latent_size] * 2
    return {
        "architectures": ["RQVAESIGLIPTransformer"],
        "hidden_size": width,
        "model_type": "rqvaesigliptransformer_model",
        "rqvaesiglip": inner,
    }
