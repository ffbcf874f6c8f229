"""Reconstruction of the user's pictures against the library functions, one rank against two processes."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace

import lpips
import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken.perceptual import PerceptualConfig, load_perceptual_weights, perceptual_weights_path
from eval import inputs
from eval.metrics.codebooks import codebook_statistics
from eval.metrics.frechet import FeatureStatistics, frechet_distance
from eval.metrics.siglip_features import load_siglip_features
from eval.visual_tokenizer import reconstruction, reconstruction_task
from eval.visual_tokenizer.batches import Share, build_decoder, read_batch
from eval.visual_tokenizer.code_use import codebook_table
from eval.visual_tokenizer.pictures import open_pictures
from eval.visual_tokenizer.saved_pictures import as_png, as_reference

STLPIPS = PerceptualConfig("vgg", "stlpips")
FRECHET = "Fréchet distance on SigLIP features"


@pytest.fixture
def expected(job):
    """Originals and what the tokenizer makes of them."""
    images = read_batch(open_pictures(job.data), range(11), build_decoder(16, "center_crop"))
    return images, reconstruction.reconstruct(inputs.load_visual_tokenizer(job.visual_tokenizer), images)


@pytest.mark.filterwarnings("ignore:.*weight:UserWarning")
def test_figures_are_the_libraries(job, run, expected):
    extractor = load_siglip_features(run / "siglip" / "export")
    result = reconstruction_task.measure(job, STLPIPS, extractor)
    images, found = expected
    for name, value in found.summary().items():
        assert result.figures[reconstruction_task.NAMES[name]] == pytest.approx(value, rel=1e-5)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    load_perceptual_weights(network, perceptual_weights_path(STLPIPS))
    with torch.no_grad():
        distance = network(found.images, images).mean()
    assert result.figures["LPIPS"] == pytest.approx(distance.item(), rel=1e-4)
    statistics = [FeatureStatistics(extractor.dim) for _ in range(2)]
    for one, pictures in zip(statistics, (images, found.images)):
        one.update(extractor(as_png(pictures)))
    assert result.figures[FRECHET] == pytest.approx(frechet_distance(*statistics), rel=1e-3)
    assert (result.headline, result.value) == (FRECHET, result.figures[FRECHET])
    assert result.higher_is_better is False and result.count == 11
    assert result.tables["Codebooks"] == codebook_table(found.codes, 32)
    assert any("11 pictures compares with others of as many" in note for note in result.notes)
    assert any("relative of the published LPIPS" in note for note in result.notes)
    assert result.settings["lpips"] == "LPIPS(vgg), trunk from stlpips"
    assert result.settings["preprocessing"].startswith("center_crop")


def test_files_tell_every_picture_and_show_the_ends(job, expected):
    result = reconstruction_task.measure(job)
    assert (result.headline, result.unit) == ("PSNR", "dB")
    assert set(result.figures) == {"PSNR", "SSIM", "MSE", "L1"}  # what was not asked for is not there
    with open(job.output / result.files[0], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == [one.key for one in open_pictures(job.data).pictures]
    psnr = [float(row["psnr"]) for row in rows]
    np.testing.assert_allclose(psnr, expected[1].psnr.numpy(), rtol=1e-5)
    assert [case.score for case in result.worst] == sorted(psnr)[:6]
    assert [case.score for case in result.best] == sorted(psnr, reverse=True)[:5]
    for case in (*result.worst, *result.best):
        with Image.open(job.output / case.picture) as pair:
            assert pair.size == (32, 16)
    written = json.loads((job.output / "reconstruction" / "result.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.as_json()))


def test_two_processes_find_what_one_finds(job, run, tmp_path):
    siglip = run / "siglip" / "export"
    alone = reconstruction_task.measure(job, extractor=load_siglip_features(siglip))
    together = replace(job, output=tmp_path / "together", share=Share(0, 2))
    script = (
        "from pathlib import Path\n"
        "from eval.metrics.siglip_features import load_siglip_features\n"
        "from eval.visual_tokenizer.batches import Share\n"
        "from eval.visual_tokenizer.reconstruction_task import measure\n"
        "from eval.visual_tokenizer.tasks import TokenizerJob\n"
        f"folders = {[str(job.visual_tokenizer), str(job.data), str(together.output)]!r}\n"
        "job = TokenizerJob(*map(Path, folders), batch_size=4, share=Share(1, 2))\n"
        f"measure(job, extractor=load_siglip_features({str(siglip)!r}))\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script])
    here = reconstruction_task.measure(together, extractor=load_siglip_features(siglip))
    assert other.wait(120) == 0
    path = together.output / "reconstruction" / "result.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert here is None or found == json.loads(json.dumps(here.as_json()))
    expected = json.loads(json.dumps(alone.as_json()))
    # Sums of floats depend on their order in the last digits; everything else is the same.
    assert found["figures"].pop(FRECHET) == pytest.approx(expected["figures"].pop(FRECHET), rel=1e-6)
    assert found["value"] == pytest.approx(expected["value"], rel=1e-6)
    for name in ("figures", "tables", "worst", "best", "count", "settings"):
        assert found[name] == expected[name]
    per_picture = [out / alone.files[0] for out in (job.output, together.output)]
    assert per_picture[0].read_bytes() == per_picture[1].read_bytes()


def test_what_cannot_be_measured_is_an_error(job):
    with pytest.raises(ValueError, match=r"LPIPS trunk nowhere.pth: no such file; give the path of a VGG16"):
        reconstruction_task.measure(job, PerceptualConfig("vgg", "nowhere.pth"))
    with pytest.raises(ValueError, match=r"saved is 'gif'; expected one of png, reference"):
        reconstruction_task.measure(job, saved="gif")
    with pytest.raises(FileNotFoundError, match="no visual tokenizer in"):
        reconstruction_task.measure(replace(job, visual_tokenizer=job.data))


def test_saved_pictures_are_rounded_or_cut_off():
    flat = torch.full((1, 3, 16, 16), 100.9 / 127.5 - 1)
    assert set(as_png(flat).flatten()) == {101}
    assert set(as_reference(flat).flatten()) == {100}  # a flat grey survives JPEG
    assert as_png(flat * 0 + 3).max() == as_reference(flat * 0 + 3).max() == 255
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert as_png(noise).shape == as_reference(noise).shape == (1, 16, 16, 3)
    assert (as_reference(noise) != as_png(noise)).mean() > 0.9  # which noise does not


def test_counts_by_depth_give_the_statistics_of_the_codes():
    codes = torch.randint(0, 32, (5, 16, 2, 3), generator=torch.Generator().manual_seed(0))
    rows = {(row.pop("codebook"), row.pop("depth")): row for row in codebook_table(codes, 32)}
    assert len(rows) == 8
    for (book, depth), row in rows.items():
        part = codes[:, :, ("pixel", "semantic").index(book)]
        part = part if depth is None else part[..., depth - 1]
        assert row == pytest.approx(asdict(codebook_statistics(part, 32)))
