"""VQ models of others behind our interface: codes and pictures as theirs, folders, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from dualtoken.visual_tokenizer.loading import load_visual_tokenizer
from dualtoken.visual_tokenizer.vq_tokenizer import VQTokenizer
from tests.support.tiny_vq import (
    CODES,
    DIM,
    KINDS,
    POSITIONS,
    SIZE,
    image_processor,
    save_alone,
    save_whole,
    vq_tokenizer,
)

WITH_DECODER = ("emu3_vqgan", "janus_vqgan")


def pictures(count: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def images(count: int = 3) -> torch.Tensor:
    """The same pictures in [-1, 1]."""
    arrays = np.stack([np.asarray(picture) for picture in pictures(count)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def theirs(vq, values: torch.Tensor) -> torch.Tensor:
    """Codes [B, P] by transformers' own encoder."""
    if hasattr(vq.config, "temporal_downsample_factor"):
        found = vq.encode(values, image_sizes=[[SIZE, SIZE]] * len(values), return_dict=True).image_tokens
        return torch.stack(list(found)).flatten(1)
    return vq.encode(values, return_dict=True).image_tokens.view(len(values), -1)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_transformers_and_its_image_processor(kind, tmp_path):
    tokenizer = VQTokenizer.from_pretrained(save_alone(kind, tmp_path), image_size=SIZE)
    processor = image_processor(kind)
    settings = {"do_resize": False} if kind == "emu3_vqgan" else {}
    values = processor(images=pictures(), return_tensors="pt", **settings)["pixel_values"].view(
        -1, 3, SIZE, SIZE
    )
    codes = tokenizer.encode(images())
    assert codes.shape == (3, POSITIONS, 1, 1) and codes.dtype == torch.int64
    vq = tokenizer.vq
    if kind == "janus_vqgan":  # it was trained to choose among unit vectors, as its decoder reads them
        embedding = vq.quantize.embedding.weight.data
        vq.quantize.embedding.weight.data = F.normalize(embedding, dim=-1)
        expected = theirs(vq, values)
        vq.quantize.embedding.weight.data = embedding
        assert not torch.equal(theirs(vq, values), expected)
    else:
        expected = theirs(vq, values)
    assert torch.equal(codes.flatten(1), expected)
    assert len(codes.unique()) > 4
    assert torch.equal(tokenizer.encode(images(1))[0], codes[0])  # whatever it is encoded with


@pytest.mark.parametrize("kind", WITH_DECODER)
def test_pictures_are_those_of_transformers(kind):
    scaled = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 200}
    tokenizer = vq_tokenizer(kind, **scaled)
    codes = torch.randint(CODES, (2, POSITIONS, 1, 1), generator=torch.Generator().manual_seed(1))
    painted = tokenizer.decode(codes)
    grid = (SIZE // 4, SIZE // 4) if kind == "emu3_vqgan" else (POSITIONS,)
    values = tokenizer.vq.decode(codes.view(2, *grid)).detach()
    mean, std = (torch.tensor(scaled[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    levels = (values * std + mean) * 200  # 0 to 255
    torch.testing.assert_close(painted, levels / 127.5 - 1)
    assert painted.shape == (2, 3, SIZE, SIZE)


def test_the_nearest_code_is_right_by_the_textbook():
    tokenizer = vq_tokenizer("chameleon_vqgan")
    latents = tokenizer.latents(images()).double()
    books = tokenizer.codebooks()
    assert books.shape == (1, 1, CODES, DIM) and books.dtype == torch.float32
    expected = torch.cdist(latents, books[0, 0].double()).argmin(dim=-1)
    assert torch.equal(tokenizer.encode(images())[..., 0, 0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_gives_the_same_tokenizer(kind, tmp_path):
    alone = save_alone(kind, tmp_path / "alone")
    whole = save_whole(kind, tmp_path / "whole")
    first = VQTokenizer.from_pretrained(alone, image_size=SIZE)
    first.save_pretrained(tmp_path / "own")
    sizes = (
        first.config.image_size,
        first.config.positions,
        first.config.codebook_size,
        first.config.grid_size,
    )
    assert sizes == (SIZE, POSITIONS, CODES, SIZE // 4)
    found = [VQTokenizer.from_pretrained(whole, image_size=SIZE), load_visual_tokenizer(tmp_path / "own")]
    if kind != "emu3_vqgan":  # the size is in the files
        found += [load_visual_tokenizer(folder) for folder in (alone, whole)]
    codes = first.encode(images())
    for tokenizer in found:
        assert tokenizer.fingerprint() == first.fingerprint()
        assert torch.equal(tokenizer.encode(images()), codes)
        assert not tokenizer.training and tokenizer.dtype == torch.float32
    assert isinstance(AutoModel.from_pretrained(tmp_path / "own"), VQTokenizer)
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "own")(pictures(), return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], images())


def test_the_fingerprint_is_of_what_changes_codes():
    tokenizer = vq_tokenizer("janus_vqgan")
    known = tokenizer.fingerprint()
    assert vq_tokenizer("janus_vqgan", image_mean=[0.4, 0.5, 0.5]).fingerprint() != known
    assert vq_tokenizer("janus_vqgan", seed=1).fingerprint() != known
    with torch.no_grad():
        tokenizer.vq.decoder.conv_in.weight.add_(1)
        assert tokenizer.fingerprint() == known
        tokenizer.vq.encoder.conv_in.weight.add_(1e-3)
    assert tokenizer.fingerprint() != known


def test_it_computes_in_fp32_whatever_its_files_name(tmp_path):
    folder = save_alone("janus_vqgan", tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    tokenizer = load_visual_tokenizer(folder)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert torch.equal(tokenizer.encode(images()), vq_tokenizer("janus_vqgan").encode(images()))


def test_norms_of_batches_stay_what_they_are():
    tokenizer = vq_tokenizer("emu3_vqgan")
    codes, known = tokenizer.encode(images()), tokenizer.fingerprint()
    tokenizer.train()
    assert torch.equal(tokenizer.encode(images()), codes) and tokenizer.fingerprint() == known


def test_codes_are_found_without_tf32():
    """It is on by default for convolutions on GPUs."""
    tokenizer, found = vq_tokenizer("janus_vqgan"), []
    convolutions = torch.backends.cudnn.conv
    tokenizer.vq.quant_conv.register_forward_hook(lambda *_: found.append(convolutions.fp32_precision))
    before = convolutions.fp32_precision
    tokenizer.encode(images())
    assert found == ["ieee"] and before == convolutions.fp32_precision != "ieee"


def test_wrong_inputs_are_refused():
    tokenizer = vq_tokenizer("janus_vqgan")
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 8, 8\), expected \[B, 3, 16, 16\]"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images are torch.uint8, expected floats in \[-1, 1\]"):
        tokenizer.encode(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images contain NaN or infinity; check the image decoding"):
        tokenizer.encode(torch.full((1, 3, SIZE, SIZE), float("nan")))
    with pytest.raises(ValueError, match=r"codes have shape \(1, 16, 2, 1\), expected .* \[B, 16, 1, 1\]"):
        tokenizer.decode(torch.zeros(1, POSITIONS, 2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes lie in \[24, 24\], expected \[0, 23\]"):
        tokenizer.decode(torch.full((1, POSITIONS, 1, 1), CODES))
    with pytest.raises(ValueError, match="one codebook, of pixels, and no semantic features"):
        tokenizer.encode_semantic(images())
    with pytest.raises(ValueError, match="chameleon_vqgan' of transformers has an encoder alone"):
        vq_tokenizer("chameleon_vqgan").decode(torch.zeros(1, POSITIONS, 1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 18}, "a position of this VQ model stands for 4 pixels a side"),
        ({"image_std": [0.5, 0.0, 0.5]}, "no 0 to divide by"),
        ({"vq_config": {"model_type": "qwen2"}}, "vq_config is of a 'qwen2', expected one of emu3_vqgan"),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        vq_tokenizer("emu3_vqgan", **fields)


def test_what_a_folder_lacks_is_named(tmp_path):
    janus = save_alone("janus_vqgan", tmp_path / "janus")

    def changed(name):
        return shutil.copytree(janus, tmp_path / name)

    def refused(folder, message, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            VQTokenizer.from_pretrained(folder, **settings)

    refused(
        save_alone("emu3_vqgan", tmp_path / "emu3"), "takes any; choose one: dualtoken convert vq --model"
    )
    bare = changed("bare")
    (bare / "preprocessor_config.json").unlink()
    refused(
        bare, "no preprocessor_config.json in .*bare; expected the settings of the model's image processor"
    )
    (bare / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}), encoding="utf-8")
    refused(bare, "lacks rescale_factor, image_std")
    weightless = changed("weightless")
    (weightless / "model.safetensors").unlink()
    refused(weightless, "no safetensors in .*weightless; expected the weights of a VQ model")
    other = changed("other")
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    refused(other, "holds a 'llama' model, expected a visual tokenizer: an export of ours, or emu3_vqgan")
    refused(tmp_path / "nothing", "no config.json in .*nothing")

    state = load_file(janus / "model.safetensors")
    del state["quant_conv.bias"]
    state["quant_conv.weight"] = torch.zeros(DIM, 9, 1, 1)
    state["strange"] = torch.zeros(1)
    broken = changed("broken")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    refused(
        broken, r"1 missing \(quant_conv.bias\); 1 unexpected \(strange\); 1 mismatched \(quant_conv.weight"
    )

    vq_tokenizer("emu3_vqgan").save_pretrained(tmp_path / "own")
    refused(tmp_path / "own", "saved for pictures of 16 pixels, got image_size=32", image_size=32)
    with pytest.raises(
        FileNotFoundError, match="no visual tokenizer in .*nothing: expected a folder with config"
    ):
        load_visual_tokenizer(tmp_path / "nothing")
