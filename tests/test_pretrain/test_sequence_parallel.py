"""Ulysses: two ranks that share packs score, learn and resume as one rank does."""

import json
import math
import re
from dataclasses import replace
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_pipeline.errors import DatasetError
from data_pipeline.streams import DocumentStreamConfig, prepare_dataset
from dualtoken.unified_model.sequence import pack_documents
from pretrain.config import ConfigError, fitting_ranks
from pretrain.mllm_task import MllmJobConfig, MllmTask
from pretrain.recomputation import checkpoint_activations
from pretrain.sequence_parallel import (
    ULYSSES_ATTENTION,
    own_stretch,
    pack_difference,
    require_same_packs,
    require_shareable,
    share_attention,
)
from tests.support.distributed import run_function
from tests.support.tiny_run import make_tiny_run
from tests.support.unified_support import (
    FEATURES,
    IDS,
    POSITIONS,
    VOCABULARY,
    caption,
    generation,
    plain,
    seeing,
    tiny_config,
    tiny_model,
    tokenized,
    with_one_code,
)
from tests.test_pretrain.test_trainer import figures
from tests.test_pretrain.test_world_sizes import train_on

T = 64
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 264}
ONE_KEY = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=1)
# What the model is, whether it is checkpointed, and what lies in front of the first image.
CASES = {
    "an image across the split": ({}, False, 24),
    "the same, its features read": (FEATURES, False, 24),
    "the same, with places, checkpointed": ({"place_embedding": True}, True, 24),
    "images behind the split alone": (FEATURES, False, 25),
    "one key for both": ({"text_config": ONE_KEY}, False, 24),
    "codes as rows of the vocabulary": (VOCABULARY, False, 24),
}


def pack(letters, codebooks=2):
    """An image to be drawn that begins `letters` + 7 tokens from the start, one to be read behind it."""
    documents = [plain("a" * letters), generation("dog", 1), caption("a cat")]
    if codebooks == 1:
        documents = with_one_code(*documents)
    return pack_documents(tokenized(*documents), T)


def scored(name, shared):
    """Sums, counts, and places of targets on this rank; gradients over all ranks."""
    overrides, checkpointed, letters = CASES[name]
    model = tiny_model(sharpen=3.0, **overrides).train()
    if checkpointed:
        checkpoint_activations(model)
    if shared:
        share_attention(model, 2)
    stretch = own_stretch(T, 2) if shared else None
    inputs = pack(letters, model.config.num_codebooks).model_inputs()
    output = model(**inputs, z_loss=1e-2, stretch=stretch)
    loss = output.text_nll + 2 * output.visual_nll.sum() + output.text_z_loss + output.visual_z_loss.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())  # or ZeRO-3 would wait for ever
    if shared:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    return {name: value.detach() for name, value in output.items()}, gradients


def on_a_rank():
    """Everything that needs ranks, so that they start once."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `start_runtime` has it
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    results = {name: scored(name, shared=True) for name in CASES}
    same, other = pack(24), pack(20 + dist.get_rank())
    differences = torch.tensor([pack_difference([same, b], 2) for b in (same, other)], dtype=torch.float64)
    dist.all_reduce(differences)
    query = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ConfigError, match="hands on no positions, .* take a decoder such as Qwen2.5"):
        ALL_ATTENTION_FUNCTIONS[ULYSSES_ATTENTION](torch.nn.Identity(), query, query, query, None)
    return results, differences.tolist()


@pytest.fixture(scope="module")
def ranks():
    return run_function(on_a_rank)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_score_and_learn_as_one(name, ranks):
    """fp32: sums to 1e-5, gradients to 1e-4 of the largest of each parameter."""
    pads = (pack(CASES[name][2]).input_ids[0] == IDS.image_pad).tolist()
    assert pads[T // 2] and pads[T // 2 - 1] == (CASES[name][2] == 24)
    (first, gradients), (second, others) = (results[name] for results, _ in ranks)
    whole, expected = scored(name, shared=False)
    for key in whole:
        if "position" in key:
            found = torch.cat([first[key], second[key]])
        else:
            found = first[key] + second[key]
        torch.testing.assert_close(found, whole[key], rtol=1e-5, atol=1e-5, msg=key)
    # The first position of an image behind the split is predicted in front of it.
    assert first["visual_count"] == (2 if CASES[name][2] == 24 else 1)
    assert first["visual_count"] + second["visual_count"] == POSITIONS
    for key, gradient in expected.items():
        assert torch.equal(gradients[key], others[key])
        largest = gradient.abs().max().item()
        assert largest > 0 or key.startswith("post_quantization"), key
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-4 * largest, msg=key)


def test_ranks_with_different_packs_do_not_go_unnoticed(ranks):
    (_, (same, different)), _ = ranks
    require_same_packs(same)
    with pytest.raises(DatasetError, match="read different ones.*data.on_bad_sample=stop to be told which"):
        require_same_packs(different)


def test_attention_of_one_rank_does_not_take_a_stretch():
    with pytest.raises(ValueError, match=re.escape("got the stretch (0, 32) of a row")):
        tiny_model()(**pack(24).model_inputs(), stretch=(0, 32))


def test_packs_with_continuous_features_are_not_shared():
    model = tiny_model(**seeing())
    with pytest.raises(ConfigError, match="sequence_parallel_size=2 with visual_input='codes_and_features'"):
        share_attention(model, 2)
    with pytest.raises(ValueError, match=re.escape("stretch (0, 32) of a row, and a model of continuous")):
        model(**pack(24).model_inputs(), stretch=(0, 32))


def runs(folder):
    """A pack for each rank; packs shared for two steps, then a pack for each."""
    blend = ", ".join(f"{{path: {folder / 'codes/train'}, view: {view}}}" for view in ("generate", "caption"))
    model = folder / "mllm" / "export"
    words = [
        *"job=mllm log_every=1 wandb.mode=disabled precision=fp32 deepspeed=zero3.json".split(),
        *"global_batch_size=4 micro_batch_size=1 optimizer.lr=0.003 optimizer.schedule=constant".split(),
        *"data.context_length=128 data.contexts_held=2 validation_data.context_length=64".split(),
        *(f"model.{name}={model}" for name in ("init_from", "text_tokenizer")),
        f"model.visual_tokenizer={folder / 'tokenizer' / 'export'}",
        f"data.blend=[{blend}]",
        f"validation_data.blend=[{{path: {folder / 'codes/val'}, view: generate}}]",
    ]
    train_on([*words, f"run_dir={folder / 'each'}", "steps=4"], resumed=False)
    # Two readers of one group read, in turn, what two ranks read side by side.
    shared = ["sequence_parallel_size=2", "gradient_checkpointing=true", "data.num_workers=2"]
    train_on([*words, f"run_dir={folder / 'shared'}", "steps=2", *shared], resumed=False)
    train_on([*words, f"run_dir={folder / 'shared'}", "steps=4"], resumed=False)
    # One rank's losses of the second step are not finite.
    with mock.patch.object(MllmTask, "score", broken_on_rank_1(MllmTask.score)):
        words += ["on_nonfinite=skip", f"run_dir={folder / 'skipped'}", "steps=3"]
        train_on([*words, *shared], resumed=False)


def broken_on_rank_1(score):
    def scored(task, batch, z_loss=0.0):
        output = score(task, batch, z_loss)
        broken = task.runtime.rank == 1 and task.runtime.step == 1
        return replace(output, visual_nll=output.visual_nll * (math.nan if broken else 1.0))

    return scored


def test_a_run_that_shares_packs_is_that_of_a_pack_for_each_rank(tmp_path):
    """Two ranks under ZeRO-3, fp32: figures of training and validation to 1e-4."""
    folder = make_tiny_run(tmp_path)
    for split in ("train", "val"):
        prepare_dataset(folder / "codes" / split)
    run_function(runs, folder, process_group=False)
    for split, steps in (("train", [1, 2, 3, 4]), ("val", [4])):
        expected, found = (figures(folder / run, split) for run in ("each", "shared"))
        assert list(expected) == steps
        for step, line in expected.items():
            kinds = ("loss", "nll", "accuracy", "gradient_norm", "documents", "padding_share")
            names = [name for name in line if name.startswith(kinds)]
            assert len(names) > 10
            for name in names:
                assert found[step][name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), (step, name)
    # A step that one of them cannot take is left out by both, and they go on together.
    shared, skipped = (figures(folder / run) for run in ("shared", "skipped"))
    assert list(skipped) == [1, 2, 3] and "difference" not in skipped[2]
    assert skipped[1]["loss/text"] == shared[1]["loss/text"] and skipped[2]["loss/pixel"] is None
    assert math.isfinite(skipped[3]["loss/pixel"]) and skipped[3]["skipped_steps"] == 1
    (line,) = (folder / "skipped" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = json.loads(line)["ranks"]  # the gradients of both: attention goes back through both
    assert not first["losses"] and first["parameters"] and second["losses"] and second["keys"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel_size": 0}, "sequence_parallel_size=0: expected 1, for none, or more"),
        (
            {"sequence_parallel_size": 3},
            "data.context_length=4096 cannot be split: expected a multiple of sequence_parallel_size=3, such "
            "as 4098",
        ),
        (
            {"sequence_parallel_size": 2, "validation_data": DocumentStreamConfig(context_length=63)},
            "validation_data.context_length=63 cannot be split",
        ),
        (
            {"sequence_parallel_size": 2, "compile": ["all"]},
            "compile=all with sequence_parallel_size=2: .* leave them out (compile=[heads])",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message).replace(re.escape(".*"), ".*")):
        job(**settings)


def job(**settings):
    sizes = {"run_dir": "x", "steps": 1, "global_batch_size": 2, "micro_batch_size": 1}
    return MllmJobConfig(**sizes, data=DocumentStreamConfig(), **settings)


def test_packs_are_counted_by_group():
    config = job(sequence_parallel_size=2)
    assert [config.micro_steps(ranks) for ranks in (2, 4)] == [2, 1]
    with pytest.raises(
        ConfigError, match="sequence_parallel_size=2 on 3 rank.* expected a multiple of 2 ranks"
    ):
        config.micro_steps(3)
    recipe = ["recipe=mllm_joint", "global_batch_size=4", "sequence_parallel_size=2"]
    assert [fitting_ranks(recipe, most) for most in (2, 3, 4, 8, 16)] == [2, 2, 4, 8, 8]


@pytest.mark.parametrize(
    ("size", "rope", "message"),
    [
        (3, {}, "the decoder has 4 heads, 2 of keys and values; expected a number that divides 4"),
        (2, {"rope_type": "dynamic", "factor": 2.0}, "rotary positions of the decoder are 'dynamic'"),
    ],
)
def test_decoders_that_cannot_be_shared(size, rope, message):
    config = tiny_config().text_config
    require_shareable(config, 4)
    config.rope_parameters |= rope
    with pytest.raises(ConfigError, match=message):
        require_shareable(config, size)
