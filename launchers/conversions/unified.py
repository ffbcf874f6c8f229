"""A unified model from a base language model, a text tokenizer and a visual tokenizer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoTokenizer

from dualtoken.processing import DualTokenProcessor
from dualtoken.unified_model.config import DualTokenConfig
from dualtoken.unified_model.model import DualTokenForCausalLM
from dualtoken.unified_model.sequence import add_special_tokens
from eval.inputs import load_visual_tokenizer
from eval.progress import with_progress
from launchers.conversions.decoders import base_config, decoder_to_extend
from launchers.conversions.report import Report, by_part, new_folder, require_new, written
from launchers.conversions.weight_files import SHARD_BYTES, own_tensors, write_weights
from pretrain.random_state import seed_everything

LLM = "llm."
_OF_THE_TOKENIZER = ("codebooks.", "post_quantization.")


def build_unified(
    llm: Path,
    text_tokenizer: Path | None,
    visual_tokenizer: Path,
    output: Path,
    heads: Sequence[str] = (),
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[str]:
    """Write the model that a recipe with these folders starts from, in fp32; yields lines on it.

    Weights of the language model go from file to file; held are the new parts, the embedding and the output
    layer, and a shard.

    Args:
        llm: folder of a base language model.
        text_tokenizer: folder of its text tokenizer; None for `llm`. Special tokens that it lacks are added.
        visual_tokenizer: folder of an exported visual tokenizer.
        output: new folder.
        heads: fields of `DualTokenConfig` to set, as `key=value`.
        seed: of what is drawn; a recipe with this `seed` draws the same.
        shard_bytes: size of a file.

    Raises:
        FileNotFoundError, ValueError, UserError: something is missing, or does not fit; nothing is written.
    """
    require_new(output)
    text_config = base_config(llm)
    if not (text_tokenizer or llm).is_dir():
        raise FileNotFoundError(f"no folder {text_tokenizer or llm}; expected one with a text tokenizer")
    eyes = load_visual_tokenizer(visual_tokenizer).cpu()
    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(heads)))
    words = AutoTokenizer.from_pretrained(text_tokenizer or llm)
    added = add_special_tokens(words)
    config = DualTokenConfig.for_tokenizers(text_config, words, eyes, **settings)
    decoder, files = decoder_to_extend(llm)
    rows = decoder.get_input_embeddings().num_embeddings
    seed_everything(seed)
    model = DualTokenForCausalLM.around(config, decoder)
    model.set_codebooks(eyes.codebooks(), eyes.fingerprint())
    if model.post_quantization is not None:
        model.set_post_quantization(eyes.postquant_pixel, eyes.postquant_semantic)
    own = own_tensors(model)
    report = _report(own, {"llm": llm, "text_tokenizer": text_tokenizer or llm, "visual": visual_tokenizer})
    report.notes += [
        f"drawn with seed {seed}, as a recipe with seed={seed} does",
        f"text tokenizer: {added} special tokens added, {len(words)} in all",
    ]
    enlarged = decoder.get_input_embeddings().num_embeddings
    if enlarged > rows:
        report.notes.append(f"NEW: rows {rows} to {enlarged - 1} of the embedding and the output layer")
    if not files:
        report.notes.append("the language model was loaded whole: its files do not name weights as it does")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in with_progress(list(own), "writing weights"):
            tensor = files[name.removeprefix(LLM)] if own[name].is_meta else own[name]
            yield name, tensor.float() if tensor.is_floating_point() else tensor

    with new_folder(output, report) as folder:
        write_weights(folder, tensors(), shard_bytes)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = torch.float32
        model.config.save_pretrained(folder)
        DualTokenProcessor.for_config(model.config, words).save_pretrained(folder)
    yield from report.lines()
    yield written(output)


def _report(own: dict[str, Tensor], sources: dict[str, Path]) -> Report:
    report = Report("unified", {name: str(path) for name, path in sources.items()})
    report.renamed = {name.removeprefix(LLM): name for name in own if name.startswith(LLM)}
    taken = [name for name in own if name.startswith(_OF_THE_TOKENIZER)]
    report.new = [name for name in own if not name.startswith((LLM, *_OF_THE_TOKENIZER))]
    report.notes.append(f"from the visual tokenizer: {len(taken)} weights ({by_part(taken)})")
    return report
