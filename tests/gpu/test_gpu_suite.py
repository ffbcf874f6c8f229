"""The checks of the GPU suite, run on the CPU against themselves, so that they do not rot."""

import pytest

from tests.gpu import checks
from tests.test_pretrain.test_jobs import folder  # noqa: F401


@pytest.mark.parametrize("name", ["codes", "search", "attention", "head", "generation", "clock", "decoding"])
def test_checks_hold_on_the_cpu(name):
    getattr(checks, f"check_{name}")("cpu")


def test_a_job_is_checked_and_its_figures_told(folder):  # noqa: F811
    line = checks.check_job(folder, "contrastive", "cpu", steps=4)
    assert line.startswith("contrastive: ") and "images_per_second" in line and "MiB at most" in line


def test_jobs_are_sent_to_the_gpu():
    assert checks.environment("cuda")["DS_ACCELERATOR"] == "cuda" and checks.environment("cpu") == {}
