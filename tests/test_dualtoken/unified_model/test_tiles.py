"""Tiles of large pictures: the grid, the cut and the order, each beside a naive one written out."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessor
from transformers.image_processing_utils import get_patch_output_size
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from dualtoken.unified_model.tiles import Tiles, in_order, order_of_ordered, parse_grids

PAPER = Tiles([[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]], 384)
SMALL = Tiles([[2, 3], [1, 2], [3, 1]], 20)
SIZES = [(384, 384), (480, 640), (640, 480), (720, 1280), (1920, 1080), (100, 90), (300, 1200), (1201, 300),
         (7, 900), (1024, 1023)]  # fmt: skip
sides = st.integers(1, 2000)


def naive_grid(size, tiles):
    """Every grid tried: the most pixels of the picture that it keeps, then the fewest places without any."""
    height, width = size
    tried = []
    for index, (rows, columns) in enumerate(tiles.grids):
        room = rows * tiles.size, columns * tiles.size
        scale = min(room[1] / width, room[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        tried.append((-kept, room[0] * room[1] - kept, index))
    return tiles.grids[min(tried)[2]]


def naive_order(size, tiles, side):
    """Position by position: what of the grid the picture covers is asked of every feature of it."""
    order = []
    for y in range(side):
        order += [(0, y * side + x) for x in range(side)]
        order.append("end")
    rows, columns = naive_grid(size, tiles)
    high, wide = rows * side, columns * side
    height, width = size
    # The picture touches the left and right edges, or the upper and lower ones. Margins are rounded down.
    top = left = 0
    if width / height > wide / high:
        top = (high - int(round(height * (wide / width), 7))) // 2
    else:
        left = (wide - int(round(width * (high / height), 7))) // 2
    for y in range(top, high - top):
        for x in range(left, wide - left):
            tile = y // side * columns + x // side
            order.append((1 + tile, y % side * side + x % side))
        order.append("end")
    return order


def assert_is(order, expected):
    assert order.dtype == torch.int64 and order.shape == (len(expected), 2)
    assert ["end" if crop < 0 else (crop, place) for crop, place in order.tolist()] == expected


@pytest.mark.parametrize("size", SIZES)
def test_grid_and_order_written_out(size):
    for tiles, side in ((PAPER, 27), (SMALL, 4)):
        assert tiles.grid(size) == naive_grid(size, tiles)
        order = tiles.order(size, side * side)
        assert_is(order, naive_order(size, tiles, side))
        assert len(order) <= len(tiles.order(tiles.largest, side * side))
        assert tiles.crops(size) == 1 + math.prod(tiles.grid(size)) > order[:, 0].max()


@settings(max_examples=60, deadline=None)
@given(
    sides, sides, st.lists(st.tuples(*[st.integers(1, 3)] * 2), min_size=1, unique=True), st.integers(1, 5)
)
def test_any_size_and_grids(height, width, grids, side):
    tiles = Tiles(grids, 30)
    order = tiles.order((height, width), side * side)
    assert_is(order, naive_order((height, width), tiles, side))
    assert len(order) <= len(tiles.order(tiles.largest, side * side))
    features = order[order[:, 0] >= 0]
    assert len(torch.unique(features, dim=0)) == len(features)  # each is read once, the base picture's all
    assert (features[:, 0] == 0).sum() == side * side
    fitted = tiles.fitted((height, width))
    rows, columns = tiles.grid((height, width))
    assert fitted[0] == 30 * rows or fitted[1] == 30 * columns
    assert 0 < fitted[0] <= 30 * rows and 0 < fitted[1] <= 30 * columns


@pytest.mark.parametrize("size", SIZES)
def test_like_transformers(size):
    """LLaVA-NeXT's own: grid, number of crops, size before cutting, and the crops of its image processor."""
    pinpoints = [[rows * 384, columns * 384] for rows, columns in PAPER.grids]
    assert PAPER.grid(size) == get_anyres_image_grid_shape(size, pinpoints, 384)
    assert PAPER.crops(size) == image_size_to_num_patches(size, pinpoints, 384)
    target = tuple(384 * number for number in PAPER.grid(size))
    picture = np.broadcast_to(np.uint8(0), (*size, 3))
    assert PAPER.fitted(size) == tuple(get_patch_output_size(picture, target, "channels_last"))


@pytest.mark.parametrize("size", [(50, 41), (13, 60), (90, 30)])
def test_cut_like_transformers(size):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = LlavaNextImageProcessor(
        do_normalize=False, do_rescale=False, do_center_crop=False, resample=Image.Resampling.BICUBIC,
        size={"height": 20, "width": 20}, crop_size={"height": 20, "width": 20},
        image_grid_pinpoints=[[20 * rows, 20 * columns] for rows, columns in SMALL.grids],
    )  # fmt: skip
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]

    def resize(pixels, height, width):
        planes = torch.as_tensor(pixels).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(planes, (height, width), mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0)

    tiles = SMALL.cut(pixels, resize)
    assert tiles.dtype == torch.uint8 and len(tiles) == SMALL.crops(size) - 1 == len(expected) - 1
    torch.testing.assert_close(tiles.float(), expected[1:].float(), rtol=0, atol=1.0)


def test_what_a_tile_shows_is_where_its_features_stand():
    """A picture of its own coordinates, cut and read in order: they rise along rows and from row to row."""
    height, width = 130, 200
    y, x = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    pixels = np.stack([y, x, np.full_like(y, 255)], axis=-1).astype(np.uint8)
    tiles = Tiles([[2, 2], [2, 3]], 40)

    def resize(pixels, height, width):
        return torch.from_numpy(np.array(Image.fromarray(pixels).resize((width, height))))

    crops = tiles.cut(pixels, resize)
    assert tiles.grid((height, width)) == (2, 3) and len(crops) == 6
    patches = torch.nn.functional.avg_pool2d(crops.float(), 8).flatten(2).transpose(1, 2)  # [6, 25, 3]
    order = tiles.order((height, width), 25)[30:]  # behind the base picture
    ends = (order[:, 0] < 0).nonzero()[:, 0].tolist()
    rows = [range(start + 1, end) for start, end in zip([-1, *ends], ends, strict=False)]
    assert {len(row) for row in rows} == {15} and len(rows) == 10
    seen = torch.stack([patches[order[row, 0] - 1, order[row, 1]] for row in map(list, rows)])  # [10, 15, 3]
    assert (seen[1:-1, :, 2] == 255).all() and (seen[..., 2] > 0).all()  # black at most in a part of the edge
    seen = seen / seen[..., 2:]
    assert (seen[:, 1:, 1] > seen[:, :-1, 1]).all() and (seen[1:, :, 0] > seen[:-1, :, 0]).all()


def test_features_in_order_and_the_order_of_those():
    order = SMALL.order((50, 41), 9)
    crops = torch.arange(SMALL.crops((50, 41)) * 9 * 2).view(-1, 9, 2)
    read, own = in_order(crops, order), order_of_ordered(order)
    assert len(read) == (order[:, 0] >= 0).sum() < len(order)
    for before, after in zip(order.tolist(), own.tolist(), strict=True):
        assert (before[0] < 0) == (after[0] < 0)
        if before[0] >= 0:
            assert torch.equal(crops[before[0], before[1]], read[after[0]]) and after[1] == 0


def test_the_table_of_sizes_is_true():
    """Positions and bytes at SO400M/14, 384 px, with the paper's grids."""
    lines = (
        (Path(__file__).resolve().parents[3] / "docs" / "unitoken.md")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [[cell.strip().replace(",", "") for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if re.fullmatch(r"\d+ x \d+", row[0])]
    assert len(rows) > 5
    for picture, grid, *numbers in rows:
        height, width = map(int, picture.split(" x "))
        order = PAPER.order((height, width), 729)
        positions, crops = len(order), PAPER.crops((height, width))
        read = int((order[:, 0] >= 0).sum())
        assert grid == "{} x {}".format(*PAPER.grid((height, width)))
        expected = [positions, positions + 729 + 3, crops * 3 * 384 * 384, read * 1152 * 2]
        assert list(map(int, numbers)) == expected, picture


def test_mistakes_are_named():
    assert parse_grids(["1x2", "3x1"]) == [[1, 2], [3, 1]]
    assert Tiles([[1, 2]], 4) == Tiles(((1, 2),), 4)
    for wrong in ("2", "2x", "ax2", "1x2x3", "-1x2"):
        with pytest.raises(ValueError, match=f"tiles '{wrong}'; expected rows x columns, such as 1x2"):
            parse_grids([wrong])
    for grids in ([], [[0, 1]], [[1, 2], [1, 2]], [[1, 2, 3]], [1, 2], ["1x2"]):
        with pytest.raises(ValueError, match=r"expected grids \[rows, columns\] of 1 or more, each once"):
            Tiles(grids, 4)
    with pytest.raises(ValueError, match="tiles of 0 pixels a side"):
        Tiles([[1, 1]], 0)
