"""A tiny tokenizer and pictures that are not square, in the layouts that people have."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from eval.visual_tokenizer.tasks import TokenizerJob
from tests.support.tiny_run import COLOURS, make_tiny_run


def picture(index):
    """A picture of 26 x 20 or 20 x 26 pixels, its colour by index, with some noise of its own."""
    size = (26, 20) if index % 2 else (20, 26)
    noise = np.random.default_rng(index).integers(0, 90, (size[1], size[0], 3))
    base = np.array(Image.new("RGB", size, COLOURS[index % 6])).astype(int)
    return Image.fromarray((base * 2 // 3 + noise).clip(0, 255).astype("uint8"))


def write_class_folders(folder, count):
    for index in range(count):
        path = folder / COLOURS[index % 6] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    return folder


def write_shard(path, samples):
    """Samples as dicts of parts; text for txt, json, cls."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as writer:
        for index, (key, parts) in enumerate(samples):
            png = io.BytesIO()
            picture(index).save(png, "PNG")
            encoded = {
                name: (text if isinstance(text, str) else json.dumps(text)).encode()
                for name, text in parts.items()
            }
            writer.write({"__key__": key, "png": png.getvalue(), **encoded})
    return path.parent


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Eleven pictures in six folders by colour."""
    return write_class_folders(tmp_path_factory.mktemp("classes"), 11)


@pytest.fixture
def job(run, classes, tmp_path):
    return TokenizerJob(run / "tokenizer" / "export", classes, tmp_path / "out", batch_size=4)
