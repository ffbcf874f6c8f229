"""What the local benchmarks are made of, and the facts that they ask about."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from data_pipeline.sources.local_benchmarks.canvas import Drawings
from data_pipeline.sources.local_benchmarks.canvas_facts import CANVAS_KINDS, canvas_facts
from data_pipeline.sources.local_benchmarks.files import Shown
from data_pipeline.sources.local_benchmarks.held_out import HeldOutScenes
from data_pipeline.sources.scenes.parts import Scene
from data_pipeline.sources.scenes.pictures import draw_scene


@dataclass(frozen=True)
class Material:
    """Held-out drawings with lettering, and held-out scenes where the sample data have any."""

    drawings: Drawings
    scenes: HeldOutScenes | None
    image_size: int  # of a scene's picture and of a drawing, in pixels

    def picture(self, scene: Scene) -> Image.Image:
        """The picture of a scene."""
        return draw_scene(scene, self.image_size)

    def facts(self, kind: str, draw: random.Random, most: int) -> list[Shown]:
        """Up to `most` facts of a kind of `CANVAS_KINDS` or `SCENE_KINDS` with their pictures.

        None about scenes where there are none.
        """
        if kind in CANVAS_KINDS:
            return canvas_facts(kind, self.drawings, draw, most)
        if self.scenes is None:
            return []
        return [Shown(fact, self.picture(scene)) for scene, fact in self.scenes.facts(kind, draw, most)]
