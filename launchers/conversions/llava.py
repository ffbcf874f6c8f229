"""The visual embedder as LLaVA's projector, and a projector of LLaVA's layout back into a unified model.

LLaVA's `mlp2x_gelu` is what an embedder is that has one MLP: two linear layers with a GELU between them. It
reads what a vision tower gives it, here the features of both codebooks side by side.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.shards.code_shards import require_same_codes
from dualtoken.plain_tensors import read_tensors
from dualtoken.unified_model.config import DualTokenConfig
from eval.inputs import load_dual_tokenizer
from eval.progress import with_progress
from launchers.conversions.decoders import unified_config
from launchers.conversions.report import FILE, Report, new_folder, require_new, written
from launchers.conversions.weight_files import (
    SHARD_BYTES,
    WeightFiles,
    read_safetensors,
    require_fit,
    write_weights,
)
from launchers.errors import UserError

EMBEDDER, PROJECTOR = "visual_embedder.mlps.0.", "model.mm_projector."
_LAYERS = {"up": "0", "down": "2"}
NAMES = {
    f"{EMBEDDER}{ours}.{kind}": f"{PROJECTOR}{theirs}.{kind}"
    for ours, theirs in _LAYERS.items()
    for kind in ("weight", "bias")
}
"""Name in a unified model -> name in LLaVA's files."""
# Kinds of decoder that LLaVA and LLaVA-NeXT have a class for.
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
_SAFE, _PICKLED, _TOWER = "mm_projector.safetensors", "mm_projector.bin", "visual_tokenizer"


def export_llava(model: Path, visual_tokenizer: Path, output: Path) -> Iterator[str]:
    """Write projector, config and visual tokenizer in LLaVA's layout; yields lines that say what it is.

    Of the model only the embedder is read.

    Raises:
        FileNotFoundError: there is no unified model or visual tokenizer.
        DatasetError: the model was trained with another visual tokenizer.
        UserError: the model has something that LLaVA's layout cannot express; nothing is written.
    """
    require_new(output)
    config = unified_config(model)
    files = WeightFiles(model)
    read = _codebooks_read(model, config, files)
    settings = _llava_config(model, config, read, files["codebooks.scale"])
    tokenizer = load_dual_tokenizer(visual_tokenizer).cpu()
    require_same_codes(visual_tokenizer, tokenizer.fingerprint(), config.tokenizer_fingerprint, model)
    report = Report("llava", {"model": str(model), "visual_tokenizer": str(visual_tokenizer)})
    report.renamed = dict(NAMES)
    report.dropped = [name for name in files if name not in NAMES]
    report.notes += [
        "the language model is not in it: `dualtoken convert llm` writes it, as LLaVA's --model-base",
        "LLaVA has no tower for the visual tokenizer: docs/convert.md shows the class to add",
    ]
    projector = {theirs: files[ours] for ours, theirs in NAMES.items()}
    with new_folder(output, report) as folder:
        save_file(projector, folder / _SAFE, metadata={"format": "pt"})
        torch.save(projector, folder / _PICKLED)  # LLaVA's own loader reads nothing else
        tokenizer.save_pretrained(folder / _TOWER)
        settings["mm_vision_tower"] = str((output / _TOWER).absolute())
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    yield from report.lines()
    yield written(output)


def _codebooks_read(model: Path, config: DualTokenConfig, files: WeightFiles) -> list[str]:
    """Names of the codebooks whose features the one MLP reads; UserError if there are two MLPs."""
    if config.reads_features:
        raise UserError(
            f"{model} has visual_input={config.visual_input!r}, of which LLaVA's layout has no tower here; "
            "expected a model that reads codes alone"
        )
    if config.codes_in_vocabulary:
        raise UserError(
            f"{model} has codes_as='vocabulary', so its codes are read by no embedder that could be LLaVA's "
            "projector; train a model with codes_as='vectors'"
        )
    read = list(config.codebooks_read)
    if config.embedder != "concat_mlp" and len(read) > 1:
        raise UserError(
            f"{model} has embedder={config.embedder!r}, an MLP for each codebook; LLaVA's mlp2x_gelu is one "
            "MLP over both, which only embedder='concat_mlp' is; train a model with that"
        )
    if config.place_embedding:
        raise UserError(
            f"{model} has place_embedding=true, for which LLaVA's layout has no place; train without"
        )
    found = {name: shape for name, shape in files.shapes().items() if name.startswith("visual_embedder.")}
    require_fit(model, found, _shapes(config, len(read)))
    return read


def _shapes(config: Any, branches: int) -> dict[str, tuple[int, ...]]:
    width = branches * (config.post_quantization_dim or config.codebook_dim)
    hidden = config.text_config.hidden_size
    sizes = ((hidden, width), (hidden,), (hidden, hidden), (hidden,))
    return dict(zip(NAMES, sizes, strict=True))


def _llava_config(model: Path, config: Any, read: list[str], scale: Tensor) -> dict[str, Any]:
    """The config of a LLaVA model with this decoder, and what its tower has to compute."""
    text = config.text_config.to_dict()
    if text["model_type"] not in _CLASSES:
        raise UserError(
            f"{model} has a decoder of the kind {text['model_type']!r}; LLaVA has classes for "
            f"{', '.join(_CLASSES)}"
        )
    kind, name = _CLASSES[text["model_type"]]
    return {
        **text,
        "model_type": kind,
        "architectures": [name],
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": len(read) * (config.post_quantization_dim or config.codebook_dim),
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "mm_dualtoken": {
            "codebooks": read,
            "features": config.visual_features,
            "scale": scale.tolist(),
            "fingerprint": config.tokenizer_fingerprint,
        },
    }


def import_projector(
    model: Path, projector: Path, output: Path, shard_bytes: int = SHARD_BYTES
) -> Iterator[str]:
    """Write a unified model anew with a projector of LLaVA's layout as its embedder; yields lines on it.

    All other weights go from file to file as they are.

    Args:
        model: folder of an exported unified model.
        projector: `mm_projector.safetensors` or `.bin`, or a folder with one of them.
        output: new folder.
        shard_bytes: size of a file.

    Raises:
        FileNotFoundError: there is no unified model or projector.
        ValueError, UserError: a file cannot be read safely, or does not fit; nothing is written.
    """
    require_new(output)
    config = unified_config(model)
    files = WeightFiles(model)
    read = _codebooks_read(model, config, files)
    source, given = _read_projector(projector)
    theirs = {ours: given[name] for ours, name in NAMES.items() if name in given}
    superfluous = {name: tuple(tensor.shape) for name, tensor in given.items() if name not in NAMES.values()}
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    require_fit(source, shapes | superfluous, _shapes(config, len(read)))
    report = Report("projector of LLaVA", {"model": str(model), "projector": str(source)})
    report.renamed = {name: name for name in files if name not in NAMES}
    report.renamed |= {theirs: ours for ours, theirs in NAMES.items()}
    report.dropped = list(NAMES)
    report.notes.append("dropped are the model's own weights of the embedder")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in with_progress(list(files), "writing weights"):
            yield name, theirs[name].to(files[name].dtype) if name in theirs else files[name]

    with new_folder(output, report) as folder:
        for path in sorted(model.iterdir()):
            if path.is_file() and ".safetensors" not in path.name and path.name != FILE:
                shutil.copyfile(path, folder / path.name)
        write_weights(folder, tensors(), shard_bytes)
    yield from report.lines()
    yield written(output)


def _read_projector(path: Path) -> tuple[Path, Mapping[str, Tensor]]:
    """Read LLaVA's projector; its names as here, whatever stands before `mm_projector` in the file."""
    if path.is_dir():
        path = next((path / name for name in (_SAFE, _PICKLED) if (path / name).is_file()), path / _SAFE)
    if not path.is_file():
        raise FileNotFoundError(f"no projector at {path}; expected {_SAFE} or {_PICKLED}, or their folder")
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    # As LLaVA reads it: what stands before `mm_projector` differs between its versions.
    return path, {PROJECTOR + name.split("mm_projector.")[-1]: tensor for name, tensor in weights.items()}
