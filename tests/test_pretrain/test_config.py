"""Settings of a job: recipes, overrides, and one clear line for every mistake."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain.config import (
    ConfigError,
    JobConfig,
    available_recipes,
    changed_keys,
    config_as_yaml,
    find_recipe,
    fitting_ranks,
    load_job_config,
    load_recipe,
    missing_keys,
)

JOB = "tests.test_pretrain.test_config:SmallJobConfig:SmallTask"
NEEDED = [f"job={JOB}", "run_dir=out", "steps=10", "global_batch_size=8", "micro_batch_size=2"]


@dataclass
class Source:
    path: str
    weight: float = 1.0


@dataclass
class SmallJobConfig(JobConfig):
    blend: list[Source] = field(default_factory=list)
    width: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.width % 2:
            raise ValueError(f"width is {self.width}, expected an even number")


class SmallTask:
    pass


def missing_words(recipe: str) -> list[str]:
    """Words `key=x` for everything that a recipe leaves to the user."""
    return [f"{key}=x" for key in missing_keys(load_recipe(find_recipe(recipe)))]


def write_recipe(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(f"job: {JOB}\n{text}", encoding="utf-8")
    return f"recipe={path}"


BASE = """run_dir: runs/base
steps: 10
global_batch_size: 8
micro_batch_size: 2
optimizer: {lr: 1e-3, betas: [0.5, 0.9]}
blend:
- {path: a, weight: 2}
- {path: b}
"""


def test_recipe_and_overrides(tmp_path):
    recipe = write_recipe(tmp_path, "base", BASE)
    config = load_job_config(
        ["--local_rank=1", recipe, "steps=20", "optimizer.lr=2e-4", "blend.1.weight=3", "wandb.name=null"], 2
    )
    assert isinstance(config, SmallJobConfig)
    assert (config.steps, config.optimizer.lr, config.optimizer.betas) == (20, 2e-4, [0.5, 0.9])
    assert config.blend == [Source("a", 2.0), Source("b", 3.0)]
    assert config.wandb.name is None
    assert config.micro_steps(2) == 2


def test_a_path_stays_whole(tmp_path):
    """Words are YAML, in which ` #` would begin a comment: another folder, in silence."""
    recipe = write_recipe(tmp_path, "base", BASE)
    words = ["run_dir=runs/Läufe #2, a=b", "blend.0.path='quoted #3'", "blend.1={path: 'c #4'}"]
    config = load_job_config([recipe, *words], 1)
    assert config.run_dir == "runs/Läufe #2, a=b"
    assert [source.path for source in config.blend] == ["quoted #3", "c #4"]


def test_micro_batch_of_zero_is_a_whole_step_of_a_rank(tmp_path):
    recipe = write_recipe(tmp_path, "base", BASE)
    for ranks, expected in ((1, 8), (2, 4), (8, 1)):
        config = load_job_config([recipe, "micro_batch_size=0"], ranks)
        assert (config.micro_batch_size, config.micro_steps(ranks)) == (expected, 1)
    with pytest.raises(ConfigError, match="cannot be split"):
        load_job_config([recipe, "micro_batch_size=0"], 3)


def test_as_many_ranks_as_the_batch_splits_over(tmp_path):
    recipe = write_recipe(tmp_path, "base", BASE)
    assert [fitting_ranks([recipe], most) for most in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 4]
    assert fitting_ranks([recipe, "micro_batch_size=0"], 8) == 8
    assert fitting_ranks([recipe, "micro_batch_size=3"], 8) == 1  # load_job_config explains it


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_quickstart_recipes_start_on_any_machine(ranks):
    for name in ("quickstart_siglip", "quickstart_tokenizer", "quickstart_mllm"):
        words = [f"recipe={name}"]
        load_job_config(words, fitting_ranks(words, ranks))


def test_recipe_extends_another(tmp_path):
    write_recipe(tmp_path, "base", BASE)
    child = write_recipe(tmp_path, "child", "extends: base\nsteps: 30\noptimizer: {weight_decay: 0.1}\n")
    config = load_job_config([child])
    assert (config.steps, config.run_dir) == (30, "runs/base")
    assert (config.optimizer.weight_decay, config.optimizer.betas) == (0.1, [0.5, 0.9])


def test_saved_settings_load_again(tmp_path):
    config = load_job_config([write_recipe(tmp_path, "base", BASE)])
    saved = tmp_path / "config.yaml"
    saved.write_text(config_as_yaml(config), encoding="utf-8")
    assert load_job_config([f"recipe={saved}"]) == config
    again = load_job_config([f"recipe={saved}", "optimizer.lr=0.5", "blend.0.path=c"])
    changes = changed_keys(saved.read_text(encoding="utf-8"), config_as_yaml(again))
    assert "optimizer.lr: 0.001 -> 0.5" in changes
    assert len(changes) == 2 and changes[1].startswith("blend: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepz=3"], r"unknown key 'stepz' \(did you mean 'steps'\?\)"),
        (["optimizer.lrr=3"], r"optimizer\.lrr: .*'lr'"),
        (["blend=[{path: a, wight: 2}]"], r"blend.*wight.*weight"),
        (["blend=[{weight: 2}]"], r"blend\[0\]\.path"),
        (["steps=many"], r"steps: .*'many'.*Integer"),
        (["optimizer.lr=[1]"], r"optimizer\.lr: "),
        (["optimizer=3"], r"optimizer: "),
        (["on_nonfinite=ignore"], r"on_nonfinite: .*'ignore'.*'error', 'skip'"),
        (["optimizer={warmup_ratio: 0.1, warmup_steps: 5}"], r"ratio 0\.1 and warmup_steps 5: .*one of"),
        (["optimizer.betas=[0.9]"], r"betas \[0\.9\]: AdamW needs two"),
        (["width=3"], r"width is 3, expected an even number"),
        (["steps=0"], r"steps=0: expected at least 1"),
        (["checkpoint_every=-1"], r"checkpoint_every=-1: expected 0 or more"),
        (["global_batch_size=30"], r"multiple of micro_batch_size 2 x 2 rank\(s\) = 4, such as 28 or 32"),
        (["micro_batch_size=16"], r"global_batch_size=8 cannot be split.*= 32, such as 32"),
        (["steps"], r"got the argument 'steps': expected key=value"),
        (["--steps=3"], r"got the argument '--steps=3': expected key=value"),
        (["recipe=quickstart_siglop"], r"is unknown \(did you mean 'quickstart_siglip'\?\)"),
        (["recipe=no/such.yaml"], r"recipe=no/such.yaml: there is no such file"),
        (["job=tokeniser"], r"job=tokeniser is unknown \(did you mean 'tokenizer'\?\)"),
        (["job=tests.nowhere:A:B"], r"job=tests\.nowhere:A:B: No module named"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_job_config([*NEEDED, *words], world_size=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\n", "is not valid YAML"),
        ("extends: child\n", "extends itself"),
        ("run_dir: out\nglobal_batch_size: 2\nmicro_batch_size: 1\n", "steps has no value"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_job_config([write_recipe(tmp_path, "child", text)])


def test_nothing_given():
    with pytest.raises(ConfigError, match="no job given: start with recipe=NAME, one of .*quickstart_siglip"):
        load_job_config([])


@pytest.mark.parametrize("recipe", available_recipes())
def test_every_recipe_loads(recipe):
    words, missing = [f"recipe={recipe}"], missing_words(recipe)  # missing is what only the user can know
    for word in missing:
        key = word.removesuffix("=x")
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} has no value: give {re.escape(key)}="):
            load_job_config([*words, *(other for other in missing if other != word)], world_size=1)
    assert load_job_config([*words, *missing], world_size=1).steps > 0


def test_all_that_is_missing_is_named_at_once(tmp_path):
    recipe = write_recipe(tmp_path, "base", BASE.replace("path: b", "path: '???'") + "width: ???\n")
    with pytest.raises(ConfigError) as caught:
        load_job_config([recipe])
    assert str(caught.value) == "blend.1.path, width have no value: give blend.1.path=... width=..."
    given = load_job_config([recipe, "blend.1.path=c", "width=2"])
    assert (given.blend[1].path, given.width) == ("c", 2)


def run_train(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pretrain.train", *words]
    env = {**os.environ, "RANK": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, encoding="utf-8")


def test_command_line_mistake_ends_with_code_2():
    result = run_train("recipe=quickstart_siglop")
    assert result.returncode == 2
    assert result.stderr.startswith("error: recipe=quickstart_siglop is unknown")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_help():
    result = run_train("--help")
    assert result.returncode == 0
    assert "quickstart_siglip" in result.stdout and "contrastive, tokenizer, mllm" in result.stdout


def test_run_folders_behind_addresses_are_refused():
    with pytest.raises(ConfigError, match="run_dir=s3://bucket/run: expected a folder of a file system"):
        load_job_config([*NEEDED, "run_dir=s3://bucket/run"])
