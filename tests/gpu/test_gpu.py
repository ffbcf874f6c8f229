"""The checks on a GPU; the tests marked `gpu` elsewhere (DALI, attention) belong to them."""

import os

import pytest
import torch

from tests.gpu import checks
from tests.test_pretrain.test_jobs import codes, folder, tokenizer_run  # noqa: F401

NO_GPU = "needs a CUDA device: torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


def test_the_environment_lets_jobs_use_the_gpu():
    assert os.environ["DS_ACCELERATOR"] == "cuda", "start this suite by `make test-gpu`"


@pytest.mark.parametrize("job", ["contrastive", "tokenizer", "mllm", "mllm_compiled"])
def test_jobs_train_in_bf16_like_on_the_cpu(folder, codes, job):  # noqa: F811
    print("\n" + checks.check_job(folder, job, "cuda"))


def test_codes_are_those_of_the_cpu():
    print("\n" + checks.check_codes("cuda"))


@pytest.mark.parametrize("name", ["search", "attention", "head", "generation", "clock", "decoding"])
def test_parts(name):
    getattr(checks, f"check_{name}")("cuda")
