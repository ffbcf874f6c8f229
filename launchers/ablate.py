"""`dualtoken ablate`: which layers for pixels and meaning (arXiv 2503.14324, tables 2 and 6), over seeds."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.results import read_json, write_json
from launchers import processes
from launchers.errors import UserError

RECIPE = "quickstart_tokenizer"
NO_MEANING = ("losses.semantic_tokens=0", "losses.pooled=0", "losses.commitment_semantic=0")


@dataclass(frozen=True)
class Variant:
    """One way to build the tokenizer."""

    name: str
    meaning: str
    words: tuple[str, ...]  # settings that differ from the recipe's
    has_meaning: bool = True  # whether its semantic features are trained


@dataclass(frozen=True)
class Figure:
    """One column of the table."""

    key: str
    title: str
    scale: float
    digits: int
    semantic: bool = False  # empty for variants without trained semantic features


FIGURES = (
    Figure("psnr", "PSNR, dB", 1.0, 2),
    Figure("ssim", "SSIM", 1.0, 3),
    Figure("usage_pixel", "pixel codes used, %", 100.0, 1),
    Figure("usage_semantic", "semantic codes used, %", 100.0, 1, semantic=True),
    Figure("quantized_r1", "R@1 quantized, %", 100.0, 1, semantic=True),
    Figure("continuous_r1", "R@1 teacher, %", 100.0, 1, semantic=True),
)


def variants(num_layers: int, semantic_layer: int) -> list[Variant]:
    """The paper's comparisons for a tower of so many layers: (a) to (d), and the depth of the pixel layer."""

    def read_pixels_at(layer: int) -> str:
        return f"model.overrides.reconstruction_layer={layer}"

    quarter, half, three_quarters = (max(1, round(num_layers * part / 4)) for part in (1, 2, 3))
    return [
        Variant("merged", "(a) one codebook in one layer", ("model.overrides.merged_codebook=true",)),
        Variant("deep", "(b) pixels alone, deep layer", (read_pixels_at(semantic_layer), *NO_MEANING), False),
        Variant("shallow", "(c) pixels alone, shallow layer", (read_pixels_at(quarter), *NO_MEANING), False),
        Variant("dual", f"(d) DualToken, pixels at 1/4 (layer {quarter})", (read_pixels_at(quarter),)),
        Variant("half", f"DualToken, pixels at 1/2 (layer {half})", (read_pixels_at(half),)),
        Variant(
            "three_quarters",
            f"DualToken, pixels at 3/4 (layer {three_quarters})",
            (read_pixels_at(three_quarters),),
        ),
    ]


def measure(export: Path, siglip: Path, images: dict[str, Path]) -> dict[str, float]:
    """Figures of one trained tokenizer: reconstruction of held-out pictures, retrieval among seen ones."""
    from transformers import AutoTokenizer

    from dualtoken.visual_tokenizer.backbone import FrozenTeacher
    from eval.inputs import load_pictures, load_visual_tokenizer
    from eval.metrics.codebooks import codebook_statistics
    from eval.visual_tokenizer.reconstruction import reconstruct
    from eval.visual_tokenizer.retrieval import compare

    tokenizer = load_visual_tokenizer(export)
    config = tokenizer.config
    held_out = load_pictures(images["held_out"], config.image_size)
    seen = load_pictures(images["seen"], config.image_size, len(held_out))
    found = reconstruct(tokenizer, held_out.images)
    usage = [codebook_statistics(found.codes[:, :, q], config.codebook_size).usage for q in (0, 1)]
    teacher = FrozenTeacher.from_pretrained(siglip, config.semantic_layer).to(tokenizer.device)
    by_language = compare(tokenizer, teacher, AutoTokenizer.from_pretrained(siglip), seen).values()

    def recall(features: str) -> float:
        directions = ("text_to_image", "image_to_text")
        return statistics.mean(one[features][direction] for one in by_language for direction in directions)

    return {
        **found.summary(),
        "usage_pixel": usage[0],
        "usage_semantic": usage[1],
        "quantized_r1": recall("quantized"),
        "continuous_r1": recall("continuous"),
        "chance_r1": statistics.mean(one["quantized"]["chance"] for one in by_language),
    }


def ablate(
    run: Path, output: Path, steps: int, seeds: int, ranks: int, say: Callable[[str], None]
) -> list[dict]:
    """Train and measure every variant with every seed on a quickstart's data; write the table.

    A run that is done is not repeated. Writes `ablation.json` and `ablation.md` in `output`.

    Args:
        run: folder of a quickstart with sample data and SigLIP.
        output: folder for the runs and the table.
        steps: optimizer steps of each training.
        seeds: trainings of each variant.
        ranks: processes of a training.
        say: called with each line for the user.

    Returns:
        the rows of the table, with mean and spread (standard deviation over seeds) of every figure.

    Raises:
        UserError: the sample data or the SigLIP is missing, or a training failed.
    """
    from dualtoken.visual_tokenizer.config import preset_config

    siglip, data = run / "siglip" / "export", run / "sample_data" / "images"
    if not (siglip / "config.json").is_file():
        raise UserError(f"no SigLIP in {siglip}: run `dualtoken quickstart` first or give --run")
    preset = preset_config("quickstart")
    todo = variants(preset.vision.num_hidden_layers, preset.semantic_layer)
    results: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in todo}
    for seed in range(seeds):
        for variant in todo:
            folder = output / f"{variant.name}-seed{seed}"
            words = [*_words(folder, siglip, data, steps, seed), *variant.words]
            figures = read_json(folder / "ablation.json")
            if figures is None or figures["words"] != words:
                say(f"{variant.name}, seed {seed}: {variant.meaning}")
                figures = _train_and_measure(folder, words, ranks, siglip, data)
            results[variant.name].append(figures)
    rows = [_row(variant, results[variant.name]) for variant in todo]
    verdicts = orderings({row["name"]: row for row in rows})
    write_json(
        output / "ablation.json", {"steps": steps, "seeds": seeds, "rows": rows, "orderings": verdicts}
    )
    table = [*table_lines(rows), "", f"{steps} steps, {seeds} seed(s); spread: standard deviation.", ""]
    table += [f"- {verdict}" for verdict in verdicts]
    (output / "ablation.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    for line in table:
        say(line)
    say(f"written: {output / 'ablation.md'}, {output / 'ablation.json'}")
    return rows


def _words(folder: Path, siglip: Path, data: Path, steps: int, seed: int) -> list[str]:
    """Every loss but the adversarial one, which hides differences of this size; no stops on the way."""
    return [
        f"recipe={RECIPE}",
        f"run_dir={folder}",
        f"model.backbone={siglip}",
        f"data.path={data / 'train'}",
        f"validation_data.path={data / 'val'}",
        "wandb.mode=disabled",
        f"steps={steps}",
        "losses.gan=0",
        f"losses.perceptual_start_step={steps * 4 // 5}",
        "validate_every=0",
        "checkpoint_every=0",
        f"seed={seed}",
        f"model.overrides.codebook_seed={seed}",
    ]


def _train_and_measure(folder: Path, words: list[str], ranks: int, siglip: Path, data: Path) -> dict:
    """Train one variant with one seed; measure it and keep the figures in its folder."""
    finished = processes.run(processes.deepspeed_command("pretrain.train", words, ranks), ranks)
    if finished.returncode or not (folder / "done.json").is_file():
        raise UserError(f"the training in {folder} failed; see above, then start this again")
    images = {"held_out": data / "val", "seen": data / "train"}
    figures = {"words": words, **measure(folder / "export", siglip, images)}
    write_json(folder / "ablation.json", figures)
    return figures


def _row(variant: Variant, runs: Sequence[dict[str, float]]) -> dict:
    row: dict = {"name": variant.name, "meaning": variant.meaning}
    for figure in FIGURES:
        if figure.semantic and not variant.has_meaning:
            row[figure.key] = None
            continue
        values = [one[figure.key] for one in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        row[figure.key] = {"mean": statistics.mean(values), "spread": spread, "values": values}
    return row


def table_lines(rows: Sequence[dict]) -> list[str]:
    """The table in Markdown."""
    lines = [
        "| variant | " + " | ".join(figure.title for figure in FIGURES) + " |",
        "|---|" + "---|" * len(FIGURES),
    ]
    for row in rows:
        cells = []
        for figure in FIGURES:
            found = row[figure.key]
            if found is None:
                cells.append("-")
                continue
            text = f"{found['mean'] * figure.scale:.{figure.digits}f}"
            if found["spread"] is not None:
                text += f" ± {found['spread'] * figure.scale:.{figure.digits}f}"
            cells.append(text)
        lines.append(f"| {row['meaning']} | " + " | ".join(cells) + " |")
    return lines


def orderings(rows: dict[str, dict]) -> list[str]:
    """Say which of the paper's orderings appear, and whether beyond twice the standard error."""

    def compared(first: str, second: str, key: str, claim: str) -> str:
        a, b = rows[first][key], rows[second][key]
        difference = a["mean"] - b["mean"]
        spreads = [one["spread"] for one in (a, b)]
        if None in spreads:
            sure = "one seed: no spread known"
        else:
            error = (sum(spread**2 for spread in spreads) / len(a["values"])) ** 0.5
            sure = "beyond the spread" if abs(difference) > 2 * error else "within the spread"
        return f"{claim}: {'appears' if difference > 0 else 'does not appear'} ({difference:+.3g}, {sure})"

    return [
        compared("dual", "shallow", "psnr", "(d) reconstructs at least as well as (c)"),
        compared("shallow", "merged", "psnr", "(c) reconstructs better than (a)"),
        compared("shallow", "deep", "psnr", "(c) reconstructs better than (b)"),
        compared("dual", "merged", "quantized_r1", "(d) keeps meaning better than (a)"),
        compared("dual", "half", "psnr", "pixels at 1/4 beat 1/2"),
        compared("half", "three_quarters", "psnr", "pixels at 1/2 beat 3/4"),
    ]
