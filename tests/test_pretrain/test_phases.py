"""The recipes of the tokenizer's phases: what each trains, and that the last one leaves the pixels alone."""

import functools
from pathlib import Path

import pytest
import torch

from dualtoken.visual_tokenizer.config import PRESETS, preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain.config import ConfigError, load_job_config
from pretrain.optim import freeze_parameters
from pretrain.tokenizer_model import expand_frozen, freeze_codebooks
from tests.support.distributed import run_function, run_module
from tests.test_pretrain.test_jobs import folder, tokenizer_run, tokenizer_words  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
PIXEL_PARTS = {"prequant_pixel", "prequant_shortcut", "postquant_pixel", "post_quant_conv", "decoder"}
SEMANTIC_PARTS = {"prequant_semantic", "postquant_semantic"}


@functools.cache
def model_of(preset: str) -> DualTokenVisualTokenizer:
    with torch.device("meta"):
        return DualTokenVisualTokenizer(preset_config(preset))


def trained_by(recipe: str, preset: str) -> tuple[set[str], set[int], list[str]]:
    """Parts of a preset's model that a phase trains, vision layers among them, and frozen codebooks."""
    words = [f"recipe={recipe}", f"model.preset={preset}", "model.backbone=x", "data.path=y"]
    config = load_job_config(words, world_size=8)
    model = model_of(preset).requires_grad_(True)
    freeze_parameters(model, expand_frozen(config.frozen, model.config))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {name.split(".")[0] for name in names if not name.startswith("backbone")}
    parts |= {".".join(name.split(".")[1:3]) for name in names if name.startswith("backbone")}
    layers = {int(name.split(".")[4]) for name in names if ".encoder.layers." in name}
    return parts, layers, config.frozen_codebooks


def pixel_parts(preset: str) -> set[str]:
    has_shortcut = model_of(preset).config.shortcut_layer is not None
    return PIXEL_PARTS if has_shortcut else PIXEL_PARTS - {"prequant_shortcut"}


# Vision layers in all, read by the pixel branch, read by the semantic branch (docs/tokenizer.md).
LAYERS = {
    "so400m_384": (27, 6, 26),
    "siglip_l_256": (24, 6, 23),
    "siglip2_so400m_256": (27, 6, 26),
    "quickstart": (4, 0, 3),
    "tiny": (4, 1, 3),
}
all_presets = pytest.mark.parametrize("preset", PRESETS)


@all_presets
def test_warmup_trains_the_new_parts_and_the_last_layer(preset):
    parts, layers, codebooks = trained_by("tokenizer_warmup", preset)
    assert parts >= pixel_parts(preset) | SEMANTIC_PARTS
    total, _, semantic = LAYERS[preset]
    assert layers == set(range(semantic, total)) and layers and not codebooks
    assert "vision_model.embeddings" not in parts and "text_model.encoder" not in parts


@all_presets
def test_joint_trains_everything_but_the_text_tower(preset):
    parts, layers, codebooks = trained_by("tokenizer_joint", preset)
    assert parts >= pixel_parts(preset) | SEMANTIC_PARTS | {"vision_model.embeddings", "vision_model.head"}
    assert layers == set(range(LAYERS[preset][0])) and not codebooks
    assert not any(part.startswith(("text_model", "logit")) for part in parts)


@all_presets
@pytest.mark.parametrize("recipe", ["tokenizer_semantic", "tokenizer_contrastive"])
def test_last_phases_train_nothing_that_pixels_pass(recipe, preset):
    parts, layers, codebooks = trained_by(recipe, preset)
    assert not parts & PIXEL_PARTS and "vision_model.embeddings" not in parts
    assert parts >= SEMANTIC_PARTS
    total, pixel, _ = LAYERS[preset]
    assert layers == set(range(pixel, total)) and codebooks == ["pixel"]


def test_frozen_patterns_follow_the_config():
    config = preset_config("tiny", shortcut_layer=2, text_config=None)
    patterns = [
        "a.<pixel.*",
        "b.<semantic",
        "prequant_shortcut.*",
        "backbone.text_model.*",
        "backbone.logit_*",
    ]
    expected = ["a.0.*", "a.1.*", "b.0", "b.1", "b.2", "prequant_shortcut.*"]
    assert expand_frozen(patterns, config) == expected
    with pytest.raises(ConfigError, match="'layers.<pixels.*' matches no parameter"):
        freeze_parameters(model_of("tiny"), expand_frozen(["layers.<pixels.*"], config))


@pytest.mark.parametrize("phase", ["semantic", "contrastive"])
def test_last_phases_keep_pixel_codes_and_pictures(folder, tokenizer_run, phase):  # noqa: F811
    before = tokenizer_run / "export"
    words = [
        f"recipe=tokenizer_{phase}",
        *tokenizer_words(folder, phase, 1)[1:],
        f"model.init_from={before}",
        "optimizer.warmup_steps=1",
    ]
    run_module("pretrain.train", words, 1).check()
    old = DualTokenVisualTokenizer.from_pretrained(before).eval()
    new = DualTokenVisualTokenizer.from_pretrained(folder / phase / "export").eval()
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        first, second = old(images), new(images)
    assert torch.equal(first.codes[:, :, 0], second.codes[:, :, 0])
    assert torch.equal(first.reconstruction, second.reconstruction)
    assert not torch.equal(first.semantic_features, second.semantic_features)
    assert torch.equal(old.quantizer_pixel.codebook, new.quantizer_pixel.codebook)
    assert not torch.equal(old.quantizer_semantic.codebook, new.quantizer_semantic.codebook)


def one_contrastive_step(arguments: list[str]) -> dict:
    """Loss, pooled vectors and weights of one step on eight pictures, the ranks' shares in turn."""
    from data_pipeline.streams import ImageStreamConfig, ImageTextBatch, image_loader
    from pretrain.export import full_state_dict
    from pretrain.runtime import start_runtime
    from pretrain.tokenizer_task import TokenizerTask

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    task = TokenizerTask(config, runtime)
    whole = next(iter(image_loader(ImageStreamConfig(path=config.data.path), 8, seed=3)))
    size = 8 // runtime.world_size
    part = slice(runtime.rank * size, (runtime.rank + 1) * size)
    batch = ImageTextBatch(whole.keys[part], whole.image_bytes[part], whole.captions[part])
    with torch.no_grad():
        images, _ = task.read_images(whole)
        texts = [
            task.captions.choose(key, captions)
            for key, captions in zip(whole.keys, whole.captions, strict=True)
        ]
        output = task.tokenizer.eval()(images, task.captions.tokenize(texts))
        scale, bias = output.logit_scale.clone(), output.logit_bias.clone()  # the step moves them
        task.tokenizer.train()
    figures = task.train_step([batch])
    weights = full_state_dict(task.engines["tokenizer"])
    return {
        "loss": float(figures["loss/contrastive"]),
        "pictures": output.pooled,
        "texts": output.text_pooled,
        "scale": scale,
        "bias": bias,
        "weights": {name: value.clone() for name, value in weights.items()},
    }


def test_contrastive_loss_is_siglips_over_all_ranks(folder):  # noqa: F811
    words = [
        *tokenizer_words(folder, "pairs", 1),
        "losses={contrastive: 1, gan: 0, mse: 0, pooled: 0, semantic_tokens: 0, commitment_semantic: 0}",
        "frozen=[backbone.text_model.*]",
        # Steps in proportion to the gradient, so that a wrong gradient is a wrong weight.
        *("optimizer.eps=1", "optimizer.lr=1", "optimizer.weight_decay=0", "gradient_clipping=0"),
    ]
    alone = [*words, "micro_batch_size=8"]
    (whole,) = run_function(one_contrastive_step, alone, world_size=1, process_group=False)
    halves = run_function(one_contrastive_step, words, process_group=False)
    pictures, texts = (torch.nn.functional.normalize(whole[name], dim=-1) for name in ("pictures", "texts"))
    logits = whole["scale"].exp() * pictures @ texts.T + whole["bias"]
    signs = 2 * torch.eye(8) - 1
    assert whole["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(signs * logits).sum().item() / 8)
    before = DualTokenVisualTokenizer.from_backbone(preset_config("tiny"), folder / "siglip").state_dict()
    assert [half["loss"] for half in halves] == pytest.approx([whole["loss"]] * 2, rel=1e-5)
    for name, value in whole["weights"].items():
        if "quantizer" not in name:
            torch.testing.assert_close(halves[0]["weights"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("backbone.logit_bias", "backbone.vision_model.head.probe", "prequant_semantic.proj.weight"):
        assert not torch.equal(whole["weights"][name], before[name]), name
    frozen = "backbone.text_model.embeddings.token_embedding.weight"
    assert torch.equal(whole["weights"][frozen], before[frozen])


def test_contrastive_loss_needs_the_text_tower(folder):  # noqa: F811
    words = [
        *tokenizer_words(folder, "blind", 1),
        *("losses.contrastive=1", "model.overrides.text_config=null", "frozen=[]"),
    ]
    output = run_module("pretrain.train", words, 1).output
    assert "losses.contrastive=1.0 needs a text tower" in output


def test_the_table_of_sizes_is_true():
    lines = (ROOT / "docs" / "tokenizer.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    table = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    sizes = {cells[0]: cells[1:] for cells in table if cells[0] in PRESETS}
    assert sizes.keys() == PRESETS.keys() - {"tiny"}
    for name, cells in sizes.items():
        with torch.device("meta"):
            model = DualTokenVisualTokenizer(preset_config(name))
        config, counts = model.config, model.parameters_per_part()
        assert cells[0] == f"{config.image_size} px, {config.positions}"
        assert cells[1] == f"{config.reconstruction_layer} / {config.semantic_layer}"
        assert cells[2] == f"{config.codebook_size} x {config.num_quantizers}"
        columns = [
            ["vision_model"],
            ["text_model"],
            ["prequant_pixel", "prequant_shortcut", "postquant_pixel"],
            ["prequant_semantic", "postquant_semantic"],
            ["post_quant_conv", "decoder"],
            ["quantizer_pixel", "quantizer_semantic"],
        ]
        expected = [sum(counts.get(part, 0) for part in parts) for parts in columns]
        assert [int(cell.replace(",", "")) for cell in cells[3:]] == expected, name


def test_unknown_codebook():
    model = DualTokenVisualTokenizer(preset_config("tiny"))
    with pytest.raises(ConfigError, match="'pixels' is none of pixel, semantic"):
        freeze_codebooks(model, ["pixels"])
