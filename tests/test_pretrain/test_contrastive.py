"""The contrastive job on real shards: ranks make no difference, resumes are exact, the export loads."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from launchers.conversions.checkpoint import export_checkpoint
from tests.support.distributed import run_function
from tests.support.measured import is_measured
from tests.support.same_folder import assert_same_folder

WORDS = "red green blue dot rot gruen blau punkt".split()
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
GERMAN = {"red": "rot", "green": "gruen", "blue": "blau"}


def write_pictures(folder: Path, count: int) -> None:
    """A shard of dots in three colours at different places; the last picture is broken."""
    from data_pipeline.streams import prepare_dataset

    folder.mkdir(parents=True)
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for number in range(count):
            name = list(COLOURS)[number % 3]
            picture = Image.new("RGB", (16, 16), "white")
            picture.paste(COLOURS[name], (number % 10, number // 10, number % 10 + 6, number // 10 + 6))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            data = buffer.getvalue() if number < count - 1 else b"not a picture"
            captions = {"en": f"{name} dot", "de": f"{GERMAN[name]} punkt"}
            for suffix, content in (("png", data), ("json", json.dumps({"captions": captions}).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    prepare_dataset(folder)


def write_text_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )


def words(folder: Path, run: str, *more: str) -> list[str]:
    tower = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
    return [
        "job=contrastive",
        f"run_dir={folder / run}",
        "steps=6",
        "global_batch_size=8",
        "micro_batch_size=4",
        f"data.path={folder / 'pictures'}",
        f"validation_data.path={folder / 'pictures'}",
        f"text_tokenizer={folder / 'text_tokenizer'}",
        f"vision={{image_size: 16, patch_size: 8, {tower}}}",
        f"text={{max_position_embeddings: 4, {tower}}}",
        "wandb.mode=disabled",
        "precision=fp32",  # figures are compared exactly
        "log_every=1",
        "optimizer.lr=0.01",
        "captions_per_picture=2",
        *more,
    ]


def build(arguments: list[str]):
    from pretrain.config import load_job_config
    from pretrain.contrastive_task import ContrastiveTask
    from pretrain.runtime import start_runtime

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    return config, runtime, ContrastiveTask(config, runtime)


def losses_on_given_batches(folder: Path, level: str) -> tuple[list[float], dict]:
    """Losses and weights after four steps on eight pictures each, which the two ranks share."""
    from data_pipeline.streams import ImageTextBatch
    from pretrain.export import full_state_dict

    _, runtime, task = build(words(folder, "given", f"deepspeed={level}.json"))
    loader = iter(image_batches(folder))
    losses = []
    for _ in range(4):
        batch = next(loader)
        part = slice(runtime.rank * 4, (runtime.rank + 1) * 4)
        mine = ImageTextBatch(batch.keys[part], batch.image_bytes[part], batch.captions[part])
        losses.append(float(task.train_step([mine])["loss/contrastive"]))
        runtime.step += 1
    return losses, {name: value.clone() for name, value in full_state_dict(task.engines["siglip"]).items()}


def image_batches(folder: Path):
    from data_pipeline.streams import ImageStreamConfig, image_loader

    return image_loader(ImageStreamConfig(path=str(folder / "pictures")), 8, seed=3)


def losses_of_plain_torch(folder: Path) -> tuple[list[float], dict]:
    """The same in one process, without DeepSpeed and without exchange between ranks."""
    from pretrain.contrastive_task import ContrastiveModel, build_siglip
    from pretrain.optim import build_optimizer, learning_rate_factor
    from pretrain.random_state import seed_everything

    # Of the task only what reads a batch is used.
    config, runtime, task = build(words(folder, "plain"))
    seed_everything(config.seed)
    model = ContrastiveModel(build_siglip(config, task.text_tokenizer), rank=0, world_size=1)
    optimizer = build_optimizer(model, config.optimizer)
    loader = iter(image_batches(folder))
    losses = []
    for step in range(4):
        runtime.step = step
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * learning_rate_factor(step, config.optimizer, config.steps)
        images, captions = task.pairs(next(loader))
        loss = model(images, torch.stack([task.captions.tokenize(texts) for texts in captions], dim=1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


def send_signal_in_step(task, number: int) -> None:
    """Make this rank ask itself to stop during a step."""
    train_step = task.train_step

    def stopping_step(micro_batches):
        if task.runtime.step == number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(micro_batches)

    task.train_step = stopping_step


def on_two_ranks(folder: Path) -> dict:
    from pretrain.trainer import Trainer

    found: dict = {}
    found["plain"] = losses_of_plain_torch(folder)
    for level in ("zero1", "zero3"):
        found[level] = losses_on_given_batches(folder, level)
    changing = ["augmentation.max_shift=2", "augmentation.flip=true", "patch_dropout=0.5"]
    for run, signal_at in (("whole", None), ("resumed", 3), ("resumed", None)):
        config, runtime, task = build(words(folder, run, *changing))
        if signal_at is not None and runtime.rank == 1:
            send_signal_in_step(task, signal_at)
        found[f"{run}/finished"] = Trainer(config, runtime, task).run()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive")
    write_pictures(folder / "pictures", 31)
    write_text_tokenizer(folder / "text_tokenizer")
    return folder, run_function(on_two_ranks, folder, process_group=False)


@pytest.mark.parametrize("level", ["zero1", "zero3"])
def test_two_ranks_equal_plain_torch_on_the_whole_batch(runs, level):
    (losses, weights), (found_losses, found_weights) = runs[1][0]["plain"], runs[1][0][level]
    # fp32 sums in another order, and Adam makes steps of +-lr out of the smallest gradient.
    assert found_losses == pytest.approx(losses, rel=2e-5)
    assert found_weights.keys() == weights.keys()
    for name, value in weights.items():
        # Keys' biases have no effect: their gradient is zero but for rounding.
        if not name.endswith(("k_proj.bias", "in_proj_bias")):
            torch.testing.assert_close(found_weights[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert runs[1][1][level][0] == found_losses


def figures(folder: Path) -> list[dict]:
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in record.items() if not is_measured(key)} for record in records]


def test_resumed_run_equals_whole(runs):
    folder, two = runs
    assert two[0]["whole/finished"] and two[0]["resumed/finished"]
    whole = figures(folder / "whole")
    assert figures(folder / "resumed") == whole
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 5, 6, 6]
    validation = whole[-1]
    # Thirty readable pictures.
    assert validation["seen/chance_r1"] == pytest.approx(1 / 30)
    assert {"held_out/image_to_text_r1", "seen/text_to_image_r1"} <= validation.keys()


def test_broken_picture_is_recorded_once(runs):
    lines = (runs[0] / "whole" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = [json.loads(line) for line in lines]
    assert {record["key"] for record in rejected} == {"0030"}
    assert len(rejected) <= 2  # once for every rank that meets it


def test_the_model_of_a_checkpoint_is_what_the_run_exports(runs, tmp_path):
    """Of its engine a part is exported, under shorter names."""
    list(export_checkpoint(runs[0] / "whole", tmp_path / "model"))
    assert_same_folder(tmp_path / "model", runs[0] / "whole" / "export")


def test_export_loads(runs):
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    export = runs[0] / "whole" / "export"
    model, info = SiglipModel.from_pretrained(export, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    processor = AutoImageProcessor.from_pretrained(export)
    picture = Image.new("RGB", (40, 30), "white")
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == pixels.max() == 1.0
    tokens = AutoTokenizer.from_pretrained(export)("red dot", padding="max_length", max_length=4)
    output = model(input_ids=torch.tensor([tokens["input_ids"]]), pixel_values=pixels)
    assert output.logits_per_image.isfinite().all()


def test_recall():
    from pretrain.contrastive_task import recall_at_1

    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.2, 0.8], [0.3, 0.7, 0.1]])
    assert recall_at_1(similarity, ["a", "b", "c"]) == pytest.approx((1 / 3, 1 / 3))
    # With equal captions the second and third picture are both right.
    assert recall_at_1(similarity, ["a", "b", "b"]) == pytest.approx((1.0, 1.0))


def test_accumulation_is_refused(runs):
    from pretrain.config import ConfigError, load_job_config
    from pretrain.contrastive_task import ContrastiveTask
    from pretrain.runtime import Runtime

    config = load_job_config(words(runs[0], "refused"), world_size=1)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, 0, 2, runs[0])
    with pytest.raises(ConfigError, match="in one pass; expected micro_batch_size x ranks = 4"):
        ContrastiveTask(config, runtime)
