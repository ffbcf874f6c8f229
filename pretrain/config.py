"""Settings of a training job: dataclasses, YAML recipes, `key=value` words, one clear line per mistake."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

RECIPES = Path(__file__).resolve().parent / "recipes"

# Job -> module, config class, task class. Imported when asked for: starting one job does not load the others.
JOBS = {
    "contrastive": ("pretrain.contrastive_task", "ContrastiveJobConfig", "ContrastiveTask"),
    "tokenizer": ("pretrain.tokenizer_task", "TokenizerJobConfig", "TokenizerTask"),
    "mllm": ("pretrain.mllm_task", "MllmJobConfig", "MllmTask"),
}


class ConfigError(ValueError):
    """A mistake in a recipe or on the command line; the message is one line for the user."""


@dataclass
class OptimizerConfig:
    """AdamW or Muon and the learning-rate schedule for one engine; steps are optimizer steps.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalizes the update of every
    matrix and kernel; vectors and `muon_exclude` stay with AdamW. It has its own rate: the spectral norm of
    an update.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    # Patterns of names of matrices that map from or to symbols or pixels: they stay with AdamW.
    muon_exclude: list[str] = field(
        default_factory=lambda: [
            "*embedding*",
            "*embed_tokens*",
            "*probe*",
            "*lm_head*",
            "*classifier*",
            "*conv_out*",
        ]
    )
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0  # not applied to parameters of one dimension (norms, biases)
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # share of the run's steps, in place of warmup_steps
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.0  # the cosine ends at lr * min_lr_ratio
    # Pattern of parameter names -> factor on lr, such as {"llm.*": 0.01}; the first that fits counts.
    lr_scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"betas {self.betas}: AdamW needs two, for example [0.9, 0.95]")
        if self.lr < 0 or self.warmup_steps < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(
                f"lr {self.lr}, warmup_steps {self.warmup_steps} and min_lr_ratio {self.min_lr_ratio}: "
                "expected lr >= 0, warmup_steps >= 0 and min_lr_ratio between 0 and 1"
            )
        if not 0 <= self.warmup_ratio <= 1 or (self.warmup_ratio and self.warmup_steps):
            raise ConfigError(
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps}: expected a share of "
                "the steps between 0 and 1, and one of the two only; set the other to 0"
            )
        for key, scale in self.lr_scales.items():
            if not isinstance(scale, int | float):  # OmegaConf takes the dots of a pattern for levels
                below = next(iter(scale), "*") if isinstance(scale, dict) else "*"
                raise ConfigError(
                    f"lr_scales.{key}={scale}: expected a number; a name with dots stands in brackets, such "
                    f"as 'optimizer.lr_scales[{key}.{below}]=0.1'"
                )
        if self.muon_lr < 0 or not 0 <= self.muon_momentum < 1:
            raise ConfigError(
                f"muon_lr {self.muon_lr} and muon_momentum {self.muon_momentum}: expected muon_lr >= 0 and "
                "muon_momentum in [0, 1)"
            )


@dataclass
class WandbConfig:
    """Where the figures of metrics.jsonl go too; `offline` writes into the run folder and needs no login."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "dualtoken"
    name: str | None = None  # default: the run folder's name


@dataclass
class HealthConfig:
    """When a run that does not go on is told of or ended, and what is worth a warning; 0 turns one off."""

    collective_timeout_seconds: float = 900.0  # a rank that waits longer for another one ends the job
    startup_timeout_seconds: float = (
        3600.0  # the same until the first step is done, while saving and exporting
    )
    data_warning_seconds: float = 60.0  # of waiting for a micro-batch; told again after twice that, and so on
    data_limit_seconds: float = 600.0  # of waiting for a micro-batch; then the job ends
    spike: float = 10.0  # robust deviations of a loss or a gradient norm above the median of the last 100
    dead_codebook_usage: float = 0.005  # share of the codes of a depth in use, in five logs
    # Of a vision tower that trains, under which it counts as collapsed: effective rank, as a share of the
    # start's, and mean cosine to the start's features.
    tower_rank: float = 0.5
    tower_cosine: float = 0.5

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 0:
                raise ConfigError(f"health.{item.name}={getattr(self, item.name)}: expected 0 or more")
        if min(self.collective_timeout_seconds, self.startup_timeout_seconds) <= 0:
            raise ConfigError(
                f"health.collective_timeout_seconds={self.collective_timeout_seconds} and "
                f"startup_timeout_seconds={self.startup_timeout_seconds}: expected more than 0 seconds"
            )
        if self.data_limit_seconds >= self.collective_timeout_seconds:
            raise ConfigError(
                f"health.data_limit_seconds={self.data_limit_seconds}: expected less than "
                f"collective_timeout_seconds={self.collective_timeout_seconds}, when the other ranks give up"
            )


@dataclass
class ProfileConfig:
    """Steps that `torch.profiler` records, into `traces/` of the run folder."""

    steps: str = ""  # the first and the last one as the log counts them, such as 10..13; empty: none

    def __post_init__(self) -> None:
        self.bounds()

    def bounds(self) -> tuple[int, int] | None:
        """The first and the last step; None for none.

        Raises:
            ConfigError: `steps` is no range.
        """
        if not self.steps:
            return None
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", self.steps)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(
                f"profile.steps={self.steps}: expected a step from 1 on, or the first and the last of "
                "several, such as 10..13"
            )
        return first, last


@dataclass
class JobConfig:
    """What every job has; a job's own config class derives from this one and stands beside its task."""

    job: str = MISSING
    run_dir: str = MISSING
    steps: int = MISSING  # optimizer steps of the whole run
    global_batch_size: int = MISSING  # samples (mllm: packs) per optimizer step over all ranks
    micro_batch_size: int = MISSING  # of these, per rank and forward pass; 0: all of a rank's in one pass
    seed: int = 0
    deepspeed: str = "zero1.json"  # a path, or a file in ds_configs/
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the hardware gains by it
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gradient_clipping: float = 1.0  # of the global norm; 0 leaves gradients as they are
    on_nonfinite: Literal["error", "skip"] = "error"
    log_every: int = 10
    validate_every: int = 0  # 0: at the end only
    validate_batches: int = 0  # per rank; 0: all of them
    checkpoint_every: int = 0  # 0: at the end (and when asked to stop) only
    keep_checkpoints: int = 2
    async_checkpoints: bool = True  # files are written while training goes on, from a copy in host memory
    resume: str = "auto"  # auto | never | path of a step folder
    wandb: WandbConfig = field(default_factory=WandbConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    # Parts that torch.compile takes, [all] for all; what there is depends on the job (docs/performance.md).
    compile: list[str] = field(default_factory=list)
    garbage_every: int = 50  # steps between collections of Python's garbage, by all ranks; 0: left to Python
    peak_tflops: float = 0.0  # of a rank's device in this precision, for `mfu`; 0: its data sheet, if known

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in (
            "micro_batch_size",
            "validate_every",
            "validate_batches",
            "checkpoint_every",
            "gradient_clipping",
            "seed",
            "garbage_every",
            "peak_tflops",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more")
        if (bounds := self.profile.bounds()) is not None and bounds[1] > self.steps:
            raise ConfigError(
                f"profile.steps={self.profile.steps}: expected steps of this run, which has {self.steps}"
            )
        if "://" in str(self.run_dir):
            raise ConfigError(
                f"run_dir={self.run_dir}: expected a folder of a file system that all ranks share; "
                "checkpoints are renamed when they are whole, which no store behind an address can do "
                "(docs/checkpoints.md)"
            )
        if self.optimizer.name == "muon" and self.gradient_clipping:
            raise ConfigError(
                f"gradient_clipping={self.gradient_clipping} with optimizer.name=muon: the updates of Muon "
                "have a fixed size, which clipping would spoil; set gradient_clipping=0"
            )

    def data_ranks(self, world_size: int) -> int:
        """How many ranks have samples of their own: all of them, unless the job lets several share one.

        Raises:
            ConfigError: the ranks cannot be divided so.
        """
        return world_size

    def micro_steps(self, world_size: int) -> int:
        """Micro-batches per rank in one optimizer step.

        Raises:
            ConfigError: the global batch is not a multiple of micro batch times ranks with samples.
        """
        ranks = self.data_ranks(world_size)
        per_step = self.micro_batch_size * ranks
        if self.global_batch_size % per_step:
            below = self.global_batch_size // per_step * per_step
            nearest = f"{below} or {below + per_step}" if below else str(per_step)
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} cannot be split: expected a multiple of "
                f"micro_batch_size {self.micro_batch_size} x {ranks} rank(s) = {per_step}, "
                f"such as {nearest}"
            )
        return self.global_batch_size // per_step


def job_classes(job: str) -> tuple[type[JobConfig], type]:
    """Config class and task class of a job: a name in JOBS, or `module:ConfigClass:TaskClass`."""
    if job in JOBS:
        module_name, config_name, task_name = JOBS[job]
    elif job.count(":") == 2:
        module_name, config_name, task_name = job.split(":")
    else:
        raise ConfigError(f"job={job} is unknown{_did_you_mean(job, JOBS)}; there are {', '.join(JOBS)}")
    try:
        module = importlib.import_module(module_name)
        return getattr(module, config_name), getattr(module, task_name)
    except (ModuleNotFoundError, AttributeError) as error:
        if job in JOBS:
            raise
        raise ConfigError(f"job={job}: {error}") from error


def available_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Path of a recipe given by name or path; `beside` is the folder of the recipe that extends it."""
    candidates = [Path(name), RECIPES / f"{name}.yaml"]
    if beside is not None:
        candidates = [beside / name, beside / f"{name}.yaml", *candidates]
    for path in candidates:
        if path.is_file():
            return path
    if name.endswith((".yaml", ".yml")) or "/" in name:
        raise ConfigError(f"recipe={name}: there is no such file")
    known = available_recipes()
    raise ConfigError(f"recipe={name} is unknown{_did_you_mean(name, known)}; there are {', '.join(known)}")


def load_recipe(path: Path, _seen: tuple[Path, ...] = ()) -> DictConfig:
    """Read a recipe and, below it, the ones it `extends`."""
    path = path.resolve()
    if path in _seen:
        raise ConfigError(f"recipe {path} extends itself (through {', '.join(p.name for p in _seen)})")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"recipe {path}: expected keys and values, got a {type(loaded).__name__}")
    if "extends" not in loaded:
        return loaded
    base = find_recipe(str(loaded.pop("extends")), beside=path.parent)
    return OmegaConf.merge(load_recipe(base, (*_seen, path)), loaded)


def load_job_config(
    argv: Sequence[str], world_size: int | None = None, in_place_of_missing: str | None = None
) -> JobConfig:
    """Build and check the settings of a job from `recipe=NAME key=value ...`.

    Args:
        argv: Words of the command line; launchers' `--local_rank` is ignored.
        world_size: Ranks the batch is split over; default from WORLD_SIZE, else 1.
        in_place_of_missing: What keys without a value are given, to plan a run; None makes them an error.

    Raises:
        ConfigError: anything a user can mend, in one line that names the key.
    """
    merged = _merged_settings(argv)
    if "job" not in merged:
        raise ConfigError(f"no job given: start with recipe=NAME, one of {', '.join(available_recipes())}")
    config_class, _ = job_classes(str(merged.job))
    if in_place_of_missing is not None:
        for key in missing_keys(merged):
            OmegaConf.update(merged, key, in_place_of_missing)
    config = _build(config_class, merged)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    config.micro_batch_size = config.micro_batch_size or max(1, config.global_batch_size // ranks)
    config.micro_steps(ranks)
    return config


def fitting_ranks(argv: Sequence[str], most: int) -> int:
    """The most ranks, `most` at the highest, that the batch of `recipe=NAME key=value ...` splits over.

    Raises:
        ConfigError: as `load_job_config`, of the recipe and the words; settings are not checked here.
    """
    merged = _merged_settings(argv)
    batch, micro_batch = (merged.get(name) for name in ("global_batch_size", "micro_batch_size"))
    share = merged.get("sequence_parallel_size", 1)
    if not all(isinstance(number, int) for number in (batch, micro_batch, share)):
        return most  # load_job_config says what is wrong
    if batch < 1 or micro_batch < 0 or share < 1:
        return most
    groups = [n for n in range(1, most // share + 1) if batch % ((micro_batch or 1) * n) == 0]
    return share * max(groups) if groups else 1


def missing_keys(settings: DictConfig) -> list[str]:
    """Keys whose value is `???`, as the command line takes them.

    OmegaConf itself lets one that has a default, or lies inside a list, pass in silence.
    """
    return sorted(re.sub(r"\[(\d+)\]", r".\1", key) for key in OmegaConf.missing_keys(settings))


def config_as_yaml(config: JobConfig) -> str:
    """The resolved settings, as the run folder's config.yaml holds them."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(before: str, after: str) -> list[str]:
    """Lines `key: old -> new` for what differs between two config.yaml texts."""
    old, new = _flat(OmegaConf.create(before)), _flat(OmegaConf.create(after))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _merged_settings(argv: Sequence[str]) -> DictConfig:
    recipe, overrides = _split_arguments(argv)
    merged = OmegaConf.create() if recipe is None else load_recipe(find_recipe(recipe))
    for key, word in overrides.items():
        try:
            OmegaConf.update(merged, key, _value(word))
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"{key}={word}: {_one_line(error)}") from error
    return merged


def _value(word: str) -> Any:
    """The value of a word, read as YAML; but a bare text stays whole: ` #` in a path begins no comment."""
    if " #" in word and not word.startswith(("[", "{", "'", '"')):
        return word
    return OmegaConf.from_dotlist([f"value={word}"]).value


def _split_arguments(argv: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    recipe, overrides = None, {}
    for word in argv:
        if word.startswith(("--local_rank", "--local-rank")):
            continue  # DeepSpeed's launcher passes it; the rank is read from the environment
        key, equals, value = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"got the argument {word!r}: expected key=value, for example steps=100")
        if key == "recipe":
            recipe = value
        else:
            overrides[key] = value
    return recipe, overrides


def _build(config_class: type[JobConfig], merged: DictConfig) -> JobConfig:
    known = [item.name for item in fields(config_class)]
    for key in merged:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{_did_you_mean(str(key), known)}")
    if missing := missing_keys(merged):
        verb, words = "has" if len(missing) == 1 else "have", " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{', '.join(missing)} {verb} no value: give {words}")
    try:
        config = OmegaConf.structured(config_class)
        for key in merged:
            try:
                config = OmegaConf.merge(config, OmegaConf.masked_copy(merged, key))
            except OmegaConfBaseException as error:
                where = error.full_key or key
                # Inside lists of dataclasses OmegaConf names the last part only.
                where = where if str(where).startswith(str(key)) else f"{key}: {where}"
                raise ConfigError(f"{where}: {_one_line(error)}") from error
        built = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: give {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {_one_line(error)}") from error
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # from a dataclass's own check
        raise ConfigError(_one_line(error)) from error
    if not isinstance(built, JobConfig):
        raise ConfigError(f"{config_class.__name__} is not a JobConfig")
    return built


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, DictConfig):
        flat: dict[str, Any] = {}
        for key in config:
            flat |= _flat(config[key], f"{prefix}.{key}" if prefix else str(key))
        return flat
    if isinstance(config, ListConfig):
        return {prefix: OmegaConf.to_container(config)}
    return {prefix: config}


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).split("full_key:")[0].splitlines() if line.strip())
