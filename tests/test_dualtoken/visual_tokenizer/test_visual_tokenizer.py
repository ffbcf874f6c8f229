"""The visual tokenizer as users meet it: forward, codes, training, saving, presets; all at tiny size."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, SiglipModel

import dualtoken
from dualtoken.visual_tokenizer.backbone import (
    FrozenTeacher,
    full_precision_convolutions,
    hidden_states_after,
    load_backbone,
)
from dualtoken.visual_tokenizer.config import PRESETS, preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.quantizer import MultiCodebookVQ

OPTIONS = {
    "plain": {},
    "shortcut": {"shortcut_layer": 0},
    "patches_alone": {"reconstruction_layer": 0, "pixel_attention": False},
    "mcq": {"quantizer": "mcq"},
    "unshared": {"shared_codebook": False},
    "merged": {"merged_codebook": True},
    "full_attention": {"causal_post_quantization": False},
    "resized": {"decoder_latent_size": 6},
    "no_norm_no_text": {"latent_norm": False, "text_config": None},
}


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    return DualTokenVisualTokenizer(preset_config("tiny", **overrides))


def images(count=3, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def backward(output):
    losses = output.reconstruction.square().mean() + output.pooled.square().mean()
    (losses + output.commitment_loss_pixel + output.commitment_loss_semantic).backward()


# -- forward and codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_encode_and_decode_agree_with_the_forward_bit_for_bit(options):
    model = build(**options)
    model(images(8))
    model.update_codebooks()
    model.eval()
    with torch.no_grad():
        output = model(images())
    codes = model.encode(images())
    size = model.config.reconstruction_size
    assert codes.dtype == torch.int64 and codes.shape == (3, 16, 2, 2)
    assert output.reconstruction.shape == (3, 3, size, size)
    assert output.semantic_features.shape == (3, 16, 32) and output.pooled.shape == (3, 32)
    assert torch.equal(codes, output.codes)
    assert torch.equal(model.decode(codes), output.reconstruction)
    assert torch.equal(model.encode_semantic(images()), output.pooled)
    assert torch.equal(model.encode_semantic(codes), output.pooled)
    with torch.no_grad():
        assert torch.equal(model.decoder.paint(output.decoder_features), output.reconstruction)


def test_codes_of_patches_alone_depend_on_nothing_else():
    model = build(**OPTIONS["patches_alone"]).eval()
    one = images(1)
    patches = one.unfold(2, 4, 4).unfold(3, 4, 4)  # [1, 3, 4, 4, 4, 4]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = patches.flatten(2, 3)[:, :, order].unflatten(2, (4, 4))
    codes, codes_moved = model.encode(one)[0], model.encode(moved.transpose(3, 4).reshape(1, 3, 16, 16))[0]
    assert torch.equal(codes_moved[:, 0], codes[order, 0])  # pixels: moved with their patch
    assert not torch.equal(codes_moved[:, 1], codes[order, 1])  # meaning: of the whole picture
    away = build(reconstruction_layer=0, pixel_attention=True).eval()
    codes, codes_moved = away.encode(one)[0], away.encode(moved.transpose(3, 4).reshape(1, 3, 16, 16))[0]
    assert not torch.equal(codes_moved[:, 0], codes[order, 0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_codebooks_sum_to_the_quantized_latents(options):
    model = build(**options)
    codes = model.encode(images())
    books = model.codebooks()
    depths = 1 if options in (OPTIONS["plain"], OPTIONS["merged"]) else books.shape[1]
    assert books.shape == (2, depths, 32, 8) and books.dtype == torch.float32
    for branch, latents in enumerate(model.lookup(codes)):
        rows = [books[branch, d % books.shape[1]][codes[:, :, branch, d]] for d in range(2)]
        torch.testing.assert_close(rows[0] + rows[1], latents)


def test_patches_are_embedded_without_tf32():
    """It is on by default for convolutions on GPUs, where the products behind them do without."""
    model, found = build(**OPTIONS["patches_alone"]), []
    convolutions = torch.backends.cudnn.conv
    model.backbone.vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda *_: found.append(convolutions.fp32_precision)
    )
    before = convolutions.fp32_precision
    model.encode(images(1))
    assert found == ["ieee"] * 2 and convolutions.fp32_precision == before
    # Nor while another thread is done with its own, and would switch it on.
    with ThreadPoolExecutor(1) as threads, full_precision_convolutions():
        other = threads.submit(model.encode, images(1))
        wait([other], 0.2)
        assert len(found) == 2
    other.result()
    assert found == ["ieee"] * 4 and convolutions.fp32_precision == before


def test_branches_read_the_layers_they_are_told():
    model = build(reconstruction_layer=1, semantic_layer=3, shortcut_layer=0, shortcut_weight=0.25)
    vision, inputs = model.backbone.vision_model, images()
    hidden = vision(inputs, output_hidden_states=True).hidden_states  # after 0, 1, 2, ... layers
    taps = hidden_states_after(vision, inputs, {0, 1, 3})
    for layer in (0, 1, 3):
        torch.testing.assert_close(taps[layer], hidden[layer])
    pixel = model.prequant_pixel(hidden[1]) + 0.25 * model.prequant_shortcut(hidden[0])
    semantic = model.prequant_semantic(hidden[3])
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    for found, expected in zip(model._latents(inputs), (norm(pixel), norm(semantic))):
        torch.testing.assert_close(found, expected)


def test_encode_runs_no_layer_behind_the_codes():
    model = build()
    for layer in model.backbone.vision_model.encoder.layers[3:]:
        layer.forward = None
    model.postquant_semantic.forward = model.decoder.forward = None
    model.encode(images())


def test_merged_codebook_gives_both_branches_the_same_codes():
    model = build(merged_codebook=True)
    output = model(images())
    assert torch.equal(output.codes[:, :, 0], output.codes[:, :, 1])
    assert list(model.update_codebooks()) == ["merged"]
    assert not hasattr(model, "quantizer_pixel")


def test_causal_post_quantization_lets_no_later_position_in():
    for causal in (True, False):
        model = build(causal_post_quantization=causal)
        first, second = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
        second[:, :10] = first[:, :10]
        one, two = model.postquant_pixel(first), model.postquant_pixel(second)
        assert torch.allclose(one[:, :10], two[:, :10], atol=1e-6) is causal


def test_every_parameter_but_the_text_tower_learns():
    model = build(shortcut_layer=0)
    backward(model(images()))
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    tower = {name for name, _ in model.named_parameters() if name.startswith("backbone.text_model")}
    assert without == tower | {"backbone.logit_scale", "backbone.logit_bias"}


def test_overfits_eight_images():
    model, steps = build(decoder_channels=32, codebook_size=256), 90
    batch = torch.nn.functional.interpolate(images(8, 4), size=16, mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), 1.5e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * (1 - step / steps) + 1e-5
        output = model(batch)
        error = (output.reconstruction - batch).square().mean()
        loss = error + 0.25 * (output.commitment_loss_pixel + output.commitment_loss_semantic)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_codebooks()
    model.eval()
    error = (model.decode(model.encode(batch)) - batch).square().mean()
    psnr = 10 * torch.log10(4 / error)
    assert psnr > 30, psnr


# -- precision ---------------------------------------------------------------------------------------------


def test_bf16_keeps_the_codebooks_and_the_codes_of_one_precision():
    model = build()
    before = model.codebooks().clone()
    model.bfloat16()
    assert model.prequant_pixel.proj.weight.dtype == torch.bfloat16
    assert torch.equal(model.codebooks(), before) and before.dtype == torch.float32
    backward(model(images()))
    assert model.prequant_pixel.proj.weight.grad.abs().sum() > 0
    model.eval()
    output = model(images())
    assert output.reconstruction.dtype == torch.bfloat16
    assert torch.equal(model.decode(model.encode(images())), output.reconstruction)


def test_autocast_trains_and_searches_in_fp32():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images())
        assert torch.equal(model.encode(images()), output.codes)
    backward(output)
    latents = model.lookup(output.codes)[0]
    assert latents.dtype == torch.float32 and output.commitment_loss_pixel.dtype == torch.float32


def saved_tensors(model):
    """Elements that autograd keeps for the backward pass through the decoder."""
    kept = []
    latents = torch.randn(2, model.config.decoder_in_channels, *[model.config.latent_size] * 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        model.train().decoder.features(latents.requires_grad_())
    return sum(kept)


def test_gradient_checkpointing_gives_the_same_gradients_and_statistics():
    plain, saving = build(), build()
    saving.activation_checkpointing_enable({"use_reentrant": False})
    assert saving.backbone.vision_model.encoder.layers[0].gradient_checkpointing
    kept = [saved_tensors(model) for model in (plain, saving)]
    assert kept[1] < 0.5 * kept[0], "the decoder keeps its activations"
    for model in (plain, saving):
        model.train()
        backward(model(images()))
    for (name, one), two in zip(plain.named_parameters(), saving.parameters()):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)
    assert torch.equal(plain.quantizer_pixel.window, saving.quantizer_pixel.window)


def test_without_painting_all_else_is_the_same():
    plain, blind = build(), build()
    outputs = plain(images()), blind(images(), paint=False)
    assert outputs[1].reconstruction is None and outputs[1].decoder_features is None
    for name in ("codes", "semantic_features", "pooled", "commitment_loss_pixel", "commitment_loss_semantic"):
        assert torch.equal(outputs[0][name], outputs[1][name]), name
    for output in outputs:
        (output.pooled.square().sum() + output.commitment_loss_pixel).backward()
    for (name, one), two in zip(plain.named_parameters(), blind.parameters()):
        assert (one.grad is None) == (two.grad is None) and (
            one.grad is None or torch.equal(one.grad, two.grad)
        ), name


# -- teacher and backbone ----------------------------------------------------------------------------------


def test_teacher_is_frozen_for_good_and_independent():
    model = build()
    teacher = FrozenTeacher(model.backbone.vision_model, semantic_layer=3)
    before = teacher(images())
    hidden = model.backbone.vision_model(images(), output_hidden_states=True)
    torch.testing.assert_close(before.semantic_features, hidden.hidden_states[3])
    torch.testing.assert_close(before.pooled, hidden.pooler_output)
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters()) and not before.pooled.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher(images()).pooled, before.pooled)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(5)
    SiglipModel(preset_config("tiny").backbone_config()).save_pretrained(folder)
    return folder


def test_from_backbone_takes_over_both_towers(backbone):
    source = SiglipModel.from_pretrained(backbone).eval()
    model = DualTokenVisualTokenizer.from_backbone(preset_config("tiny"), backbone).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids), source.get_text_features(ids).pooler_output)
        teacher = FrozenTeacher.from_pretrained(backbone, semantic_layer=3)
        expected = source.get_image_features(images()).pooler_output
        torch.testing.assert_close(teacher(images()).pooled, expected)
        torch.testing.assert_close(FrozenTeacher(model.backbone.vision_model, 3)(images()).pooled, expected)
    assert torch.equal(model.backbone.logit_bias, source.logit_bias)


def test_from_backbone_leaves_the_text_tower_out_when_asked(backbone):
    model = DualTokenVisualTokenizer.from_backbone(preset_config("tiny", text_config=None), backbone)
    assert not model.backbone.has_text_tower
    with pytest.raises(ValueError, match="no text tower"):
        model.encode_text(torch.zeros(1, 4, dtype=torch.int64))


def test_backbones_by_their_name_on_the_hub(backbone, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append(name)
        if name == "google/none":
            raise LocalEntryNotFoundError("Name or service not known")
        return str(backbone)

    monkeypatch.setattr("dualtoken.visual_tokenizer.backbone.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    expected, found = load_backbone(backbone).state_dict(), load_backbone("google/siglip-tiny").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(FileNotFoundError, match="nor on the model hub .Name or service not known"):
        load_backbone("google/none")
    for path in ("/google/siglip", "siglip", "../google/siglip", "a/b/c"):  # cannot be a name there
        with pytest.raises(FileNotFoundError, match="no SigLIP backbone at .*expected a folder"):
            load_backbone(path)
    assert asked == ["google/siglip-tiny", "google/none"]


def test_wrong_backbones_are_explained(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="no SigLIP backbone at .*expected a folder with config.json"):
        DualTokenVisualTokenizer.from_backbone(preset_config("tiny"), tmp_path / "nowhere")
    other = preset_config("tiny", vision_config={**PRESETS["tiny"]["vision_config"], "num_hidden_layers": 5})
    with pytest.raises(ValueError, match="num_hidden_layers: 4 there, 5 here"):
        DualTokenVisualTokenizer.from_backbone(other, backbone)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}), encoding="utf-8")
    with pytest.raises(ValueError, match="'siglip2' model, expected 'siglip'"):
        DualTokenVisualTokenizer.from_backbone(preset_config("tiny"), tmp_path)


# -- saving, loading, identity -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_saved_tokenizer_loads_as_the_same_model(tmp_path, options):
    model = build(**options)
    model(images())
    model.update_codebooks()
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DualTokenVisualTokenizer and not loaded.training
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path).positions == 16
    for (name, one), two in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert loaded.fingerprint() == model.fingerprint()
    loaded.train()
    loaded(images())
    loaded.update_codebooks()  # the buffers that are not saved are there and clean


def test_a_loaded_tokenizer_is_saved_under_the_same_names(tmp_path):
    """Transformers renames weights of SigLIP towers when it loads and saves them."""
    model = build()
    folders = [tmp_path / "one", tmp_path / "two"]
    model.save_pretrained(folders[0])
    DualTokenVisualTokenizer.from_pretrained(folders[0]).save_pretrained(folders[1])
    for folder in folders:
        assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_loading_in_bf16_keeps_codebooks_unrounded(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = DualTokenVisualTokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.prequant_pixel.proj.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.codebooks(), model.codebooks())


def test_loading_is_strict(tmp_path):
    build().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "shortcut_layer": 0}), encoding="utf-8")
    with pytest.raises(ValueError, match="do not fit their config: 22 missing .prequant_shortcut"):
        DualTokenVisualTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "text_config": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="do not fit their config: .* unexpected .*text_model"):
        DualTokenVisualTokenizer.from_pretrained(tmp_path)


def test_image_processor_comes_with_the_model(tmp_path):
    build().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(np.full((40, 30, 3), (255, 0, 127), dtype=np.uint8))
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(
        pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]), atol=1e-3, rtol=0
    )


def test_fingerprint_follows_what_changes_codes_and_nothing_else():
    model = build(shortcut_layer=0)
    original = model.fingerprint()
    assert build(shortcut_layer=0).fingerprint() == original
    assert build(seed=1, shortcut_layer=0).fingerprint() != original
    assert build(shortcut_layer=0, shortcut_weight=0.5).fingerprint() != original
    assert build(shortcut_layer=0, codebook_decay=0.5).fingerprint() == original
    vision, layers = model.backbone.vision_model, model.backbone.vision_model.encoder.layers
    harmless = [layers[3].mlp.fc1.weight, model.decoder.conv_out.weight, model.postquant_semantic.proj.weight]
    harmless += [vision.head.probe, model.backbone.text_model.head.weight, model.quantizer_pixel.embed_sum]
    harmful = [
        layers[2].mlp.fc1.weight,
        vision.embeddings.patch_embedding.bias,
        model.prequant_pixel.norm1.bias,
    ]
    harmful += [model.prequant_shortcut.proj.weight, model.quantizer_semantic.codebook]
    for tensor in harmless + harmful:
        with torch.no_grad():
            tensor.view(-1)[0] += 1.0
        changed = any(tensor is each for each in harmful)
        assert (model.fingerprint() != original) is changed
        original = model.fingerprint()
    assert build().bfloat16().fingerprint() != build().fingerprint()


# -- refusals ----------------------------------------------------------------------------------------------


def test_wrong_input_is_explained():
    model = build()
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 20, 20\), expected \[B, 3, 16, 16\]"):
        model(images(2, 20))
    with pytest.raises(ValueError, match=r"images are torch.uint8, expected floats in \[-1, 1\]"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    broken = images()
    broken[1, 2, 3, 4] = float("nan")
    for use in (model, model.encode):
        with pytest.raises(ValueError, match="pixel_values contain NaN or infinity"):
            use(broken)
    with pytest.raises(ValueError, match=r"codes have shape \(1, 9, 2, 2\), expected .* = \[B, 16, 2, 2\]"):
        model.decode(torch.zeros(1, 9, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pixel codes lie in \[0, 32\], expected \[0, 31\]"):
        model.decode(torch.arange(64).view(1, 16, 2, 2).clamp_max(32))
    with torch.no_grad():
        model.prequant_semantic.proj.bias[0] = float("nan")
    with pytest.raises(ValueError, match="semantic latents contain NaN or infinity"):
        model.encode(images())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"semantic_layer": 5}, "semantic_layer=5, but the backbone has layers 0 to 4"),
        ({"codebook_dim": 5}, "codebook_dim=5 must divide the backbone's width 32"),
        ({"quantizer": "fsq"}, "quantizer='fsq'; choose 'rvq' or 'mcq'"),
        ({"quantizer": "mcq", "num_quantizers": 3}, "num_quantizers=3 to divide codebook_dim=8"),
        ({"codebook_size": 70000}, "codes are stored in 16 bits"),
        ({"codebook_sise": 32}, "unknown visual tokenizer field.* codebook_sise; known: .*codebook_size"),
        ({"num_quantizers": "4"}, "'num_quantizers' expected int, got str"),
    ],
)
def test_impossible_settings_are_explained(overrides, message):
    with pytest.raises(ValueError, match=message):
        preset_config("tiny", **overrides)


def test_unknown_preset_is_explained():
    with pytest.raises(ValueError, match="unknown visual tokenizer preset 'huge'; choose one of so400m_384"):
        preset_config("huge")


# -- presets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, positions, depth, size, vision_millions",
    [
        ("so400m_384", 729, 8, 384, 428.2),
        ("siglip_l_256", 256, 4, 256, 316.0),
        ("siglip2_so400m_256", 256, 8, 256, 427.9),
    ],
)
def test_paper_scale_builds_on_the_meta_device(name, positions, depth, size, vision_millions):
    config = preset_config(name)
    with torch.device("meta"):
        model = DualTokenVisualTokenizer(config)
    assert config.positions == positions and config.num_quantizers == depth
    assert config.reconstruction_size == config.image_size == size
    parts = model.parameters_per_part()
    assert parts["vision_model"] / 1e6 == pytest.approx(vision_millions, abs=0.1)
    assert parts["quantizer_pixel"] == 16384 * 32
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) + 2 * 16384 * 32


def test_quickstart_runs_and_is_small():
    torch.manual_seed(0)
    model = DualTokenVisualTokenizer(preset_config("quickstart"))
    output = model(images(1, 64))
    assert output.codes.shape == (1, 16, 2, 8) and output.reconstruction.shape == (1, 3, 64, 64)
    vision = sum(n for part, n in model.parameters_per_part().items() if part != "text_model")
    assert vision < 6e6


def test_multi_codebook_option_uses_its_quantizer():
    assert isinstance(build(quantizer="mcq").quantizer_semantic, MultiCodebookVQ)


def test_package_imports_without_loading_torch():
    code = "import sys, dualtoken; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dualtoken.DualTokenVisualTokenizer is DualTokenVisualTokenizer
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = dualtoken.Tokeniser
