"""From pictures to pictures with the codes of others: pretokenize, train, export, draw, caption."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, SiglipModel

from data_pipeline.errors import DatasetError
from data_pipeline.pretokenize.command import main as pretokenize
from data_pipeline.shards.code_shards import CodeGeometry, DatasetManifest, iterate_shard, verify_dataset
from dualtoken.generation.generators import generate_text
from dualtoken.processing import DualTokenProcessor
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.loading import load_visual_tokenizer
from eval.inputs import load_models
from launchers.conversions.tokenizer import tokenizer_of_vq
from pretrain.config import load_job_config
from pretrain.mllm_task import MllmTask
from pretrain.runtime import Runtime
from tests.support.command import call
from tests.support.distributed import run_module
from tests.support.tiny_run import picture, text_tokenizer, write_images
from tests.support.tiny_vq import CODES, POSITIONS, SIZE, save_alone, save_whole

DECODER = (
    "{model_type: qwen2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 64, tie_word_embeddings: true}"
)
EMU3 = {"heads": "{codes_as: vocabulary, visual_input: codes_and_features}"}
JANUS = {"heads": "{head_hidden_size: 24, head_num_layers: 1, head_num_attention_heads: 2}"}


def words_of(folder, kind, run, *words):
    views = ", ".join(
        f"{{path: {folder / 'codes' / kind}, view: {view}}}" for view in ("caption", "generate")
    )
    return [
        "job=mllm",
        f"run_dir={folder / run}",
        f"model.visual_tokenizer={folder / kind}",
        f"data.blend=[{views}]",
        "steps=3",
        "global_batch_size=2",
        "micro_batch_size=1",
        "deepspeed=zero3.json",
        "data.context_length=96",
        "data.contexts_held=2",
        "data.num_workers=0",
        "data.prompt_dropout=0.2",
        "log_every=1",
        "precision=fp32",
        "wandb.mode=disabled",
        *words,
    ]


def new_model(folder, heads, *words):
    return [
        f"model.text_tokenizer={folder / 'words'}",
        f"model.llm_config={DECODER}",
        f"model.heads={heads}",
        # Of what a model has not they count for nothing.
        "optimizer.lr_scales={'visual_embedder.*': 1.0, '*_head.*': 1.0, 'semantic_projector.*': 1.0}",
        "frozen=['semantic_head.*']",
        *words,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """UniToken's way with Emu3's VQ on two ranks, and Janus's whole model with a head on one."""
    folder = tmp_path_factory.mktemp("others")
    write_images(folder / "images", 0, 6)
    text_tokenizer().save_pretrained(folder / "words")
    torch.manual_seed(0)
    SiglipModel(preset_config("tiny").backbone_config()).save_pretrained(folder / "siglip")
    list(tokenizer_of_vq(save_alone("emu3_vqgan", folder / "released"), SIZE, folder / "emu3"))
    save_whole("janus_vqgan", folder / "janus")
    for kind, more in (("emu3", ["--features", "pixels"]), ("janus", [])):
        words = ["--visual-tokenizer", str(folder / kind), "--output", str(folder / "codes" / kind)]
        assert pretokenize([*words, "--inputs", str(folder / "images"), "--backend", "pil", *more]) == 0
    rows = new_model(folder, **EMU3)
    rows += [f"model.vision_tower={folder / 'siglip'}", "losses.z_loss=1e-5", "optimizer.lr=1e-3"]
    run_module("pretrain.train", words_of(folder, "emu3", "rows", *rows), 2).check()
    run_module("pretrain.train", words_of(folder, "janus", "head", *new_model(folder, **JANUS)), 1).check()
    return folder


@pytest.mark.parametrize("kind", ["emu3", "janus"])
def test_shards_hold_the_codes_of_the_pictures(runs, kind):
    tokenizer = load_visual_tokenizer(runs / kind)
    manifest = verify_dataset(runs / "codes" / kind, tokenizer.fingerprint())
    assert (manifest.num_codebooks, manifest.num_quantizers, manifest.codebook_size) == (1, 1, CODES)
    assert json.loads((runs / "codes" / kind / "dataset.json").read_text("utf-8"))["num_codebooks"] == 1
    samples = [s for name in manifest.shards for s in iterate_shard(runs / "codes" / kind / name)]
    assert [sample.codes.shape for sample in samples] == [(1, POSITIONS, 1, 1)] * 6
    assert len({sample.codes.tobytes() for sample in samples}) > 1


def test_figures_are_of_the_one_codebook(runs):
    for run in ("rows", "head"):
        lines = (runs / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record for record in map(json.loads, lines) if record["split"] == "train"]
        assert len(steps) == 3
        for record in steps:
            assert record["loss/text"] > 0 and record["nll_pixel/depth_1"] == record["loss/pixel"] > 0
            assert not [name for name in record if "semantic" in name]
            assert ("z_loss/pixel" in record) == (run == "rows")


@pytest.mark.parametrize(("kind", "run"), [("emu3", "rows"), ("janus", "head")])
def test_a_picture_is_drawn_with_guidance(runs, tmp_path, capsys, kind, run):
    options = ["--model", runs / run / "export", "--visual-tokenizer", runs / kind, "--out", tmp_path]
    code, out, err = call(["generate", "red", "--guidance-scale", "2", *options], capsys)
    assert code == 0, err
    with Image.open(tmp_path / "red.png") as drawn:
        assert drawn.size == (SIZE, SIZE) and len(drawn.getcolors(1000)) > 1


def test_a_caption_is_written(runs, tmp_path, capsys):
    picture(0).save(tmp_path / "red.png")
    options = ["--model", runs / "head" / "export", "--visual-tokenizer", runs / "janus"]
    code, out, err = call(["caption", tmp_path / "red.png", *options], capsys)
    assert code == 0 and out.startswith(f"{tmp_path / 'red.png'}: "), err
    model, words, tokenizer = load_models(runs / "rows" / "export", runs / "emu3")
    assert model.config.first_code == 64 and model.config.tokenizer_fingerprint == tokenizer.fingerprint()
    processor = DualTokenProcessor.from_pretrained(runs / "rows" / "export")
    prompts = processor.documents("<image> English :", [picture(1)], visual_tokenizer=tokenizer)
    assert len(prompts[0].parts[0].codes) == POSITIONS and prompts[0].parts[0].features is not None
    assert len(generate_text(model, words, prompts, max_new_tokens=3)) == 1


def test_reconstructions_and_their_measures_take_it(runs, tmp_path, capsys):
    picture(0).save(tmp_path / "red.png")
    code, out, err = call(
        ["reconstruct", tmp_path / "red.png", "--visual-tokenizer", runs / "emu3", "--out", tmp_path / "out"],
        capsys,
    )
    assert code == 0 and "dB" in out, err
    code, out, err = call(["stats", runs / "codes" / "janus"], capsys)
    assert code == 0 and out.count("pixel") == 1 and "semantic" not in out, err
    code, out, err = call(["verify", runs / "codes" / "janus"], capsys)
    assert code == 0 and "16 positions x 1 codebooks x 1 depths, codes below 24" in out, err


def test_a_plan_counts_it(runs, capsys):
    words = ["--visual-tokenizer", runs / "emu3", "--llm", "qwen2.5-0.5b", "model.init_from=null"]
    heads = "model.heads={codes_as: vocabulary}"
    code, out, err = call(["plan", "mllm_joint", *words, heads], capsys)
    assert code == 0 and "(16 positions)" in " ".join(out.split()), err
    rows = 151936 + 64  # those of the language model, and a multiple of 64 for the 24 codes
    assert f"llm {494_032_768 + (rows - 151936) * 896:,} " in " ".join(out.split())
    assert "text_head" in out and "pixel_head" not in out and "visual_embedder" not in out


def test_what_does_not_go_together_is_named(runs, tmp_path, capsys):
    folder, config = runs / "codes" / "janus", load_visual_tokenizer(runs / "emu3").config
    manifest, geometry = DatasetManifest.load(folder), CodeGeometry.of(config)
    with pytest.raises(DatasetError, match="codes were made by the visual tokenizer"):
        manifest.require(folder, geometry, load_visual_tokenizer(runs / "emu3").fingerprint())
    with pytest.raises(DatasetError, match="codes have num_codebooks 1, the model expects 2"):
        manifest.require(folder, replace(geometry, num_codebooks=2))
    longer = AutoTokenizer.from_pretrained(runs / "rows" / "export")
    longer.add_tokens([f"word{number}" for number in range(64)])
    longer.save_pretrained(tmp_path / "longer")
    start = [f"model.init_from={runs / 'rows' / 'export'}", f"model.text_tokenizer={tmp_path / 'longer'}"]
    job = load_job_config([*words_of(runs, "emu3", "x", *start), "deepspeed=zero1.json"], world_size=1)
    with pytest.raises(ValueError, match="has .* tokens, but codes begin at row 64"):
        MllmTask(job, Runtime(0, 0, 1, torch.device("cpu"), torch.float32, 0, 4, tmp_path))
    code, _, err = call(["convert", "vq", "--model", runs / "released", "--out", tmp_path / "sized"], capsys)
    assert code == 2 and "names no size of pictures" in err and not (tmp_path / "sized").exists()
