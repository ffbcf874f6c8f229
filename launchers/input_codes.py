"""Visual tokenizers and codes of a comparison of inputs: each made once, whatever reads them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launchers import processes
from launchers.errors import UserError
from launchers.inputs import IN_LAYER, IN_LAYER_WORDS, SCENES, Asked

IN_LAYER_RECIPE = "quickstart_tokenizer"


def with_tokenizers(asked: Asked, output: Path, ranks: int, say: Callable[[str], None]) -> Asked:
    """The same with every visual tokenizer there; one that reads a single layer is trained if it is missing.

    Raises:
        UserError: its training failed or was stopped.
    """
    from launchers.quickstart import relocated_settings

    if not asked.trains_in_layer or asked.run is None:
        return asked
    folder = output / "tokenizers" / IN_LAYER
    if not (folder / "done.json").is_file():
        say(f"visual tokenizer with one codebook on one layer: {folder}")
        words = [
            f"recipe={IN_LAYER_RECIPE}",
            f"run_dir={folder}",
            *relocated_settings(IN_LAYER_RECIPE, asked.run),
        ]
        words += [f"model.backbone={asked.siglip}", *IN_LAYER_WORDS, "wandb.mode=disabled"]
        finished = processes.run(processes.training_command(words, ranks), ranks)
        if finished.returncode or not (folder / "done.json").is_file():
            raise UserError(f"the training in {folder} did not end; see above, then start this again")
    return replace(asked, tokenizers={**asked.tokenizers, IN_LAYER: folder / "export"})


def codes_folder(output: Path, tokenizer: str, split: int | str) -> Path:
    """Where the codes of a visual tokenizer are: of a recipe's data by its place, or of held-out scenes."""
    return output / "codes" / tokenizer / str(split)


def make_codes(asked: Asked, output: Path, ranks: int, say: Callable[[str], None]) -> None:
    """Pretokenize all data once for each visual tokenizer, with pictures where an input needs them.

    Raises:
        UserError: it failed, or codes that are there are of another tokenizer.
    """
    from data_pipeline.shards.code_shards import MANIFEST, DatasetManifest
    from launchers.quickstart import pretokenize_arguments

    sources: dict[int | str, Path] = dict(enumerate(asked.data))
    if SCENES in asked.tasks and asked.run is not None:
        sources["held_out"] = asked.run / "sample_data" / "images" / "val" / "scenes"
    for name in dict.fromkeys(one.tokenizer for one in asked.chosen()):
        features = any(one.reads_features for one in asked.chosen() if one.tokenizer == name)
        for split, source in sources.items():
            folder = codes_folder(output, name, split)
            if (folder / MANIFEST).is_file() and (not features or DatasetManifest.load(folder).features):
                require_codes_of(asked.tokenizers[name], folder)
                continue
            say(f"codes of {source} by the visual tokenizer {name}: {folder}")
            words = pretokenize_arguments([source], asked.tokenizers[name], folder)
            words += [*(["--features", "pixels"] if features else []), *asked.pretokenize]
            finished = processes.run(_pretokenize_command(words, ranks), ranks)
            if finished.returncode or not (folder / MANIFEST).is_file():
                raise UserError(f"the codes in {folder} were not finished; see above, then start this again")


def _pretokenize_command(words: Sequence[str], ranks: int) -> list[str]:
    if ranks == 1:
        return ["python", "-m", "data_pipeline.pretokenize", *words]
    return processes.deepspeed_command("data_pipeline.pretokenize", words, ranks)


def require_codes_of(visual_tokenizer: Path, folder: Path) -> None:
    """Raise DatasetError unless a data set holds codes of the visual tokenizer."""
    from data_pipeline.shards.code_shards import DatasetManifest, require_same_codes
    from eval.inputs import load_visual_tokenizer

    expected = load_visual_tokenizer(visual_tokenizer).fingerprint()
    require_same_codes(folder, DatasetManifest.load(folder).fingerprint, expected, visual_tokenizer)
