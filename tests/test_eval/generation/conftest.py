"""A tiny real model that draws, for the tests of this room."""

import pytest

from eval.generation.drawing import Artist
from tests.support.tiny_run import make_tiny_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def artist(run):
    return Artist(run / "mllm" / "export", run / "tokenizer" / "export")
