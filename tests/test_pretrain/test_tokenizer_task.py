"""What a step of the tokenizer promises, and the settings that a phase's start takes or refuses."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.errors import DatasetError
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from pretrain.config import ConfigError, load_job_config
from pretrain.timing import StepClock
from pretrain.tokenizer_model import TokenizerModelConfig, build_visual_tokenizer
from tests.support.distributed import run_function
from tests.test_pretrain import test_contrastive
from tests.test_pretrain.test_jobs import folder, tokenizer_words  # noqa: F401

# -- going on from an export -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A tokenizer that was given more than its preset says."""
    path = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    config = preset_config("tiny", codebook_size=16, codebook_decay=0.9)
    DualTokenVisualTokenizer(config).save_pretrained(path)
    return path


def go_on(export, preset="tiny", **overrides):
    return build_visual_tokenizer(TokenizerModelConfig(preset, overrides, "unused", str(export)))


def test_an_export_keeps_what_it_was_given_and_takes_training_settings(export):
    as_it_is = go_on(export)
    assert (as_it_is.config.codebook_size, as_it_is.quantizer_pixel.decay) == (16, 0.9)
    changed = go_on(
        export, codebook_decay=0.5, restart_threshold=0.25, restart_unused_codes=False, codebook_size=16
    )
    for quantizer in changed.quantizers().values():
        assert (quantizer.decay, quantizer.restart_threshold) == (0.5, 0.25)
        assert not quantizer.restart_unused_codes and quantizer.codebook_size == 16
    assert changed.config.codebook_decay == 0.5  # and the next export says so
    assert changed.fingerprint() == as_it_is.fingerprint()
    assert go_on(export, preset=None).config.codebook_size == 16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codebook_size": 32}, r"^model.overrides.codebook_size=32: the tokenizer in .* has 16, .*take"),
        ({"semantic_layer": 2}, r"^model.overrides.semantic_layer=2: .* has 3, "),
        ({"decoder_channel_multipliers": (1, 2, 2)}, r"=\[1, 2, 2\]: .* has \[1, 1, 2\]"),
        (
            {"preset": "so400m_384"},
            r"^model.preset=so400m_384 is not the tokenizer in .*hidden_size 32 there, 1152 in the preset"
            r".*; give model.preset=tiny$",
        ),
        ({"codebook_sise": 16}, "unknown visual tokenizer field.* codebook_sise"),
    ],
)
def test_what_does_not_fit_an_export_is_refused(export, settings, message):
    with pytest.raises(ValueError, match=message):
        go_on(export, **settings)


def test_a_tower_of_no_preset_goes_on_without_one(tmp_path):
    tower = {**preset_config("tiny").vision.to_dict(), "intermediate_size": 64}
    DualTokenVisualTokenizer(preset_config("tiny", vision_config=tower)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="intermediate_size 64 there, 48 in .*; give model.preset=null$"):
        go_on(tmp_path)
    assert go_on(tmp_path, preset=None).config.vision.intermediate_size == 64


def test_neither_preset_nor_export():
    with pytest.raises(ConfigError, match="preset=null without model.init_from: give one of so400m_384"):
        build_visual_tokenizer(TokenizerModelConfig(preset=None, backbone="unused"))


# -- a step ------------------------------------------------------------------------------------------------


def build_task(arguments):
    """The task, and the micro-batches that its rank has of eight given pictures."""
    from data_pipeline.streams import ImageStreamConfig, ImageTextBatch, image_loader
    from pretrain.runtime import start_runtime
    from pretrain.tokenizer_task import TokenizerTask

    config = load_job_config(arguments)
    runtime = start_runtime(config)
    task = TokenizerTask(config, runtime)
    whole = next(iter(image_loader(ImageStreamConfig(path=config.data.path), 8, seed=3)))
    size = config.micro_batch_size
    starts = range(runtime.rank * size, 8, runtime.world_size * size)
    parts = [slice(start, start + size) for start in starts]
    return task, [ImageTextBatch(whole.keys[p], whole.image_bytes[p], whole.captions[p]) for p in parts]


def break_teacher(task, rank, micro_step):
    """Make one micro-batch of one rank have targets, and so a loss, that are NaN."""
    forward, calls = task.teacher.forward, []

    def broken(images):
        output = forward(images)
        calls.append(len(images))
        if task.runtime.rank == rank and len(calls) - 1 == micro_step:
            output.pooled.fill_(float("nan"))
        return output

    task.teacher.forward = broken


def state_of(task):
    """Weights and buffers of both engines, those of the tokenizer under their own names."""
    from pretrain.export import full_state_dict

    state = {name: value.clone() for name, value in full_state_dict(task.engines["tokenizer"]).items()}
    discriminator = full_state_dict(task.engines["discriminator"]) if task.gan_is_active else {}
    return state | {f"discriminator.{name}": value.clone() for name, value in discriminator.items()}


def skipped_step(arguments):
    """Weights and codebooks before and after a broken step, and after a sound one."""
    from pretrain.stepping import NotFiniteError

    task, micro_batches = build_task(arguments)
    task.train_step(micro_batches)
    states = [state_of(task)]
    break_teacher(task, rank=1, micro_step=0)
    with pytest.raises(NotFiniteError) as raised:
        task.train_step(micro_batches)
    states.append(state_of(task))
    figures = task.train_step(micro_batches)
    states.append(state_of(task))
    books = [quantizer.codebook.clone() for quantizer in task.tokenizer.quantizers().values()]
    what = (sorted(raised.value.losses), raised.value.micro_batches)
    return states, books, sorted(figures), [engine.skipped_steps for engine in task.engines.values()], what


def test_a_skipped_step_moves_neither_weights_nor_codebooks(folder):  # noqa: F811
    words = [*tokenizer_words(folder, "skipped", 2), "micro_batch_size=2", "losses.gan_start_step=0"]
    found = run_function(skipped_step, words, process_group=False)
    before, broken, sound = found[0][0]
    assert found[0][3] == [1, 1] and "codebook_pixel/usage" in found[0][2]
    assert [rank[4] for rank in found] == [([], []), (["loss/pooled", "loss/total"], [0])]
    for name, value in before.items():
        assert torch.equal(broken[name], value), name
    for name in ("quantizer_pixel.codebook", "quantizer_semantic.codebook", "decoder.conv_out.weight"):
        assert not torch.equal(sound[name], broken[name]), name
    assert sound["quantizer_pixel.num_updates"] == 2
    of_discriminator = [name for name in before if name.startswith("discriminator.")]
    assert any(not torch.equal(sound[name], broken[name]) for name in of_discriminator)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def validations(folder, words, of_pictures):  # noqa: F811
    """Figures of held-out pictures at two ZeRO levels; what is said of a micro-batch of broken ones."""
    from pretrain.config import job_classes
    from pretrain.runtime import start_runtime

    zero3 = json.loads((Path("ds_configs") / "zero3.json").read_text(encoding="utf-8"))
    keeps = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    zero3["zero_optimization"] |= {f"stage3_{name}": 0 for name in keeps}  # it gathers for every batch
    path = folder / f"zero3.{os.getpid()}.json"
    path.write_text(json.dumps(zero3), encoding="utf-8")
    found = []
    for level in ("zero2.json", str(path)):
        config = load_job_config([*words, f"deepspeed={level}"])
        runtime = start_runtime(config)
        task = job_classes(config.job)[1](config, runtime)
        task.train_step([next(iter(task.train_loader))])  # DeepSpeed finds out which modules read what
        with torch.no_grad():
            found.append(task.validate())
    if of_pictures:
        task.read_images = lambda _: (torch.empty(0, 3, 16, 16), [])
        with pytest.raises(DatasetError, match="no readable picture .0000, 0001.*clean the shards"):
            task.train_step([SimpleNamespace(keys=["0000", "0001"])])
    return found


@pytest.mark.parametrize("job", ["tokenizer", "contrastive"])
def test_ranks_with_more_held_out_pictures_wait_for_nobody_under_zero_3(folder, job):  # noqa: F811
    words = [*tokenizer_words(folder, "validated", 2), "optimizer.lr=0", "losses.contrastive=1"]
    if job == "contrastive":
        words = [*test_contrastive.words(folder, "validated"), "optimizer.lr=0"]
        words += [f"{name}.path={folder / 'images'}" for name in ("data", "validation_data")]
        words += [f"text_tokenizer={folder / 'siglip'}"]
    # Of 33 pictures one rank has 17, in five micro-batches, the other 16, the last of which is broken.
    first, second = run_function(validations, folder, words, job == "tokenizer", process_group=False)
    assert first == second and first[0] == pytest.approx(first[1], rel=1e-4)


def first_gan_weight(arguments):
    """What the step logs, and in one rank the formula by autograd through the decoder's last layer."""
    import torch.nn.functional as F

    from pretrain.losses import generator_loss

    task, (batch,) = build_task(arguments)
    with torch.enable_grad():
        images, _ = task.read_images(batch)
        output = task.tokenizer.eval()(images)
        losses = [F.mse_loss(output.reconstruction, images) + task.perceptual(output.reconstruction, images)]
        losses.append(generator_loss(task.discriminator(output.reconstruction)))
        kernel = task.tokenizer.last_layer.weight
        norms = [torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm() for loss in losses]
    task.tokenizer.train()
    expected = (norms[0] / (norms[1] + 1e-4)).item()
    return task.train_step([batch])["gan_weight"], expected


def test_the_adaptive_gan_weight_is_that_of_the_whole_batch(folder):  # noqa: F811
    words = [
        *tokenizer_words(folder, "adaptive", 1),
        # A hundredth, so that the recipe's weights of the other losses would show.
        "losses={gan: 0.01, gan_start_step: 0, gan_weight_range: [0, 1e9], mse: 5, perceptual: 0.1}",
        "perceptual_network.trunk=stlpips",
    ]
    alone = [*words, "micro_batch_size=8"]
    ((whole, expected),) = run_function(first_gan_weight, alone, world_size=1, process_group=False)
    assert whole == pytest.approx(0.01 * expected, rel=1e-4)
    halves = run_function(first_gan_weight, words, process_group=False)
    # The ratios of the halves differ from each other and from the whole batch's.
    ratios = [0.01 * ratio for _, ratio in halves]
    assert all(abs(ratio / whole - 1) > 1e-2 for ratio in [*ratios, sum(ratios) / 2])
    assert [weight for weight, _ in halves] == pytest.approx([whole] * 2, rel=1e-4)


def two_steps(arguments, painting=None):
    """Figures of two steps without their timing, and the state after them."""
    from pretrain.tokenizer_task import TokenizerTask

    with pytest.MonkeyPatch.context() as patch:
        if painting is not None:
            patch.setattr(TokenizerTask, "has_image_losses", painting)
        task, micro_batches = build_task(arguments)
        figures = [task.train_step(micro_batches) for _ in range(2)]
        levels = [module.gradient_checkpointing for module in task.tokenizer.decoder.up]
    return [{name: float(value) for name, value in of.items()} for of in figures], state_of(task), levels


def variants(joint, semantic):
    return {
        "plain": two_steps(joint),
        "saving": two_steps([*joint, "gradient_checkpointing=true"]),
        "compiled": two_steps([*joint, "gradient_checkpointing=true", "compile=[all]"]),
        "semantic": two_steps(semantic),
        "semantic, painting": two_steps(semantic, painting=True),
    }


@pytest.fixture(scope="module")
def steps(folder):  # noqa: F811
    words = tokenizer_words(folder, "variants", 1)
    joint = [*words, "losses.gan_start_step=0"]
    semantic = ["recipe=tokenizer_semantic", *words[1:], "optimizer.warmup_steps=1"]
    (found,) = run_function(variants, joint, semantic, world_size=1, process_group=False)
    return found


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)


def test_gradient_checkpointing_is_a_setting_that_changes_no_figure(steps):
    (plain, weights, off), (saving, same_weights, on) = steps["plain"], steps["saving"]
    assert not any(off) and all(on)
    assert saving == plain and "loss/gan" in plain[0]
    assert_same_state(weights, same_weights)


def test_compiled_parts_change_no_figure(steps):
    """On a CPU they are traced, and run as they are."""
    (plain, weights, _), (compiled, same_weights, _) = steps["plain"], steps["compiled"]
    assert compiled == plain
    assert_same_state(weights, same_weights)


def test_a_phase_without_image_losses_does_not_paint(steps):
    (blind, weights, _), (painting, same_weights, _) = steps["semantic"], steps["semantic, painting"]
    assert "loss/mse" not in blind[0] and blind[0].keys() | {"loss/mse"} == painting[0].keys()
    for figures, expected in zip(blind, painting, strict=True):
        assert figures == {name: value for name, value in expected.items() if name != "loss/mse"}
    assert blind[1]["loss/semantic"] != blind[0]["loss/semantic"]  # it learns
    assert_same_state(weights, same_weights)


# -- going on with another number of ranks -----------------------------------------------------------------


def test_broken_pictures_of_all_ranks_are_known_to_each(tmp_path):
    from data_pipeline.streams import ImageTextBatch
    from pretrain.image_input import ImageInput, ImageInputConfig

    device = torch.device("cpu")
    runtime = SimpleNamespace(device=device, run_dir=tmp_path, step=0, clock=StepClock(device))
    *old, alone = (ImageInput(ImageInputConfig(), 16, runtime) for _ in range(3))
    for rank, read in enumerate(old):
        read(ImageTextBatch([f"k{rank}"], [b"no picture"], [{}]))
    alone.load_state_dicts([read.state_dict() for read in old])
    for key in ("k0", "k1", "k2"):
        alone(ImageTextBatch([key], [b"no picture"], [{}]))
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["k0", "k1", "k2"]
