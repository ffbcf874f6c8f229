"""Every job in bf16 through DeepSpeed, beside the same steps in fp32; exports and resumes are exact in both.

DeepSpeed casts parameters, not buffers, so a whole model cast by `.bfloat16()` would not show the same.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from tests.support.distributed import run_function
from tests.test_pretrain import test_contrastive
from tests.test_pretrain.test_jobs import STEPS, folder, losses, mllm_words, tokenizer_words  # noqa: F401
from tests.test_pretrain.test_trainer import figures, train

# The rates of a resumed run are those of an undisturbed one only if they do not depend on the last step.
CONSTANT = "optimizer.schedule=constant"
MUON = ["optimizer.name=muon", "optimizer.muon_lr=0.01", "gradient_clipping=0"]
PERCEPTUAL = ["perceptual_network={net: vgg, trunk: stlpips}", "losses.perceptual=0.1"]
RESUMED = ["tokenizer_zero2_muon", "mllm_zero3_muon"]
NOISY = {"loss/total", "loss/gan"}  # sums of the others, and a weight times a discriminator's answer near 0
# Phases that leave parts alone, by the beginnings of their names.
FROZEN = {
    "semantic": ("prequant_pixel", "postquant_pixel", "decoder", "backbone.vision_model.embeddings"),
    "generate": ("llm.", "visual_embedder."),
}


def tolerance(name: str) -> float:
    """How far a loss in bf16 may part from that in fp32, by step, relative and absolute.

    bf16 keeps 8 bits, 0.4 %, in every layer. Where codes are chosen, small differences grow.
    """
    return 1e-3 if name.startswith(("mllm", "generate")) else 0.02


def runs_in_order(folder: Path) -> dict[str, list[str]]:  # noqa: F811
    """Words of each run, without its folder and precision; later ones read what earlier ones export."""
    tokenizer, mllm = tokenizer_words(folder, "unused", 2), mllm_words(folder, "unused", 2)
    images = [f"{name}.path={folder / 'images'}" for name in ("data", "validation_data")]
    exported = folder / "fp32" / "mllm_zero1" / "export"
    base = ("model.llm_config", "model.heads", "model.text_tokenizer")
    return {
        "contrastive": [
            *test_contrastive.words(folder, "unused"),
            *images,
            f"text_tokenizer={folder / 'siglip'}",
        ],
        "tokenizer_zero1": [*tokenizer, "deepspeed=zero1.json", *PERCEPTUAL],
        "tokenizer_zero2_muon": [*tokenizer, *MUON, "micro_batch_size=2"],
        "tokenizer_zero3": [*tokenizer, "deepspeed=zero3.json", "losses.gan_weight_range=[0.3,10]"],
        "semantic": [
            "recipe=tokenizer_semantic",
            *tokenizer[1:],
            f"model.init_from={folder / 'fp32' / 'tokenizer_zero1' / 'export'}",
            "optimizer.warmup_steps=1",
        ],
        "mllm_zero1": [*mllm, "deepspeed=zero1.json", "losses.z_loss=1e-4", "gradient_checkpointing=true"],
        "mllm_zero2_muon": [*mllm, "deepspeed=zero2.json", *MUON],
        "mllm_zero3_muon": [*mllm, *MUON],
        "generate": [
            *(word for word in mllm if not word.startswith(base)),
            *(f"model.{name}={exported}" for name in ("init_from", "text_tokenizer")),
            "frozen=[llm.*, visual_embedder.*]",
        ],
    }


def run_all(folder: Path) -> dict[str, list[str]]:  # noqa: F811
    """All runs in one pair of processes; what each start ended with."""
    from data_pipeline.pretokenize import command as pretokenize

    ended = {}
    for name, words in runs_in_order(folder).items():
        if name == "mllm_zero1":  # the first that reads codes
            if dist.get_rank() == 0:
                arguments = ["--inputs", str(folder / "images"), "--output", str(folder / "codes")]
                arguments += ["--visual-tokenizer", str(folder / "tokenizer" / "export")]
                assert pretokenize.main(arguments) == 0
            dist.barrier()
        for precision in ("fp32", "bf16"):
            run = [*words, CONSTANT, f"precision={precision}", f"run_dir={folder / precision / name}"]
            ended[f"{precision}/{name}"] = [train(run)]
        if name in RESUMED:
            run = [*words, CONSTANT, "precision=bf16", f"run_dir={folder / 'resumed' / name}"]
            ended[f"resumed/{name}"] = [train([*run, "steps=3"]), train(run)]
    return ended


@pytest.fixture(scope="module")
def runs(folder) -> Path:  # noqa: F811
    torch.manual_seed(0)
    start = DualTokenVisualTokenizer.from_backbone(preset_config("tiny"), folder / "siglip")
    start.save_pretrained(folder / "tokenizer" / "export")
    ended, _ = run_function(run_all, folder, process_group=False, timeout=500)
    assert {outcome for outcomes in ended.values() for outcome in outcomes} == {"finished"}, ended
    return folder


NAMES = list(runs_in_order(Path("folder")))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_learns_like_fp32(runs, name):
    single, half = (figures(runs / precision / name) for precision in ("fp32", "bf16"))
    assert list(single) == list(half) == list(range(1, STEPS + 1))
    for step, expected in single.items():
        keys = {key for key in expected if key.startswith(("loss", "nll", "z_loss"))}
        assert keys and keys == {k for k in half[step] if k.startswith(("loss", "nll", "z_loss"))}
        for key in keys - NOISY:
            bound = step * tolerance(name)
            assert half[step][key] == pytest.approx(expected[key], rel=bound, abs=bound), (step, key)
    for key in (key for key in single[1] if key.startswith("gradient_norm")):
        assert half[1][key] == pytest.approx(single[1][key], rel=0.05), key


@pytest.mark.parametrize("name", NAMES)
def test_exports_hold_the_fp32_masters(runs, name):
    export = runs / "bf16" / name / "export"
    weights = load_file(export / "model.safetensors")
    floats = {key: value for key, value in weights.items() if value.is_floating_point()}
    assert {value.dtype for value in floats.values()} == {torch.float32}
    assert '"bfloat16"' not in (export / "config.json").read_text(encoding="utf-8")
    # Steps are smaller than what bf16 can tell apart.
    finer = [key for key, value in floats.items() if not torch.equal(value, value.bfloat16().float())]
    assert len(finer) > len(floats) / 3


@pytest.mark.parametrize("name", FROZEN)
def test_what_a_phase_freezes_comes_out_unrounded(runs, name):
    words = runs_in_order(runs)[name]
    before = next(word.partition("=")[2] for word in words if word.startswith("model.init_from="))
    old, new = (load_file(Path(f) / "model.safetensors") for f in (before, runs / "bf16" / name / "export"))
    assert old.keys() == new.keys()
    frozen = [key for key in old if key.startswith(FROZEN[name])]
    assert len(frozen) > 5
    for key in frozen:
        assert torch.equal(old[key], new[key]), key
    assert any(not torch.equal(old[key], new[key]) for key in old.keys() - set(frozen))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_bf16_run_equals_an_undisturbed_one(runs, name):
    whole, resumed = runs / "bf16" / name, runs / "resumed" / name
    assert losses(resumed) == losses(whole)
    before, after = (load_file(run / "export" / "model.safetensors") for run in (whole, resumed))
    for key, value in before.items():
        assert torch.equal(after[key], value), key


def test_codes_do_not_depend_on_the_precision_of_training(runs):
    """A tokenizer trained in bf16 is read, named and used in fp32."""
    from data_pipeline.pretokenize import command as pretokenize
    from data_pipeline.shards.code_shards import DatasetManifest

    export = runs / "bf16" / "tokenizer_zero1" / "export"
    arguments = ["--inputs", str(runs / "images"), "--output", str(runs / "codes_of_bf16")]
    assert pretokenize.main([*arguments, "--visual-tokenizer", str(export)]) == 0
    tokenizer = DualTokenVisualTokenizer.from_pretrained(export)
    assert tokenizer.dtype == torch.float32
    assert DatasetManifest.load(runs / "codes_of_bf16").fingerprint == tokenizer.fingerprint()
    done = json.loads((runs / "bf16" / "tokenizer_zero1" / "done.json").read_text(encoding="utf-8"))
    assert done["precision"] == "bfloat16"
