"""An independent detector of scenes: which true drawings, put together, are nearest to a picture.

It knows the true pictures' parts and nothing of any model: every set of cells that do not overlap is tried on
every background, with the nearest thing and colour in each cell, and the picture nearest to the one looked at
is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, starmap

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from data_pipeline.sources.scenes.parts import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    THINGS,
    Item,
    Scene,
)
from data_pipeline.sources.scenes.pictures import paper, tile

CELLS = tuple(dict.fromkeys(cell for cells in LAYOUTS.values() for cell in cells))
ITEMS = tuple(Item(thing, colour) for thing in THINGS for colour in COLOURS)
BATCH = 32


@dataclass(frozen=True)
class Found:
    """What stands where in a picture, on which background."""

    drawings: frozenset[tuple[Item, tuple[int, int]]]
    background: str

    @classmethod
    def of(cls, scene: Scene) -> Found:
        """What a scene shows."""
        return cls(frozenset(scene.placed()), scene.background)

    def things(self) -> list[str]:
        """The things, each as often as it is there."""
        return sorted(item.thing for item, _ in self.drawings)

    def __str__(self) -> str:
        items = ", ".join(f"{item.colour} {item.thing}" for item, _ in sorted(self.drawings))
        return f"{items or 'nothing'} on {self.background}"


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(one[0] - other[0]) < 2 and abs(one[1] - other[1]) < 2


class SceneDetector:
    """Reads pictures by the exact drawings.

    Args:
        size: side of the pictures in pixels, a multiple of 4.

    Raises:
        ImportError: a package of the extra `sample` is missing.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        papers = [pil_to_tensor(paper(name, size)) for name in BACKGROUNDS]
        self.backgrounds = torch.stack(papers) / 255  # [G, 3, S, S]
        tiles = torch.stack([pil_to_tensor(tile(item, size // 2)) for item in ITEMS]) / 255  # [I, 4, h, h]
        alpha = tiles[:, 3:]
        # On each background: [G, I, 3, h, h]
        half = self.backgrounds[:, None, :, : size // 2, : size // 2]  # patterns are the same in every cell
        self.tiles = tiles[:, :3] * alpha + half * (1 - alpha)
        # Also those that no scene has, so that one drawing too many or too few is seen as that.
        sets = (several for count in range(5) for several in combinations(CELLS, count))
        self.layouts = [several for several in sets if not any(starmap(_overlap, combinations(several, 2)))]

    def read(self, images: Tensor) -> list[Found]:
        """Read pictures [N, 3, S, S] with values in [0, 1]."""
        return [found for part in images.float().cpu().split(BATCH) for found in self._read(part)]

    def _read(self, images: Tensor) -> list[Found]:
        differences = (images[:, None] - self.backgrounds).square().sum(2)  # [N, G, S, S]
        empty = differences.sum((2, 3))  # [N, G]
        # What is gained (below 0) by the nearest drawing in each cell over bare background.
        gains, nearest = {}, {}
        for cell in CELLS:
            rows, columns = (
                slice(start * self.size // 4, start * self.size // 4 + self.size // 2)
                for start in reversed(cell)
            )
            crop = images[:, :, rows, columns].flatten(1)  # [N, 3hh]
            flat = self.tiles.flatten(2)  # [G, I, 3hh]
            distances = (
                crop.square().sum(1)[:, None, None]
                - 2 * torch.einsum("nx,gix->ngi", crop, flat)
                + flat.square().sum(2)
            )
            found = distances.min(2)
            nearest[cell] = found.indices
            gains[cell] = found.values - differences[:, :, rows, columns].sum((2, 3))
        totals = torch.stack(
            [empty + sum((gains[cell] for cell in cells), torch.zeros_like(empty)) for cells in self.layouts],
            2,
        )  # [N, G, layouts]
        best = totals.flatten(1).argmin(1)
        read = []
        for number, place in enumerate(best.tolist()):
            background, layout = divmod(place, len(self.layouts))
            drawings = (
                (ITEMS[int(nearest[cell][number, background])], cell) for cell in self.layouts[layout]
            )
            read.append(Found(frozenset(drawings), list(BACKGROUNDS)[background]))
        return read
