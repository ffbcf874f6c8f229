"""The documents: commands that parse, paths and rooms that exist, a site without a dead link."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pretend_slurm import options_of_job
from tests.test_house import MAY_IMPORT, ROOMS, ROOT, described, module_path, modules_of

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


def fenced_blocks(name: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def readme_commands() -> list[list[str]]:
    """Words of every command in the shell blocks of the documents for users."""
    commands = []
    for name in DOCUMENTS:
        for language, content in fenced_blocks(name):
            if language == "bash":
                lines = content.replace("\\\n", " ").splitlines()
                commands += [words for line in lines if (words := shlex.split(line, comments=True))]
    return commands


def test_paths_in_the_documents_exist():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:dualtoken|data_pipeline|pretrain|eval|launchers|docs|tests)/[\w./]+)`", text
        ):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_map_has_every_room():
    (rows,) = re.findall(r"^## Map\n\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    listed = set(re.findall(r"^\| `([\w/]+)/` \|", rows, re.M))
    inner = {room.replace(".", "/") for room in ROOMS}
    outer = set(MAY_IMPORT) - {"dualtoken", "data_pipeline"}  # these two are rooms and little else
    assert listed == inner | outer | {"ds_configs", "docs", "benchmarks", "tests"}


def test_every_module_is_in_the_api_pages():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.M))
    here = {
        name
        for package in ("dualtoken", "data_pipeline", "pretrain", "eval")
        for name in modules_of(package)
        if module_path(name).name not in ("__init__.py", "__main__.py")
    }
    assert shown == here - {"dualtoken.public_names"}


def test_figures_are_what_their_script_draws(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs/figures/draw.py"))["draw"]
    for path in draw(tmp_path):
        kept = ROOT / "docs/figures" / path.name
        assert path.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), (
            "run docs/figures/draw.py"
        )


def test_site_builds_without_a_dead_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site/api/visual_tokenizer/index.html").read_text(encoding="utf-8")
    assert "DualTokenVisualTokenizer" in page and "Turn images into pixel and semantic codes" in page
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert not loaded, f"the site loads {loaded} from elsewhere"


def test_commands_in_the_documents_parse():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = readme_commands()
    assert len(commands) > 10
    for words in commands:
        match words:
            case ["make", target]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), words
            case ["dualtoken", *arguments]:
                check_dualtoken(arguments)
            case ["python", "-m", module, *arguments]:
                check_module(module, arguments)
            case ["deepspeed", *arguments]:
                check_deepspeed(arguments)
            case ["torchrun", *arguments]:
                check_torchrun(arguments)
            case ["sbatch", *arguments]:
                check_sbatch(arguments)
            case ["srun", "--nodes", nodes, "--ntasks-per-node", tasks, "python", "-m", module, *arguments]:
                check_module(module, arguments, int(nodes) * int(tasks))
            case ["srun", "--nodes", _, "--ntasks-per-node", _, "dualtoken", *arguments]:
                check_dualtoken(arguments)
            case ["lmms-eval", "--model", "dualtoken", "--model_args", *_]:
                pass  # tests/test_eval/test_lmms_eval_adapter.py runs it
            case ["bash", "launchers/shell/on_hosts.sh", "hosts", command]:
                launcher, *arguments = shlex.split(command.replace("$NODE_RANK", "1"))
                assert launcher == "deepspeed"
                check_deepspeed(arguments)
            case ["export", *assignments]:
                assert all(re.fullmatch(r"[A-Z_]+=[\w.-]+", word) for word in assignments), words
            case ["pip", "install", *_]:
                assert set(re.findall(r"[\w-]+", words[-1])) <= set(described()["extras_require"]), words
            case _:
                pytest.fail(f"no rule to check {words}")


def check_dualtoken(arguments: list[str]) -> None:
    import typer

    from launchers.cli import app

    if arguments == ["--help"]:
        return
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group, such as convert
        command, arguments = command.commands[arguments[0]], arguments[1:]
    with command.make_context("dualtoken", arguments):
        pass


def check_deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(arguments)
    assert options.module and options.no_ssh == (options.node_rank >= 0)
    ranks = options.num_gpus if options.num_gpus > 0 else 8 if options.hostfile == "hosts" else 2
    check_module(options.user_script, options.user_args, ranks)


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import parse_args, parse_min_max_nnodes

    options = parse_args(arguments)
    ranks = parse_min_max_nnodes(options.nnodes)[0] * int(options.nproc_per_node)
    assert options.module
    check_module(options.training_script, options.training_script_args, ranks)


def check_sbatch(words: list[str]) -> None:
    options, script, arguments = options_of_job(words)
    if script == Path("launchers/slurm/train.sbatch"):
        check_module("pretrain.train", arguments, options.nodes * options.ntasks_per_node)
    else:
        assert script == Path("launchers/slurm/pretokenize.sbatch") and options.array
        check_module("data_pipeline.pretokenize", arguments)


def check_module(module: str, arguments: list[str], ranks: int = 1) -> None:
    if module == "pretrain.train":
        from pretrain.config import load_job_config

        load_job_config(arguments, world_size=ranks)
    elif module == "launchers.cli":
        check_dualtoken(arguments)
    else:
        from data_pipeline.pretokenize.command import _parse_arguments

        assert module == "data_pipeline.pretokenize"
        _parse_arguments(arguments)
