from urllib.error import URLError

import pytest
import torch
from torch import nn

from pretrain.discriminator import DiscriminatorConfig, PatchDiscriminator
from pretrain.losses import (
    PerceptualConfig,
    PerceptualLoss,
    adaptive_gan_weight,
    hinge_discriminator_loss,
    last_layer_gradient,
    semantic_distillation_loss,
)


def test_last_layer_gradient_equals_autograd_through_the_layer():
    torch.manual_seed(0)
    conv_out = nn.Conv2d(8, 3, 3, padding=1)
    features = torch.randn(2, 8, 16, 16)
    target = torch.randn(2, 3, 16, 16)
    image = conv_out(features)
    loss = ((image - target) ** 2).mean() + image.abs().mean()
    (expected,) = torch.autograd.grad(loss, conv_out.weight, retain_graph=True)
    (image_gradient,) = torch.autograd.grad(loss, image)
    found = last_layer_gradient(features, conv_out.weight.shape, image_gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_adaptive_weight_is_the_ratio_of_norms_and_clamped():
    r, g = torch.full((3,), 2.0), torch.full((3,), 1.0)
    torch.testing.assert_close(adaptive_gan_weight(r, g), torch.tensor(2.0), rtol=1e-3, atol=0)
    assert adaptive_gan_weight(r * 100, g).item() == 10.0
    assert adaptive_gan_weight(r * 1e-3, g).item() == pytest.approx(0.3)


def test_hinge_loss_is_zero_beyond_the_margin_and_grows_inside():
    assert hinge_discriminator_loss(torch.tensor([1.5]), torch.tensor([-1.5])).item() == 0.0
    assert hinge_discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0])).item() == 1.0
    assert hinge_discriminator_loss(torch.tensor([-1.0]), torch.tensor([1.0])).item() == 2.0


def test_semantic_loss_is_mse_minus_cosine():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert semantic_distillation_loss(a, b).item() == pytest.approx((0 + 8) / 4 - 0.5)
    assert semantic_distillation_loss(a, b, mse_weight=0).item() == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="same layer of the same backbone"):
        semantic_distillation_loss(a, b[:1])


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_perceptual_loss_ranks_a_blurred_picture_below_noise_free_and_above_another(net):
    torch.manual_seed(0)
    loss = PerceptualLoss(PerceptualConfig(net=net, trunk="stlpips"))
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, size=64)
    slightly = picture + 0.05 * torch.randn_like(picture)
    other = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, size=64)
    same, near, far = (loss(x, picture).item() for x in (picture, slightly, other))
    assert same == pytest.approx(0.0, abs=1e-6)
    assert same < near < far
    assert not any(p.requires_grad for p in loss.parameters())


def test_perceptual_trunk_of_another_network_is_refused():
    from dualtoken.perceptual import perceptual_weights_path

    alex = perceptual_weights_path(PerceptualConfig(net="alex", trunk="stlpips"))
    with pytest.raises(ValueError, match="do not fit the perceptual network"):
        PerceptualLoss(PerceptualConfig(net="vgg", trunk=str(alex)))


def test_perceptual_trunk_that_is_missing_is_an_error_and_never_random_weights():
    with pytest.raises(ValueError, match="no such file"):
        PerceptualLoss(PerceptualConfig(net="vgg", trunk="nowhere.pth"))
    with pytest.raises(ValueError, match="expected 'vgg' or 'alex'"):
        PerceptualLoss(PerceptualConfig(net="squeeze"))


def test_discriminator_learns_to_tell_two_kinds_of_pictures_apart():
    torch.manual_seed(0)
    model = PatchDiscriminator(DiscriminatorConfig(channels=8, num_layers=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    real, fake = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32).round()
    assert model(real).shape == (8, 1, 8, 8)
    first = None
    for _ in range(30):
        loss = hinge_discriminator_loss(model(real), model(fake))
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_a_failed_download_says_what_to_do(monkeypatch):
    import lpips

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", no_network)
    with pytest.raises(ValueError, match=r"weights of vgg cannot be downloaded \(no route.*'stlpips'"):
        PerceptualLoss(PerceptualConfig())
