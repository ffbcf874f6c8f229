"""The chat template that an exported unified model is asked by: what is known of its training decides."""

from pathlib import Path

import yaml

from data_pipeline.shards.conversations import IMAGE_TAG, TEMPLATES, ChatTemplate

NO_TEMPLATE = ChatTemplate(system="", default_system="", user=("", ""), assistant=("", ""))
"""Messages as they stand, for a model that learned captions and prompts."""


def views_learned(model: Path) -> set[str] | None:
    """Views of the documents that an exported model learned from nothing; None where that is not known.

    Known is what the run folder around the export says, unless the training began with another model.
    """
    config = model.resolve().parent / "config.yaml"
    if not config.is_file():
        return None
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    if settings.get("job") != "mllm" or settings["model"].get("llm") or settings["model"].get("init_from"):
        return None
    return {entry["view"] for entry in settings["data"]["blend"] if entry["weight"] > 0}


def default_template(model: Path) -> str:
    """Name of the template for an export: `qwen`, or `none` if it is known to have seen no conversations."""
    views = views_learned(model)
    return "none" if views is not None and "document" not in views else "qwen"


def template_named(name: str) -> ChatTemplate:
    """The template of a name: one of `TEMPLATES`, or `none`."""
    return NO_TEMPLATE if name == "none" else TEMPLATES[name]


def with_images_first(text: str, count: int, template: ChatTemplate) -> str:
    """A message with the tags of `count` images before it: each on a line of its own, as in LLaVA's data."""
    tag = IMAGE_TAG if template is NO_TEMPLATE else f"{IMAGE_TAG}\n"
    return tag * count + text
