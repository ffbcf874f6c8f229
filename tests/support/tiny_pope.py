"""A little POPE in its authors' layout, and a tiny unified model that answers it by more than one word."""

import json

import torch

from dualtoken.unified_model.model import DualTokenForCausalLM
from tests.support.tiny_run import COLOURS, picture

CATEGORIES = ("random", "popular", "adversarial")
PICTURES = 4


def write_pope(folder):
    """Three files of a question for each of four pictures, and the pictures in `val2014`."""
    (folder / "val2014").mkdir(parents=True)
    names = [f"COCO_val2014_{index:012d}.jpg" for index in range(PICTURES)]
    for index, name in enumerate(names):
        picture(index).save(folder / "val2014" / name, quality=95)
    for number, category in enumerate(CATEGORIES):
        rows = [
            {
                "question_id": index + 1,
                "image": name,
                "text": f"Is there {' and '.join(COLOURS[number : number + index + 1])} in the image?",
                "label": "yes" if (index + number) % 2 else "no",
            }
            for index, name in enumerate(names)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{category}.json").write_text(lines, encoding="utf-8")
    return folder


def sharpen(folder, factor=40):
    """Make an untrained model's answers depend on what it sees, and end at different lengths."""
    model = DualTokenForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    model.save_pretrained(folder)
