"""Large pictures in tiles: which grid of them, how a picture is cut, in which order their features are read.

LLaVA-NeXT's "anyres", as UniToken uses it (arXiv 2504.04423): besides the whole picture, squeezed to the size
that the vision tower reads (the base picture), the tower reads tiles of that size. They are cut from the
picture after it was resized, its proportions kept, into the middle of one of several grids, black where it
does not reach. The features of the tiles are put together to one grid, and the rows and columns of its
margins left out. Each row of features, of the base picture too, is followed by the end of a row.

Shapes: S pixels a side of a tile, N = n x n features of it, C their width; R x K rows and columns of tiles;
F = 1 + R K crops of a picture, its base picture and its tiles row by row; M positions of a picture in the
sequence, m without the ends of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # shards are read and checked, and their settings, without torch
    import torch

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Tiles:
    """The grids of tiles that a picture may be cut into, and the pixels a side of a tile, S."""

    grids: Sequence[Sequence[int]]
    """Rows and columns of each; of grids that serve a picture equally well the earlier is taken."""
    size: int

    def __post_init__(self) -> None:
        grids = tuple(  # lists in JSON, which are not equal to them
            tuple(grid) if isinstance(grid, list | tuple) else (grid,) for grid in self.grids
        )
        object.__setattr__(self, "grids", grids)
        numbers = [number for grid in grids for number in grid]
        if not (
            grids
            and len(set(grids)) == len(grids)
            and all(len(grid) == 2 for grid in grids)
            and all(isinstance(number, int) and number > 0 for number in numbers)
        ):
            raise ValueError(
                f"tiles are {list(map(list, grids))}; expected grids [rows, columns] of 1 or more, each "
                "once, such as [[1, 2], [2, 1], [2, 2]]"
            )
        if self.size < 1:
            raise ValueError(f"tiles of {self.size} pixels a side; expected 1 or more")

    def grid(self, picture: Size) -> Size:
        """Return rows and columns for a picture: where it keeps most pixels, then where least is black.

        `picture` is its height and width in pixels, here as in the other methods.
        """
        from transformers.image_processing_utils import select_best_resolution

        resolutions = [(rows * self.size, columns * self.size) for rows, columns in self.grids]
        height, width = select_best_resolution(picture, resolutions)
        return height // self.size, width // self.size

    def crops(self, picture: Size) -> int:
        """Return the number F of crops of a picture."""
        return 1 + math.prod(self.grid(picture))

    def fitted(self, picture: Size) -> Size:
        """Return the height and width to which a picture is resized before it is cut."""
        (height, width), (rows, columns) = picture, self.grid(picture)
        room = rows * self.size, columns * self.size
        if room[0] / height < room[1] / width:
            return room[0], min(math.ceil(width * (room[0] / height)), room[1])
        return min(math.ceil(height * (room[1] / width)), room[0]), room[1]

    def cut(self, pixels: Any, resize: Callable[[Any, int, int], torch.Tensor]) -> torch.Tensor:
        """Return the tiles of a picture, uint8 [R K, 3, S, S].

        Args:
            pixels: the whole picture, uint8 [H, W, 3].
            resize: it, a height and a width -> uint8 [height, width, 3].
        """
        picture = tuple(pixels.shape[:2])
        (rows, columns), (height, width) = self.grid(picture), self.fitted(picture)
        fitted = resize(pixels, height, width)
        canvas = fitted.new_zeros(rows * self.size, columns * self.size, 3)
        top, left = (len(canvas) - height) // 2, (canvas.shape[1] - width) // 2
        canvas[top : top + height, left : left + width] = fitted
        tiles = canvas.view(rows, self.size, columns, self.size, 3).permute(0, 2, 4, 1, 3)
        return tiles.reshape(rows * columns, 3, self.size, self.size)

    def order(self, picture: Size, features: int) -> torch.Tensor:
        """Return the crop and the place in it, [M, 2], whose feature stands at each position of a picture.

        Crop -1 stands for the end of a row. `features` is N, of each crop; its places count row by row.
        """
        import torch
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        (rows, columns), side = self.grid(picture), math.isqrt(features)
        base = np.arange(features).reshape(side, side)
        tiles = np.arange(features, (1 + rows * columns) * features).reshape(rows, columns, side, side)
        whole = tiles.transpose(0, 2, 1, 3).reshape(1, rows * side, columns * side)
        grids = base, unpad_image(whole, picture)[0]
        with_ends = [np.pad(grid, ((0, 0), (0, 1)), constant_values=-1).reshape(-1) for grid in grids]
        return torch.from_numpy(np.stack(np.divmod(np.concatenate(with_ends), features), axis=1))

    @property
    def largest(self) -> Size:
        """Height and width of a picture with the largest M: it fills the grid of most tiles, then rows."""
        rows, columns = max(self.grids, key=lambda grid: (math.prod(grid), grid[0]))
        return rows * self.size, columns * self.size


def parse_grids(grids: Sequence[str]) -> list[list[int]]:
    """Read grids written as rows x columns, such as `2x1`; ValueError if one is not."""
    parts = [grid.split("x") for grid in grids]
    for grid, numbers in zip(grids, parts, strict=True):
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"tiles {grid!r}; expected rows x columns, such as 1x2, 2x1 or 2x2")
    return [[int(number) for number in numbers] for numbers in parts]


def in_order(features: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the features [m, C] of a picture as they are read, from those of its crops [F, N, C].

    What an `order` has no crop for, the ends of rows, is left out: m is smaller than M.
    """
    crops, places = order[order[:, 0] >= 0].to(features.device).unbind(1)
    return features[crops, places]


def order_of_ordered(order: torch.Tensor) -> torch.Tensor:
    """Return the order [M, 2] of what `in_order` gave: each feature is a crop of its own, with one place."""
    import torch

    is_feature = order[:, 0] >= 0
    number = torch.where(is_feature, is_feature.cumsum(0) - 1, -1)
    return torch.stack([number, torch.zeros_like(number)], dim=1)
