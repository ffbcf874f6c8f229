"""The language model of a unified model, as transformers alone loads it."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from eval.progress import with_progress
from launchers.conversions.decoders import base_config, outline, shapes, unified_config, vocabulary_weights
from launchers.conversions.report import Report, new_folder, require_new, written
from launchers.conversions.weight_files import SHARD_BYTES, WeightFiles, require_fit, write_weights
from launchers.errors import UserError

LLM = "llm."


def extract_llm(
    model: Path,
    output: Path,
    base: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[str]:
    """Write the decoder with its text tokenizer for `AutoModelForCausalLM`; yields lines that say what it is.

    Weights go from file to file. A tied output layer stays tied.

    Args:
        model: folder of an exported unified model.
        output: new folder.
        base: folder of the language model it was built from: rows of the vocabulary beyond that one's are
            dropped, and its config, text tokenizer and generation config are those of the result. By default
            all rows stay, with the unified model's text tokenizer.
        dtype: what to round the weights to; by default they stay as they are.
        shard_bytes: size of a file.

    Raises:
        FileNotFoundError, UserError: something is missing, or does not fit; nothing is written.
    """
    require_new(output)
    ours = unified_config(model).text_config
    config = base_config(base) if base else copy.deepcopy(ours)
    decoder = outline(config)
    expected, vocabulary = shapes(decoder), vocabulary_weights(decoder)
    files = WeightFiles(model)
    found = {name.removeprefix(LLM): shape for name, shape in files.shapes().items() if name.startswith(LLM)}
    rows = config.vocab_size
    had = ours.vocab_size
    if rows > had:
        raise UserError(f"{base} has {rows} rows in its vocabulary, {model} only {had}: it is not its base")
    # Beyond the rows that are kept, nothing may differ.
    cut = {
        name: (rows, *shape[1:]) if name in vocabulary and shape[0] == had else shape
        for name, shape in found.items()
    }
    require_fit(base or model, cut, expected)
    report = Report("llm", {"model": str(model), **({"base": str(base)} if base else {})})
    report.renamed = {LLM + name: name for name in expected}
    report.dropped = [name for name in files if not name.startswith(LLM)]
    if had > rows:
        report.notes.append(f"dropped: rows {rows} to {had - 1} of {', '.join(vocabulary)}")
    kept = str(files[LLM + next(iter(expected))].dtype).removeprefix("torch.")
    if dtype and dtype != kept:
        report.notes.append(f"rounded from {kept} to {dtype}")
    target = getattr(torch, dtype or kept)
    report.notes.append(f"text tokenizer of {base or model}")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in with_progress(list(expected), "writing weights"):
            tensor = files[LLM + name][:rows] if name in vocabulary else files[LLM + name]
            yield name, tensor.to(target) if tensor.is_floating_point() else tensor

    with new_folder(output, report) as folder:
        write_weights(folder, tensors(), shard_bytes)
        config.architectures = [type(decoder).__name__]
        config.dtype = target
        config.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base or model).save_pretrained(folder)
        if base and (settings := base / "generation_config.json").is_file():
            shutil.copyfile(settings, folder / settings.name)
    yield from report.lines()
    yield written(output)
