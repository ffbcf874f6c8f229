"""Inception and SigLIP as feature extractors: preprocessing by hand, architecture, files that are refused."""

import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.inception import Inception3
from transformers import SiglipModel

from dualtoken.visual_tokenizer.config import preset_config
from eval.metrics import inception
from eval.metrics.inception import SIDE, fid_inception, load_inception, resize
from eval.metrics.siglip_features import load_siglip_features


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of the published shapes, with random numbers."""
    torch.manual_seed(0)
    network = fid_inception()
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):  # the scale of the input stays
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / inception.WEIGHTS
    torch.save(network.state_dict(), path)
    return path


def test_resizing_is_bicubic_in_floats():
    """Against torch's antialiased bicubic in double, cut off to [0, 255] as clean-fid's is."""
    source = picture(640, 401)
    found = resize(source)
    assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.float32
    planes = torch.from_numpy(source).permute(2, 0, 1)[None].double()
    expected = F.interpolate(planes, size=(SIDE, SIDE), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(found).double(), expected.clamp(0, 255), atol=1e-3, rtol=0)
    assert expected.min() < -1
    edge = np.repeat(np.array([[0, 255]], dtype=np.uint8).repeat(30, 1).repeat(60, 0)[..., None], 3, axis=2)
    assert resize(edge).min() == 0 and resize(edge).max() == 255
    assert np.array_equal(resize(picture(SIDE, SIDE)), picture(SIDE, SIDE).astype(np.float32))


def test_pools_differ_from_torchvision_where_tensorflow_does():
    network = fid_inception()
    x = torch.ones(1, 1, 3, 3)
    corner = {
        name: getattr(network, name)._pool(x)[0, 0, 0, 0] for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b")
    }
    assert all(value == 1 for value in corner.values())  # torchvision: 4/9
    x[0, 0, 1, 1] = 10
    assert network.Mixed_7b._pool(x)[0, 0, 1, 1] == 2
    assert network.Mixed_7c._pool(x)[0, 0, 1, 1] == 10
    assert (
        type(network.Mixed_6a).__module__
        == type(network.Mixed_7a).__module__
        == "torchvision.models.inception"
    )


def test_network_is_torchvisions_with_tensorflows_pools(weights, monkeypatch):
    """By another way: torchvision's own blocks, whose calls of the average pool are exchanged."""
    network = Inception3(inception.CLASSES, aux_logits=False, init_weights=False)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    pools = []

    def pool(x, kernel_size, stride, padding):
        pools.append(x.shape[1])
        if len(pools) == 9:  # of three A, four C and two E blocks the last
            return F.max_pool2d(x, kernel_size, stride, padding)
        return avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    avg_pool2d = F.avg_pool2d
    extractor = load_inception(weights)
    pixels = (torch.from_numpy(picture(SIDE, SIDE)).permute(2, 0, 1)[None].float() - 128) / 128
    found = extractor([picture(SIDE, SIDE)])
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("torchvision.models.inception.F.avg_pool2d", pool)
        expected = network.eval()(pixels)
    assert pools == [192, 256, 288, 768, 768, 768, 768, 1280, 2048]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_of_pictures(weights):
    """One forward pass through the network, the published way of the pictures there by hand."""
    extractor = load_inception(weights)
    pictures = [picture(SIDE, SIDE, 1), picture(20, 30, 2)]
    found = extractor(pictures)
    assert found.shape == (2, extractor.dim) and found.dtype == torch.float32
    seen = {}
    network = extractor.network
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: seen.update(first=given[0]))
    network.Mixed_7c.register_forward_hook(lambda module, given, output: seen.update(last=output))
    again = extractor(np.stack(pictures[:1]))
    torch.testing.assert_close(again, found[:1], rtol=1e-4, atol=1e-5)
    expected = (torch.from_numpy(pictures[0]).permute(2, 0, 1)[None].float() - 128) / 128
    assert torch.equal(seen["first"], expected)
    assert seen["last"].shape == (1, 2048, 8, 8)
    torch.testing.assert_close(again, seen["last"].mean(dim=(2, 3)))
    assert found[0].std() > 0 and not torch.allclose(found[0], found[1])


def test_other_files_are_refused(tmp_path, weights):
    with pytest.raises(
        FileNotFoundError, match="no Inception weights at .*pytorch-fid's release 'fid_weights'.*ran"
    ):
        load_inception(tmp_path / "none.pth")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, other)
    with pytest.raises(
        ValueError, match="other.pth holds the weights of another network .*pt_inception-2015"
    ):
        load_inception(other)
    script = tmp_path / "inception-2015-12-05.pt"
    with zipfile.ZipFile(script, "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("inception-2015-12-05/code/__torch__.py", "")
    with pytest.raises(
        ValueError, match="is refused: TorchScript is a program.*pt_inception-2015-12-05-6726825d"
    ):
        load_inception(script)


def test_pictures_are_bytes(weights):
    extractor = load_inception(weights)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 3\), float32; expected uint8 \[H, W, 3\]"):
        extractor([np.zeros((4, 4, 3), dtype=np.float32)])


def test_siglip_features_are_the_models(tmp_path):
    torch.manual_seed(0)
    model = SiglipModel(preset_config("tiny").backbone_config()).eval()
    model.save_pretrained(tmp_path)
    extractor = load_siglip_features(tmp_path)
    size = model.config.vision_config.image_size
    pictures = [picture(size, size, 1), picture(40, 30, 2)]
    found = extractor(pictures)
    assert found.shape == (2, extractor.dim)
    assert "FID" not in extractor.name
    squares = [
        np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in pictures
    ]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected)
