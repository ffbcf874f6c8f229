"""Decoders of which only the outline is built: names and shapes; their weights stay in their files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dualtoken.strict_loading import load_strictly
from dualtoken.unified_model.attention import DOCUMENT_ATTENTION
from dualtoken.unified_model.config import DualTokenConfig
from eval.inputs import require_export
from launchers.conversions.weight_files import WeightFiles, own_tensors
from launchers.errors import UserError


def unified_config(folder: Path) -> DualTokenConfig:
    """Read the config of an exported unified model.

    Raises:
        FileNotFoundError: there is none in the folder.
        UserError: it is of another kind of model.
    """
    require_export(folder, "unified model", "dualtoken train quickstart_mllm")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, DualTokenConfig):
        raise UserError(f"{folder} holds a {config.model_type!r} model; expected a unified model (dualtoken)")
    return config


def base_config(folder: Path) -> Any:
    """Read the config of a language model.

    Raises:
        FileNotFoundError: there is none in the folder.
        UserError: it is a unified model.
    """
    require_export(folder, "language model", "save_pretrained of transformers")
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, DualTokenConfig):
        raise UserError(f"{folder} is a unified model; `dualtoken convert llm` takes its language model out")
    return config


def outline(text_config: Any) -> Any:
    """Build a decoder without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            text_config, dtype=torch.float32, attn_implementation=DOCUMENT_ATTENTION
        )


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights by name, tied ones once."""
    return {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}


def vocabulary_weights(llm: Any) -> dict[str, nn.Parameter]:
    """The weights of a decoder that have a row for each token: of its embedding and its output layer."""
    modules = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    ids = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: parameter for name, parameter in llm.named_parameters() if id(parameter) in ids}


def decoder_to_extend(folder: Path) -> tuple[Any, Mapping[str, Tensor]]:
    """Build the decoder of a folder in fp32 with its weights still in their files.

    Only the weights that have a row for each token are read, for rows may be added. A decoder whose files
    name their weights otherwise than its modules, or are no safetensors, is loaded whole.

    Returns:
        The decoder, and its weights on the meta device by name: {} for one that was loaded whole.

    Raises:
        FileNotFoundError: there is no language model in the folder.
        ValueError: the weights do not fit their config.
    """
    llm = outline(base_config(folder))
    try:
        files = WeightFiles(folder)
    except FileNotFoundError:  # the older .bin files, which transformers reads without running them
        files = None
    if files is None or files.shapes() != shapes(llm):
        llm, _ = load_strictly(
            AutoModelForCausalLM.from_pretrained,
            folder,
            attn_implementation=DOCUMENT_ATTENTION,
            dtype=torch.float32,
        )
        return llm, {}
    with torch.no_grad():
        for name, parameter in vocabulary_weights(llm).items():
            # In place, so that a tied output layer stays tied.
            torch.utils.swap_tensors(parameter, nn.Parameter(files[name].float()))
    return llm, files
