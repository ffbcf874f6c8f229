"""Ways to give a picture to the language model, and what a comparison of them is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.errors import UserError

RECIPES = ("quickstart_inputs",)
IN_LAYER_WORDS = ("model.overrides.merged_codebook=true",)  # one codebook, on the semantic layer
SCENES = "scenes"  # the task that is measured of the quickstart's sample data
LATER = "<made later>"  # folders that a recipe has to be given
DUAL, IN_LAYER, VQ = "dual", "in-layer", "vq"  # visual tokenizers


@dataclass(frozen=True)
class Input:
    """One way to give a picture to the language model."""

    name: str
    meaning: str
    visual_input: str  # of the model's heads
    tokenizer: str = DUAL  # whose codes are in the shards

    @property
    def reads_features(self) -> bool:
        """Whether it reads SigLIP's continuous features."""
        return self.visual_input.endswith("features")


INPUTS = (
    Input("semantic", "semantic codes", "semantic"),
    Input("dual", "pixel and semantic codes", "both"),
    Input("in-layer", "one codebook on one layer", "semantic", IN_LAYER),
    Input("continuous", "SigLIP's features", "features"),
    Input("dual-encoder", "pixel codes, then SigLIP's features", "pixel_and_features"),
)
WITH_VQ = Input("dual-encoder", "codes of a VQ, then SigLIP's features", "codes_and_features", VQ)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for.

    Attributes:
        recipes: of unified models, trained in turn; each after the first goes on from the export before.
        settings: words for them; those of `model.*` for the first alone.
        data: image-text shards that the documents of each recipe are made of.
        siglip: what the visual tokenizer was built on; makes the continuous features.
        tokenizers: folders of visual tokenizers by name; one that reads a single layer is trained if it is
            not among them.
        inputs: names of `INPUTS` to compare.
        tasks: of `dualtoken evaluate`, or `scenes`.
        benchmarks: folder of the tasks' files.
        run: of the quickstart that recipes written for it read, and scenes are of; None for none.
        pretokenize: further options of pretokenize.
        steps: of each training; None for the recipes' own.
    """

    recipes: Sequence[str] = RECIPES
    settings: Sequence[str] = ()
    data: Sequence[Path]
    siglip: Path
    tokenizers: Mapping[str, Path]
    inputs: Sequence[str] = tuple(one.name for one in INPUTS)
    tasks: Sequence[str] = (SCENES,)
    benchmarks: Path | None = None
    run: Path | None = None
    pretokenize: Sequence[str] = ()
    steps: int | None = None

    def chosen(self) -> list[Input]:
        """The inputs to compare, in the order of the table.

        Raises:
            UserError: one is unknown.
        """
        known = {one.name: one for one in INPUTS}
        if VQ in self.tokenizers:
            known[WITH_VQ.name] = WITH_VQ
        if unknown := [name for name in self.inputs if name not in known]:
            raise UserError(f"unknown input {unknown[0]}; there are {', '.join(known)}")
        return [one for name, one in known.items() if name in self.inputs]

    @property
    def trains_in_layer(self) -> bool:
        """Whether a tokenizer that reads a single layer is needed and has to be trained first."""
        return IN_LAYER not in self.tokenizers and any(one.tokenizer == IN_LAYER for one in self.chosen())


def of_quickstart(run: Path, **replaced: Any) -> Asked:
    """The comparison on a quickstart's scenes, with its SigLIP and its visual tokenizer.

    Args:
        run: folder of the quickstart.
        replaced: fields of `Asked` that are something else; `tokenizers` are added to the run's.
    """
    from launchers.quickstart import scenes_to_learn

    tokenizers = {DUAL: run / "tokenizer" / "export", **replaced.pop("tokenizers", {})}
    found = {
        "data": [scenes_to_learn(run)],
        "siglip": run / "siglip" / "export",
        "benchmarks": run / "sample_data" / "benchmarks",
        "run": run,
    }
    return Asked(**{**found, **replaced, "tokenizers": tokenizers})


def check(asked: Asked) -> None:
    """Tell what is missing before anything is made.

    Raises:
        UserError: a model or data are not there, or recipes and data are not as many.
        ConfigError: a setting of a recipe is wrong.
    """
    asked.chosen()
    if len(asked.recipes) != len(asked.data):
        raise UserError(
            f"{len(asked.recipes)} recipes and {len(asked.data)} folders of data; give --data, image-text "
            "shards, for each --recipe"
        )
    exports = {"SigLIP": asked.siglip, **{f"visual tokenizer ({n})": f for n, f in asked.tokenizers.items()}}
    for what, folder in exports.items():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no {what} in {folder}: run `dualtoken quickstart` first, give --run, or name it"
            )
    if asked.trains_in_layer and (asked.run is None or asked.siglip != asked.run / "siglip" / "export"):
        raise UserError(
            "name a visual tokenizer with one codebook on one layer, --in-layer-tokenizer: trained as "
            f"--visual-tokenizer was, with {' '.join(IN_LAYER_WORDS)}; or choose inputs by --input"
        )
    if SCENES in asked.tasks and (
        asked.run is None or not (asked.run / "sample_data/summary.json").is_file()
    ):
        raise UserError(
            f"no sample data in {asked.run}, which {SCENES} are measured on: give --run, the folder of a "
            "quickstart, or other --task"
        )
    if asked.benchmarks is None and set(asked.tasks) - {SCENES}:
        raise UserError("name the folder of the benchmarks' files: --benchmarks FOLDER")
    for place in range(len(asked.recipes)):
        recipe_of(asked, place)


def recipe_of(asked: Asked, place: int) -> Any:
    """The config of a recipe with the user's settings, folders that are made later left open.

    Raises:
        UserError: it is no recipe of a unified model, or blends several data sets of codes.
    """
    from pretrain.config import load_job_config
    from pretrain.mllm_task import MllmJobConfig

    config = load_job_config([*common_words(asked, place), "run_dir=."], 1, in_place_of_missing=LATER)
    if not isinstance(config, MllmJobConfig):
        raise UserError(f"recipe {asked.recipes[place]} is of the job {config.job}, expected mllm")
    sources = {config.data.blend[entry].path for entry in code_entries(config)}
    if len(sources) != 1:
        raise UserError(
            f"recipe {asked.recipes[place]} blends {len(sources)} data sets of codes ({', '.join(sources)}); "
            "expected one, in any number of views"
        )
    return config


def code_entries(config: Any) -> list[int]:
    """Places in a blend of the entries that hold pictures."""
    return [
        place for place, entry in enumerate(config.data.blend) if entry.weight > 0 and entry.view != "text"
    ]


def common_words(asked: Asked, place: int) -> list[str]:
    """Words of a recipe that do not depend on the input."""
    from launchers.quickstart import relocated_settings

    recipe = asked.recipes[place]
    words = [f"recipe={recipe}", *(relocated_settings(recipe, asked.run) if asked.run else [])]
    words += [word for word in asked.settings if place == 0 or not word.startswith("model.")]
    words += ["validation_data=null", "wandb.mode=disabled"]
    return words if asked.steps is None else [*words, f"steps={asked.steps}"]
