"""Scenes for tests: all of them, and any one for hypothesis."""

from hypothesis import strategies as st

from data_pipeline.sources.scenes.parts import Item, Scene, all_scenes

ALL_SCENES = list(all_scenes())
any_scene = st.sampled_from(ALL_SCENES)


def scene(layout: str, *items: str, background: str = "white") -> Scene:
    """A scene with its items in words: `scene("two", "red car")`."""
    found = [Item(thing, colour) for colour, thing in map(str.split, items)]
    return Scene(layout, tuple(found), background)
