"""The tokenizer's ablation: which layers for pixels and meaning (arXiv 2503.14324, tables 2 and 6)."""

import statistics
from pathlib import Path

from launchers.ablate import Ablation, Ordering
from launchers.errors import UserError
from launchers.variants import Figure, Variant

RECIPE = "quickstart_tokenizer"
STEPS = 200
NO_MEANING = ("losses.semantic_tokens=0", "losses.pooled=0", "losses.commitment_semantic=0")
OF_MEANING = ("usage_semantic", "quantized_r1", "continuous_r1")  # figures of trained semantic features

FIGURES = (
    Figure("psnr", "PSNR, dB", 1.0, 2),
    Figure("ssim", "SSIM", 1.0, 3),
    Figure("usage_pixel", "pixel codes used, %", 100.0, 1),
    Figure("usage_semantic", "semantic codes used, %", 100.0, 1),
    Figure("quantized_r1", "R@1 quantized, %", 100.0, 1, "chance_r1"),
    Figure("continuous_r1", "R@1 teacher, %", 100.0, 1, "chance_r1"),
)

ORDERINGS = (
    Ordering("dual", "shallow", "psnr", "(d) reconstructs at least as well as (c)"),
    Ordering("shallow", "merged", "psnr", "(c) reconstructs better than (a)"),
    Ordering("shallow", "deep", "psnr", "(c) reconstructs better than (b)"),
    Ordering("dual", "merged", "quantized_r1", "(d) keeps meaning better than (a)"),
    Ordering("dual", "half", "psnr", "pixels at 1/4 beat 1/2"),
    Ordering("half", "three_quarters", "psnr", "pixels at 1/2 beat 3/4"),
)


def variants(num_layers: int, semantic_layer: int) -> list[Variant]:
    """The paper's comparisons for a tower of so many layers: (a) to (d), and the depth of the pixel layer."""

    def read_pixels_at(layer: int) -> str:
        return f"model.overrides.reconstruction_layer={layer}"

    quarter, half, three_quarters = (max(1, round(num_layers * part / 4)) for part in (1, 2, 3))
    deep, shallow = (read_pixels_at(semantic_layer), *NO_MEANING), (read_pixels_at(quarter), *NO_MEANING)
    return [
        Variant("merged", "(a) one codebook in one layer", ("model.overrides.merged_codebook=true",)),
        Variant("deep", "(b) pixels alone, deep layer", deep, OF_MEANING),
        Variant("shallow", "(c) pixels alone, shallow layer", shallow, OF_MEANING),
        Variant("dual", f"(d) DualToken, pixels at 1/4 (layer {quarter})", (read_pixels_at(quarter),)),
        Variant("half", f"DualToken, pixels at 1/2 (layer {half})", (read_pixels_at(half),)),
        Variant(
            "three_quarters",
            f"DualToken, pixels at 3/4 (layer {three_quarters})",
            (read_pixels_at(three_quarters),),
        ),
    ]


def tokenizer_ablation(run: Path, steps: int | None = None) -> Ablation:
    """The paper's tokenizers on a quickstart's data.

    Args:
        run: folder of a quickstart with sample data and SigLIP.
        steps: optimizer steps of each training; None for `STEPS`.

    Raises:
        UserError: the SigLIP is missing.
    """
    from dualtoken.visual_tokenizer.config import preset_config

    siglip, data = run / "siglip" / "export", run / "sample_data" / "images"
    if not (siglip / "config.json").is_file():
        raise UserError(f"no SigLIP in {siglip}: run `dualtoken quickstart` first or give --run")
    preset = preset_config("quickstart")
    budget = STEPS if steps is None else steps
    images = {"held_out": data / "val", "seen": data / "train"}
    return Ablation(
        recipe=RECIPE,
        variants=variants(preset.vision.num_hidden_layers, preset.semantic_layer),
        figures=FIGURES,
        orderings=ORDERINGS,
        steps=budget,
        settings=lambda folder, seed: _words(folder, siglip, data, budget, seed),
        measure=lambda folder: measure(folder / "export", siglip, images),
    )


def _words(folder: Path, siglip: Path, data: Path, steps: int, seed: int) -> list[str]:
    """Every loss but the adversarial one, which hides differences of this size; no stops on the way."""
    return [
        f"recipe={RECIPE}",
        f"run_dir={folder}",
        f"model.backbone={siglip}",
        f"data.path={data / 'train'}",
        f"validation_data.path={data / 'val'}",
        "model.overrides.pixel_attention=true",  # as in the paper
        "wandb.mode=disabled",
        f"steps={steps}",
        "losses.gan=0",
        f"losses.perceptual_start_step={steps * 4 // 5}",
        "validate_every=0",
        "checkpoint_every=0",
        f"seed={seed}",
        f"model.overrides.codebook_seed={seed}",
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
