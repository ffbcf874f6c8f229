"""Models of a recipe on the meta device, to count and plan with: without weights and, if need be, files.

Folders that a recipe names and that are not there yet are taken from the recipe that makes them; what no
recipe makes is a preset, by default the paper's. What was assumed is noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from dualtoken.unified_model.config import (
    DualTokenConfig,
    feature_fields,
    head_settings,
)
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.vision_tower import VisionTower, tower_settings
from dualtoken.visual_tokenizer.config import PRESETS, DualTokenVisualTokenizerConfig, preset_config
from dualtoken.visual_tokenizer.loading import (
    VisualTokenizer,
    VisualTokenizerConfig,
    load_visual_tokenizer_config,
)
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.vq_config import VQTokenizerConfig
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer
from pretrain.budget import ParameterCount
from pretrain.config import (
    ConfigError,
    JobConfig,
    OptimizerConfig,
    available_recipes,
    find_recipe,
    load_job_config,
    load_recipe,
)
from pretrain.contrastive_task import ContrastiveJobConfig, build_siglip
from pretrain.mllm_task import MllmJobConfig, MllmModelConfig, reads_features, require_heads
from pretrain.optim import freeze_parameters, parameter_groups
from pretrain.tokenizer_model import TokenizerModelConfig, expand_frozen
from pretrain.tokenizer_task import TokenizerJobConfig

NOT_GIVEN = "<not given>"  # what keys without a value are filled with
PAPERS_TOKENIZER, PAPERS_LLM = "so400m_384", "qwen2.5-3b"
VOCABULARY = 32000  # of a text tokenizer that is not there

_QWEN = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
LLM_PRESETS: dict[str, dict[str, Any]] = {  # figures of the hub's config.json
    "qwen2.5-0.5b": {
        **_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        **_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-3b": {
        **_QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN, "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass
class ModelOptions:
    """What a plan is told of models that the recipe does not have, and what it assumed."""

    visual_tokenizer: str | None = None  # preset or folder
    llm: str | None = None  # preset or folder
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Keep an assumption, once."""
        if line not in self.notes:
            self.notes.append(line)


def planned_unified_model(
    config: MllmJobConfig, options: ModelOptions
) -> tuple[DualTokenForCausalLM, VisualTokenizer]:
    """The unified model of a recipe, frozen as the phase has it, and its tokenizer, on the meta device.

    Raises:
        ConfigError: a model is named that is neither there nor known.
    """
    visual = _tokenizer_config(config.model.visual_tokenizer, options)
    with torch.device("meta"):
        is_vq = isinstance(visual, VQTokenizerConfig)
        tokenizer = VQTokenizer(visual) if is_vq else DualTokenVisualTokenizer(visual)
    unified = _unified_config(config, tokenizer, options)
    has_words = Path(config.model.text_tokenizer).is_dir()
    unified.make_room(len(AutoTokenizer.from_pretrained(config.model.text_tokenizer)) if has_words else 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(unified)
    freeze_parameters(model, config.frozen)
    return model, tokenizer


def planned_tokenizer(config: TokenizerJobConfig, options: ModelOptions) -> DualTokenVisualTokenizer:
    """The visual tokenizer of a recipe on the meta device, frozen as the phase has it.

    Raises:
        ConfigError: it goes on from a folder that is neither there nor made by a recipe.
    """
    visual = _config_of_tokenizer_job(config.model, options)
    with torch.device("meta"):
        model = DualTokenVisualTokenizer(visual)
    freeze_parameters(model, expand_frozen(config.frozen, visual))
    return model


def planned_siglip(config: ContrastiveJobConfig, options: ModelOptions) -> SiglipModel:
    """The SigLIP of a recipe on the meta device."""

    class Vocabulary:
        pad_token_id = 0

        def __len__(self) -> int:
            return VOCABULARY

    text_tokenizer: Any = Vocabulary()
    if Path(config.text_tokenizer).is_dir():
        text_tokenizer = AutoTokenizer.from_pretrained(config.text_tokenizer)
    else:
        options.note(f"text_tokenizer={config.text_tokenizer} is not there: {VOCABULARY:,} tokens assumed")
    if config.init_from is not None:
        return build_siglip(config, text_tokenizer).to("meta")
    with torch.device("meta"):
        return build_siglip(config, text_tokenizer)


def count_parts(
    model: nn.Module, parts: dict[str, nn.Module], optimizer: OptimizerConfig
) -> dict[str, ParameterCount]:
    """Parameters by part; one that two parts share counts in the first."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        parameter_groups(model, optimizer)  # marks what Muon takes
    seen: set[int] = set()
    counts: dict[str, ParameterCount] = {}
    for name, part in parts.items():
        own = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        trained = [p for p in own if p.requires_grad]
        muon = [p for p in trained if getattr(p, "use_muon", False)]
        counts[name] = ParameterCount(*(sum(p.numel() for p in group) for group in (own, trained, muon)))
    return counts


def _tokenizer_config(name: str, options: ModelOptions) -> VisualTokenizerConfig:
    if options.visual_tokenizer is not None:
        name = options.visual_tokenizer
    if name in PRESETS:
        return preset_config(name)
    if (Path(name) / "config.json").is_file():
        return load_visual_tokenizer_config(name)
    maker = _recipe_that_exports(name)
    if maker is not None:
        options.note(f"visual tokenizer: as recipe {_name_of(maker)} makes it")
        return _config_of_tokenizer_job(_as(maker, TokenizerJobConfig).model, options)
    if name != NOT_GIVEN:
        raise ConfigError(
            f"no visual tokenizer in {name}, and no recipe makes it; give --visual-tokenizer and one of "
            f"{', '.join(PRESETS)}, or a folder"
        )
    options.note(f"visual tokenizer: {PAPERS_TOKENIZER} (or give --visual-tokenizer)")
    return preset_config(PAPERS_TOKENIZER)


def _config_of_tokenizer_job(
    model: TokenizerModelConfig, options: ModelOptions
) -> DualTokenVisualTokenizerConfig:
    if model.preset is not None:
        return preset_config(model.preset, **model.overrides)
    return _tokenizer_config(model.init_from or NOT_GIVEN, options)


def _unified_config(
    config: MllmJobConfig,
    tokenizer: VisualTokenizer,
    options: ModelOptions,
    behind: tuple[str, ...] = (),
    **later: Any,
) -> DualTokenConfig:
    """Config of the model that a recipe trains, some of whose heads phases `behind` it may ask for."""
    parts = config.model
    heads = {**head_settings(parts.heads), **later}
    if parts.init_from and parts.init_from != NOT_GIVEN:
        if (Path(parts.init_from) / "config.json").is_file():
            return _config_there(parts.init_from, heads, options)
        maker = _recipe_that_exports(parts.init_from)
        if maker is None:
            raise ConfigError(
                f"model.init_from={parts.init_from} is not there, and no recipe makes it; leave it out "
                "(model.init_from=null) and give --llm"
            )
        before = (*behind, _name_of(maker))
        return _unified_config(_as(maker, MllmJobConfig), tokenizer, options, before, **heads)
    if behind:
        options.note(f"what goes before: recipe {' on that of '.join(behind)}")
    text_config = _text_config(parts.llm, dict(parts.llm_config), options)
    if reads_features(parts, heads):
        heads |= _feature_fields(parts, tokenizer.config.vision, options)
    return DualTokenConfig.for_visual_tokenizer(text_config, tokenizer, **heads)


def _feature_fields(
    parts: MllmModelConfig, of_tokenizer: SiglipVisionConfig, options: ModelOptions
) -> dict[str, Any]:
    """Fields of the config for the tower that a recipe names, or one of the tokenizer's size."""
    vision, name = of_tokenizer, str(parts.vision_tower)
    if (Path(name) / "config.json").is_file():
        vision = SiglipConfig.from_pretrained(name).vision_config
    else:
        options.note("vision tower: one of the visual tokenizer's size")
    with torch.device("meta"):
        tower = VisionTower(tower_settings(vision, parts.feature_layer))
    fields = feature_fields(tower)
    if parts.precomputed_features:
        del fields["vision_config"]
    return fields


def _config_there(folder: str, heads: dict[str, Any], options: ModelOptions) -> DualTokenConfig:
    """Config of a model that a phase goes on from, which keeps what it has."""
    config = DualTokenConfig.from_pretrained(folder)
    if options.llm is not None:
        raise ConfigError(f"--llm {options.llm}: {folder} is there and has a language model; leave it out")
    require_heads(config, heads, folder)
    return config


def _text_config(llm: str | None, llm_config: dict[str, Any], options: ModelOptions) -> Any:
    name = options.llm or llm
    if name is None and llm_config:
        return llm_config
    if name in (None, NOT_GIVEN):
        name = PAPERS_LLM
        options.note(f"language model: {PAPERS_LLM} (or give --llm)")
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name)
    preset = name.rpartition("/")[2].lower()
    if preset not in LLM_PRESETS:
        raise ConfigError(
            f"no language model in {name}; give --llm and one of {', '.join(LLM_PRESETS)}, or a folder "
            "with its config.json"
        )
    return dict(LLM_PRESETS[preset])


def _recipe_that_exports(folder: str) -> JobConfig | None:
    """Settings of the recipe whose run leaves its model in this folder, None if there is none."""
    for name in available_recipes():
        if f"{load_recipe(find_recipe(name)).get('run_dir')}/export" == folder:
            return load_job_config([f"recipe={name}"], world_size=1, in_place_of_missing=NOT_GIVEN)
    return None


def _name_of(config: JobConfig) -> str:
    return next(
        n for n in available_recipes() if load_recipe(find_recipe(n)).get("run_dir") == config.run_dir
    )


def _as(config: JobConfig, kind: type) -> Any:
    if not isinstance(config, kind):
        raise ConfigError(f"{config.run_dir}/export is made by a {config.job} job, which makes another model")
    return config
