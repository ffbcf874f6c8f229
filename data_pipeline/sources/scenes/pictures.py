"""Drawing a scene: tiles rendered once, put together on a background."""

from __future__ import annotations

import io
import re
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.sources.openmoji import drawings_folder, render_svg
from data_pipeline.sources.scenes.parts import BACKGROUNDS, COLOURS, THINGS, Item, Scene

_VIEW_BOX = 72  # of OpenMoji's drawings
_REPEATS = 8  # of a background's pattern across a picture
_MARGIN = 2  # of its units around a thing


def recoloured_svg(item: Item) -> str:
    """The drawing of a thing as SVG, its colour replaced by another."""
    thing, colour = THINGS[item.thing], COLOURS[item.colour]
    svg = (drawings_folder() / f"{thing.key}.svg").read_text(encoding="utf-8")
    shades = {f"#{thing.main}": colour.main}
    if thing.dark:
        shades[f"#{thing.dark}"] = colour.dark
    found = {match.lower() for match in re.findall("#[0-9a-fA-F]{6}", svg)}
    if missing := shades.keys() - found:
        raise ValueError(f"OpenMoji's {thing.key}.svg lacks the colour {', '.join(sorted(missing))}")
    return re.sub("#[0-9a-fA-F]{6}", lambda match: shades.get(match[0].lower(), match[0]), svg)


@cache
def tile(item: Item, size: int) -> Image.Image:
    """A thing in a colour on nothing, RGBA, as large as `size` x `size` pixels allow."""
    svg = recoloured_svg(item)
    left, top, right, bottom = render_svg(svg, _VIEW_BOX).getbbox() or (0, 0, _VIEW_BOX, _VIEW_BOX)
    side = max(right - left, bottom - top) + 2 * _MARGIN
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    whole = f'viewBox="0 0 {_VIEW_BOX} {_VIEW_BOX}"'
    return render_svg(svg.replace(whole, f'viewBox="{x} {y} {side} {side}"'), size)


@cache
def paper(name: str, size: int) -> Image.Image:
    """A background without anything on it, RGB."""
    chosen = BACKGROUNDS[name]
    across = (np.arange(size) * _REPEATS / size) % 1  # within the pattern
    x, y = np.meshgrid(across, across)
    inked = {
        "dots": (x - 0.45) ** 2 + (y - 0.45) ** 2 < 0.06,
        "checks": (x < 0.5) != (y < 0.5),
        "stripes": x < 0.5,
    }[chosen.pattern]
    pixels = np.where(inked[..., None], chosen.ink, chosen.ground).astype(np.uint8)
    return Image.fromarray(pixels)


def draw_scene(scene: Scene, size: int) -> Image.Image:
    """A scene as an RGB picture of `size` x `size` pixels, each thing half as wide.

    Raises:
        ImportError: a package of the extra `sample` is missing.
        ValueError: `size` is no multiple of four.
    """
    if size % 4:
        raise ValueError(f"size is {size}, expected a multiple of 4")
    picture = paper(scene.background, size).copy()
    for item, (right, down) in scene.placed():
        drawn = tile(item, size // 2)
        picture.paste(drawn, (right * size // 4, down * size // 4), drawn)
    return picture


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture's file; `options` are PIL's of its format."""
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()
