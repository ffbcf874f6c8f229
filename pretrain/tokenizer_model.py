"""The visual tokenizer that a phase trains: new on a backbone or from an export, and what stays fixed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from dualtoken.visual_tokenizer.config import (
    PRESETS,
    VISION_SIZES,
    DualTokenVisualTokenizerConfig,
    preset_config,
)
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain.config import ConfigError

# Overrides that an export takes too: they change neither the shape of a weight nor what a code means.
TRAINING_SETTINGS = ("codebook_decay", "restart_unused_codes", "restart_threshold", "codebook_seed")


@dataclass
class TokenizerModelConfig:
    """Which tokenizer is built and what its towers start from."""

    preset: str | None = "so400m_384"  # null, with init_from: whatever the export is
    overrides: dict[str, Any] = field(default_factory=dict)
    backbone: str = MISSING  # folder or hub name of a SigLIP model: towers and teacher
    init_from: str | None = None  # an exported tokenizer to go on from (the previous phase)


def build_visual_tokenizer(config: TokenizerModelConfig) -> DualTokenVisualTokenizer:
    """Build the tokenizer: from the previous phase's export, or new on the backbone's weights.

    Raises:
        ConfigError: preset or overrides do not describe the export, or there is neither preset nor export.
    """
    if config.init_from:
        exported = DualTokenVisualTokenizerConfig.from_pretrained(config.init_from)
        changed = _config_of_export(config, exported)
        return DualTokenVisualTokenizer.from_pretrained(config.init_from, config=changed)
    if config.preset is None:
        raise ConfigError(f"model.preset=null without model.init_from: give one of {', '.join(PRESETS)}")
    return DualTokenVisualTokenizer.from_backbone(
        preset_config(config.preset, **config.overrides), config.backbone
    )


def _config_of_export(
    config: TokenizerModelConfig, exported: DualTokenVisualTokenizerConfig
) -> DualTokenVisualTokenizerConfig:
    """Return the export's config with the overrides of this phase.

    The preset has to have the export's tower. What else the export was given at its own training it keeps,
    so that later phases need not repeat it.
    """
    given = preset_config(config.preset or "so400m_384", **config.overrides)  # unknown names are refused here
    if config.preset is not None and "vision_config" not in config.overrides:
        differing = [
            f"{name} {getattr(exported.vision, name)} there, {getattr(given.vision, name)} in the preset"
            for name in VISION_SIZES
            if getattr(exported.vision, name) != getattr(given.vision, name)
        ]
        if differing:
            raise ConfigError(
                f"model.preset={config.preset} is not the tokenizer in {config.init_from} "
                f"({'; '.join(differing)}); give model.preset={_preset_of(exported) or 'null'}"
            )
    found, wanted = _plain(exported), _plain(given)
    for name in sorted(set(config.overrides) - set(TRAINING_SETTINGS)):
        if found[name] != wanted[name]:
            raise ConfigError(
                f"model.overrides.{name}={wanted[name]}: the tokenizer in {config.init_from} has "
                f"{found[name]}, which its weights are made for; take the override out, or train from a "
                "backbone without model.init_from"
            )
    for name in set(config.overrides) & set(TRAINING_SETTINGS):
        setattr(exported, name, getattr(given, name))
    return exported


def _preset_of(config: DualTokenVisualTokenizerConfig) -> str | None:
    """Name of the preset with this config's vision tower, None if there is none."""
    sizes = [getattr(config.vision, name) for name in VISION_SIZES]
    fitting = (n for n, p in PRESETS.items() if [p["vision_config"][name] for name in VISION_SIZES] == sizes)
    return next(fitting, None)


def _plain(config: DualTokenVisualTokenizerConfig) -> dict[str, Any]:
    """The config as its file holds it: a tuple is a list."""
    return json.loads(json.dumps(config.to_diff_dict()))


def expand_frozen(patterns: list[str], config: DualTokenVisualTokenizerConfig) -> list[str]:
    """Patterns of parameter names, for one recipe to fit towers of every depth.

    `<pixel` and `<semantic` as a part of a name become the numbers of the layers that the branch's latents
    come through: `layers.<pixel.*` is `layers.0.*` to `layers.5.*` where the branch reads layer 6. Patterns
    of the shortcut and of the text tower are left out where the tokenizer has none.
    """
    depths = {"<pixel": max(config.reconstruction_layer, config.shortcut_layer or 0)}
    depths["<semantic"] = config.semantic_layer
    absent: list[str] = []
    if config.shortcut_layer is None:
        absent.append("prequant_shortcut.")
    if config.text_config is None:
        absent += ["backbone.text_model.", "backbone.logit_"]
    expanded: list[str] = []
    for pattern in patterns:
        if pattern.startswith(tuple(absent)):
            continue
        name = next((part for part in pattern.split(".") if part in depths), None)
        numbers = range(depths[name]) if name else ()
        expanded += [pattern.replace(name, str(number)) for number in numbers] if name else [pattern]
    return expanded


def freeze_codebooks(tokenizer: DualTokenVisualTokenizer, names: list[str]) -> None:
    """Keep codebooks as they are: no statistics, no updates, no restarts.

    Raises:
        ConfigError: the tokenizer has no codebook of that name.
    """
    quantizers = tokenizer.quantizers()
    for name in names:
        if name not in quantizers:
            raise ConfigError(f"frozen_codebooks: {name!r} is none of {', '.join(quantizers)}")
        quantizers[name].frozen = True
