"""The released checkpoint layout: parity with a plain transcription, round trips, strict and safe loading."""

import json

import pytest
import torch

from dualtoken.plain_tensors import read_tensors
from dualtoken.visual_tokenizer.config import preset_config
from dualtoken.visual_tokenizer.model import DualTokenVisualTokenizer
from dualtoken.visual_tokenizer.released import (
    WeightsError,
    load_released,
    load_strict,
    save_released,
)
from dualtoken.visual_tokenizer.released_config import config_from_released, config_to_released
from tests.support.released_reference import BACKBONE, Released, config, random_state


def write(folder, released, state):
    """Write a released checkpoint; return the paths of its config and weights."""
    (folder / "siglip").mkdir(parents=True, exist_ok=True)
    (folder / "siglip" / "config.json").write_text(json.dumps(BACKBONE), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(released), encoding="utf-8")
    torch.save({"epoch": 1, "optimizer": {}, "state_dict": state}, folder / "epoch_1.pt")
    return folder / "config.json", folder / "epoch_1.pt"


def images(count=2):
    return torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def check_parity(model, released, state):
    expected = Released(released, state).forward(images())
    found = model(images())
    assert torch.equal(found.codes[:, :, 0], expected["codes_pixel"])
    assert torch.equal(found.codes[:, :, 1], expected["codes_semantic"])
    for name in ("reconstruction", "semantic_features", "pooled"):
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)
    for name in ("commitment_loss_pixel", "commitment_loss_semantic"):
        torch.testing.assert_close(found[name], expected[name])
    ids = torch.tensor([[3, 7, 1, 1, 1, 1], [9, 2, 5, 28, 0, 1]])
    expected_text = Released(released, state).encode_text(ids)
    torch.testing.assert_close(model.encode_text(ids), expected_text, atol=1e-5, rtol=1e-4)
    assert found.codes[:, :, 0].unique().numel() > 5  # the case is not degenerate


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("latent_shape", [True, False])
def test_released_checkpoint_computes_the_same(tmp_path, shortcut, latent_shape):
    released = config(shortcut, latent_shape)
    state = random_state(released)
    model = load_released(*write(tmp_path, released, state))
    check_parity(model, released, state)


@pytest.mark.parametrize("shortcut", [True, False])
def test_null_means_absent(tmp_path, shortcut):
    """The released config class writes null for modules that are not there, and for weights of such."""
    released = config(shortcut, latent_shape=False)
    state = random_state(released)
    written = json.loads(json.dumps(released))
    written["rqvaesiglip"] |= {"weight_shortcut": None, "decoder_latent_shape": None, "ignore_keys": None}
    written["rqvaesiglip"]["ddconfig"]["z_channels"] = None
    model = load_released(*write(tmp_path, written, state))
    assert model.config.shortcut_weight == 0.6  # the released default
    check_parity(model, released, state)
    written["rqvaesiglip"]["vq_sem"]["n_embed"] = None
    with pytest.raises(ValueError, match="config.json lacks vq_sem.n_embed; expected"):
        config_from_released(write(tmp_path, written, state)[0])


def test_what_may_be_left_out_is_as_released(tmp_path):
    """Keys of a branch that are left out or null, one decay for both, branches as they were called before."""
    released = config()
    state = random_state(released)
    section = released["rqvaesiglip"]
    for name, before in (("vq_sem", "vq_semantic"), ("vq_pix", "vq_pixel")):
        branch = section.pop(name)
        kept = {key: branch[key] for key in ("n_embed", "embed_dim", "code_shape")}
        section[before] = {**kept, "bottleneck_type": None, "shared_codebook": None}
    path, checkpoint = write(tmp_path, released, {older_spelling(name): t for name, t in state.items()})
    model = load_released(path, checkpoint)
    check_parity(model, config(), state)
    assert model.config.codebook_decay == 0.99 and model.config.restart_unused_codes
    section["decay"] = 0.9
    assert config_from_released(write(tmp_path, released, {})[0]).codebook_decay == 0.9
    section["vq_sem"] = section["vq_semantic"]
    with pytest.raises(ValueError, match="has both vq_sem and vq_semantic; expected one of the two"):
        config_from_released(write(tmp_path, released, {})[0])
    lone = {"rqvaesiglip": {"n_embed": 24, "code_shape": [5, 5, 3], "bottleneck_type": "rq"}}
    with pytest.raises(ValueError, match="is of a revision of the released code with other modules"):
        config_from_released(write(tmp_path, lone, {})[0])


def test_attention_behind_the_quantizers_can_be_full(tmp_path):
    released, state = config(), random_state(config())
    files = write(tmp_path, released, state)
    model = load_released(*files, full_attention=True)
    assert not model.config.causal_post_quantization
    codes = torch.randint(24, (1, 25, 2, 3), generator=torch.Generator().manual_seed(1))
    changed = codes.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 24
    for tokenizer, causal in ((load_released(*files), True), (model, False)):
        first, last = (tokenizer.postquant_pixel(tokenizer.lookup(c)[0])[:, 0] for c in (codes, changed))
        assert torch.equal(first, last) == causal
    with pytest.raises(ValueError, match="no place for causal_post_quantization=False"):
        config_to_released(model.config)


def older_spelling(name):
    head, _, rest = name.partition(".")
    return f"{head.replace('_pix', '_pixel').replace('_sem', '_semantic')}.{rest}"


@pytest.mark.parametrize(
    "rename",
    [lambda name: f"module.{name}", older_spelling, lambda name: f"module.{older_spelling(name)}"],
    ids=["module", "older", "both"],
)
def test_other_spellings_load_the_same(tmp_path, rename):
    released = config()
    state = random_state(released)
    renamed = {rename(name): tensor for name, tensor in state.items()}
    renamed["siglip_model.vision_model.embeddings.position_ids"] = torch.arange(25)
    model = load_released(*write(tmp_path, released, renamed))
    check_parity(model, released, state)


def test_codebooks_of_their_own_per_depth(tmp_path):
    released = config()
    for branch in ("vq_pix", "vq_sem"):
        released["rqvaesiglip"][branch] = {**released["rqvaesiglip"][branch], "shared_codebook": False}
    state = random_state(released)
    for branch in ("pix", "sem"):
        for depth in range(3):
            name = f"quantizer_{branch}.codebooks.{depth}.weight"
            state[name] = state[name] * (1.0 - 0.3 * depth)
    model = load_released(*write(tmp_path, released, state))
    assert model.codebooks().shape == (2, 3, 24, 8)
    check_parity(model, released, state)


def test_there_and_back_again_is_bit_exact(tmp_path):
    released = config()
    state = random_state(released)
    model = load_released(*write(tmp_path / "a", released, state))
    save_released(model, tmp_path / "b")
    back = read_tensors(tmp_path / "b" / "epoch_0.pt")["state_dict"]
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    first, last = (back[f"quantizer_pix.codebooks.{depth}.weight"] for depth in (0, 2))
    assert first.data_ptr() == last.data_ptr()  # one tensor for all depths, in the file too
    again = load_released(tmp_path / "b" / "config.json", tmp_path / "b" / "epoch_0.pt")
    assert again.fingerprint() == model.fingerprint()
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


# -- strictness --------------------------------------------------------------------------------------------


def test_every_wrong_key_is_listed_and_nothing_loads(tmp_path):
    released = config()
    state = random_state(released)
    del state["decoder.conv_in.bias"], state["prequant_pix.norm1.weight"]
    state["decoder.conv_in.gain"] = torch.zeros(1)
    state["postquant_sem.proj.bias"] = torch.zeros(7)
    with pytest.raises(WeightsError) as caught:
        load_released(*write(tmp_path, released, state))
    error = caught.value
    assert error.missing == ["decoder.conv_in.bias", "prequant_pixel.norm1.weight"]
    assert error.unexpected == ["decoder.conv_in.gain"]
    assert error.misshapen == ["postquant_semantic.proj.bias (7,) (expected (32,))"]
    for name in error.missing + error.unexpected + error.misshapen:
        assert name in str(error)


def test_a_failed_strict_load_changes_nothing():
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(WeightsError, match="1 missing: bias"):
        load_strict(module, {"weight": torch.zeros(2, 2)})
    assert torch.equal(module.weight, before)


def test_shortcut_weights_without_a_shortcut_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="unexpected: prequant_shortcut"):
        load_released(*write(tmp_path, config(shortcut=False), random_state(config())))


def test_broken_codebooks_are_refused(tmp_path):
    released = config()
    differing = random_state(released)
    name = "quantizer_pix.codebooks.1.weight"
    differing[name] = differing[name] + 1
    with pytest.raises(ValueError, match="shared_codebook, but the depths of the checkpoint differ"):
        load_released(*write(tmp_path, released, differing))
    lacking = {key: value for key, value in random_state(released).items() if key != name}
    with pytest.raises(ValueError, match=r"has depths \[0, 2\], expected 0 to 1"):
        load_released(*write(tmp_path, released, lacking))


# -- safety ------------------------------------------------------------------------------------------------


class Intruder:
    """Would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {"x": Intruder(tmp_path / "intruded")}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is refused: it is not a plain file of tensors"):
        read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "intruded").exists()


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.pt"):
        read_tensors(tmp_path / "none.pt")
    _, checkpoint = write(tmp_path, config(), random_state(config()))
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.pt"):
        read_tensors(half)
    for name, content in (
        ("text.pt", b"hello\n"),
        ("empty.pt", b""),
        ("page.pt", b"<!doctype html>\n<p>404"),
    ):
        (tmp_path / name).write_bytes(content)  # the first is a KeyError to the unpickler
        with pytest.raises(ValueError, match=f"{name} (cannot be read|is refused)"):
            read_tensors(tmp_path / name)
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="no 'state_dict'; found weights"):
        load_released(tmp_path / "config.json", tmp_path / "foreign.pt")
    torch.save({"state_dict": {"x": 1}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="x in its 'state_dict' are no tensors"):
        load_released(tmp_path / "config.json", tmp_path / "foreign.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list; expected a dict with 'state_dict'"):
        load_released(tmp_path / "config.json", tmp_path / "list.pt")


# -- configuration -----------------------------------------------------------------------------------------


def test_config_translates_both_ways(tmp_path):
    path, _ = write(tmp_path, config(), {})
    translated = config_from_released(path)
    assert translated.positions == 25 and translated.latent_size == 6 and translated.reconstruction_size == 24
    assert (translated.reconstruction_layer, translated.semantic_layer, translated.shortcut_layer) == (
        2,
        3,
        1,
    )
    back = config_to_released(translated)["rqvaesiglip"]
    for name, value in config()["rqvaesiglip"].items():
        if name != "vq_sem":  # rq and rq_ema are one thing here
            assert back[name] == value, name
    assert config_from_released(path, tmp_path / "siglip").to_dict() == translated.to_dict()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c["vq_pix"].update(bottleneck_type="vq"),
            "bottleneck_type 'vq'; expected 'rq' or 'rq_ema'",
        ),
        (lambda c: c["vq_sem"].update(n_embed=48), "vq_sem and vq_pix differ"),
        (
            lambda c: c["ddconfig"].update(resolution=48),
            "resolution is 48, but 6 latents and 3 levels make 24",
        ),
        (lambda c: c.update(layer_sem=9), "semantic_layer=9, but the backbone has layers 0 to 4"),
        (lambda c: c.pop("pretrained_model"), "names no backbone"),
    ],
)
def test_impossible_configs_are_explained(tmp_path, change, message):
    released = config()
    change(released["rqvaesiglip"])
    path, _ = write(tmp_path, released, {})
    with pytest.raises(ValueError, match=message):
        config_from_released(path)


def test_every_missing_key_of_a_config_is_named(tmp_path):
    released = config()
    section = released["rqvaesiglip"]
    del (
        section["layer_recon"],
        section["vq_pix"],
        section["ddconfig"]["resolution"],
        section["vq_sem"]["n_embed"],
    )
    path, _ = write(tmp_path, released, {})
    with pytest.raises(ValueError, match="lacks layer_recon, ddconfig.resolution, vq_sem.n_embed, vq_pix"):
        config_from_released(path)
    for text, message in (("[1]", "config.json holds a list; expected a"), ("{", "is not valid JSON: ")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            config_from_released(path)


def test_missing_config_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no released config at"):
        config_from_released(tmp_path / "config.json")
    path, _ = write(tmp_path, config(), {})
    with pytest.raises(FileNotFoundError, match="no config of the SigLIP backbone at .*elsewhere"):
        config_from_released(path, tmp_path / "elsewhere")


def test_what_the_released_layout_cannot_say_is_refused(tmp_path):
    model = DualTokenVisualTokenizer(preset_config("tiny", pixel_attention=False))
    match = "the released layout has no place for latent_norm=True, pixel_attention=False"
    with pytest.raises(ValueError, match=match):
        save_released(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
