"""Strict loading of weights, and the layout of the released DualToken checkpoints, both ways.

A released tokenizer is a ``config.json``, the config of its SigLIP backbone in the folder that it names, and
``epoch_N.pt`` with the weights under ``state_dict``. One table below holds all renames.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipConfig

from dualtoken.visual_tokenizer.config import DualTokenVisualTokenizerConfig
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer

# Released module name -> ours. Older files spell `pixel` / `semantic` in full; what is behind the name is
# the same.
_MODULES = {
    "siglip_model": "backbone",
    "prequant_sem": "prequant_semantic",
    "prequant_pix": "prequant_pixel",
    "prequant_shortcut": "prequant_shortcut",
    "postquant_sem": "postquant_semantic",
    "postquant_pix": "postquant_pixel",
    "quantizer_sem": "quantizer_semantic",
    "quantizer_pix": "quantizer_pixel",
    "post_quant_conv": "post_quant_conv",
    "decoder": "decoder",
}
_OLDER_SPELLINGS = {"semantic": "sem", "pixel": "pix"}
_CODEBOOK = re.compile(r"(quantizer_\w+)\.codebooks\.(\d+)\.(weight|cluster_size_ema|embed_ema)")
_CODEBOOK_BUFFERS = {"weight": "codebook", "cluster_size_ema": "cluster_size", "embed_ema": "embed_sum"}


class WeightsError(ValueError):
    """Weights that do not fit the model, with every key that is missing, unexpected or misshapen."""

    def __init__(self, source: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        lines = [f"the weights in {source} do not fit the model; nothing was loaded"]
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
            if keys:
                lines.append(f"{len(keys)} {kind}: {', '.join(keys)}")
        super().__init__("\n  ".join(lines))


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str = "the state dict") -> None:
    """Copy ``state`` into ``module`` if it fits exactly, else change nothing.

    Raises:
        WeightsError: naming every missing, unexpected and misshapen key.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} (expected {tuple(own[name].shape)})"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(source, missing, unexpected, misshapen)
    module.load_state_dict(state, strict=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.pt`` file without executing anything in it.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, holds more than tensors and plain containers, or is no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is refused: it is not a plain file of tensors ({reason})") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict with 'state_dict'")
    return content


# -- configuration -----------------------------------------------------------------------------------------


def config_from_released(
    path: str | Path, backbone_config: str | Path | None = None
) -> DualTokenVisualTokenizerConfig:
    """Translate a released ``config.json``.

    Args:
        path: the file; the section ``rqvaesiglip`` inside it is used where there is one.
        backbone_config: config of the SigLIP backbone (file or folder), if it is not where ``path`` says.

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
    branches = {name: _branch(released, name) for name in ("sem", "pix")}
    if branches["sem"] != branches["pix"]:
        raise ValueError(
            f"{path}: vq_sem and vq_pix differ ({branches['sem']} and {branches['pix']}); "
            "both branches must have codebooks of one size"
        )
    decoder = released["ddconfig"]
    latent_shape = released.get("decoder_latent_shape")
    shortcut = released.get("layer_shortcut")
    config = DualTokenVisualTokenizerConfig(
        vision_config=towers.vision_config.to_dict(),
        text_config=towers.text_config.to_dict(),
        reconstruction_layer=released["layer_recon"],
        semantic_layer=released["layer_sem"],
        shortcut_layer=shortcut,
        shortcut_weight=released.get("weight_shortcut", 0.6),
        decoder_in_channels=decoder.get("decoder_in_channels", decoder.get("z_channels", 1024)),
        decoder_channels=decoder["ch"],
        decoder_channel_multipliers=list(decoder["ch_mult"]),
        decoder_num_res_blocks=decoder["num_res_blocks"],
        decoder_attention_resolutions=list(decoder["attn_resolutions"]),
        decoder_latent_size=None if latent_shape is None else latent_shape[0],
        latent_norm=False,
        **branches["sem"],
    )
    if decoder["resolution"] != config.reconstruction_size:
        raise ValueError(
            f"{path}: ddconfig.resolution is {decoder['resolution']}, but {config.latent_size} latents and "
            f"{len(decoder['ch_mult'])} levels make {config.reconstruction_size} pixels"
        )
    return config


# What is read of a released config without a default.
_DECODER_KEYS = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution")
_BRANCH_KEYS = (
    "bottleneck_type",
    "n_embed",
    "embed_dim",
    "code_shape",
    "decay",
    "shared_codebook",
    "restart_unused_codes",
)
_NEEDED = {"ddconfig": _DECODER_KEYS, "vq_sem": _BRANCH_KEYS, "vq_pix": _BRANCH_KEYS}


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
    section = released[f"vq_{name}"]
    if section["bottleneck_type"] not in ("rq", "rq_ema"):
        kind = section["bottleneck_type"]
        raise ValueError(f"vq_{name} has bottleneck_type {kind!r}; expected 'rq' or 'rq_ema'")
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


# -- weights -----------------------------------------------------------------------------------------------


def state_from_released(state: dict[str, Tensor], shared_codebook: bool) -> dict[str, Tensor]:
    """Rename the weights of a released checkpoint; names that have no place here stay, to be reported.

    Raises:
        ValueError: if depths of a codebook are missing, or a codebook said to be shared differs between
            depths.
    """
    result: dict[str, Tensor] = {}
    depths: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        name = _rename(key.removeprefix("module."))
        match = _CODEBOOK.fullmatch(name)
        if match is not None:
            quantizer, depth, kind = match.groups()
            tensor = tensor[:-1] if kind == "weight" else tensor  # the last row is padding
            depths.setdefault(f"{quantizer}.{_CODEBOOK_BUFFERS[kind]}", {})[int(depth)] = tensor
        elif not name.endswith(".embeddings.position_ids"):  # a constant that older transformers saved
            result[name] = tensor
    for name, found in depths.items():
        result[name] = _stack_depths(name, found, shared_codebook)
        result[name.rpartition(".")[0] + ".num_updates"] = torch.zeros((), dtype=torch.int64)
    return result


def _rename(key: str) -> str:
    head, _, rest = key.partition(".")
    stem, _, branch = head.rpartition("_")
    if branch in _OLDER_SPELLINGS:
        head = f"{stem}_{_OLDER_SPELLINGS[branch]}"
    return f"{_MODULES.get(head, head)}.{rest}"


def _stack_depths(name: str, found: dict[int, Tensor], shared: bool) -> Tensor:
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"{name}: the checkpoint has depths {sorted(found)}, expected 0 to {len(found) - 1}")
    if not shared:
        return torch.stack([found[depth] for depth in range(len(found))])
    if not all(torch.equal(found[0], other) for other in found.values()):
        raise ValueError(f"{name}: the config says shared_codebook, but the depths of the checkpoint differ")
    return found[0].unsqueeze(0)


def state_to_released(state: dict[str, Tensor], num_quantizers: int) -> dict[str, Tensor]:
    """Undo :func:`state_from_released`; all depths of a shared codebook are one tensor."""
    ours = {new: old for old, new in _MODULES.items()}
    kinds = {new: old for old, new in _CODEBOOK_BUFFERS.items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if not head.startswith("quantizer_"):
            result[f"{ours[head]}.{rest}"] = tensor
        elif rest in kinds:
            books = [F.pad(b, (0, 0, 0, 1)) if rest == "codebook" else b for b in tensor]
            for depth in range(num_quantizers):
                result[f"{ours[head]}.codebooks.{depth}.{kinds[rest]}"] = books[depth % len(books)]
    return result


def load_released(
    config: str | Path, checkpoint: str | Path, backbone_config: str | Path | None = None
) -> DualTokenVisualTokenizer:
    """Build a tokenizer from a released ``config.json`` and ``epoch_N.pt``.

    Raises:
        FileNotFoundError: if a file is missing.
        WeightsError: if any key is missing, unexpected or misshapen.
        ValueError: if a file cannot be read safely or asks for another kind of model.
    """
    built = config_from_released(config, backbone_config)
    content = read_checkpoint(checkpoint)
    if not isinstance(content.get("state_dict"), dict):
        found = ", ".join(map(str, content)) or "nothing"
        raise ValueError(f"{checkpoint} has no 'state_dict'; found {found}")
    state = state_from_released(content["state_dict"], built.shared_codebook)
    model = DualTokenVisualTokenizer(built)
    load_strict(model, state, str(checkpoint))
    return model.eval()


def save_released(model: DualTokenVisualTokenizer, folder: str | Path) -> None:
    """Write ``config.json``, ``siglip/config.json`` and ``epoch_0.pt``, in the released layout.

    Raises:
        ValueError: if the model has something that the released layout cannot express.
    """
    folder = Path(folder)
    released = config_to_released(model.config)
    (folder / "siglip").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released, indent=1), encoding="utf-8")
    model.config.backbone_config().save_pretrained(folder / "siglip")
    state = state_to_released(model.state_dict(), model.config.num_quantizers)
    torch.save({"epoch": 0, "name": "dualtoken", "state_dict": state}, folder / "epoch_0.pt")
