"""Files of strangers: nothing in them is run, nothing is written or read outside the folder at hand."""

import ast
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DatasetError
from data_pipeline.names import is_below
from data_pipeline.shards.code_shards import DatasetManifest
from data_pipeline.shards.index import check_index
from data_pipeline.sources.llava import import_llava
from dualtoken.perceptual import PerceptualConfig
from eval.overfit import PairResult, Reproduction, _sheet
from eval.report import build_report
from launchers.use import free_names
from pretrain.losses import PerceptualLoss
from tests.support.command import call
from tests.support.convert_support import unified, write_base, write_visual_tokenizer
from tests.support.released_reference import config, random_state
from tests.support.tiny_run import picture
from tests.test_dualtoken.visual_tokenizer.test_released import Intruder, write
from tests.test_eval.test_report import results, write_run
from tests.test_house import MAY_IMPORT, ROOT

# -- what the code may call --------------------------------------------------------------------------------

NEVER = {
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "yaml": {"load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"},
    "os": {"system", "popen"},
    "builtins": {"eval", "exec"},
}
FORBIDDEN_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code"}
SAFE_YAML = {"SafeLoader", "CSafeLoader"}


def named(node: ast.AST) -> str:
    """A dotted name as written, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def full_names(tree: ast.AST) -> dict[str, str]:
    """What names stand for that imports bring in: `np` -> `numpy`, `load` -> `torch.load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that run what a file or a string says, with their lines."""
    imported, found = full_names(tree), []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given_arguments = {keyword.arg: keyword.value for keyword in node.keywords}
        first, dot, rest = named(node.func).partition(".")
        name = imported.get(first, first) + dot + rest
        name = name if "." in name else f"builtins.{name}"
        package, _, function = name.rpartition(".")
        wrong = (
            function in NEVER.get(package, set())
            or (name == "torch.load" and not is_true(given_arguments.get("weights_only")))
            or (
                name == "yaml.load"
                and not {named(a).split(".")[-1] for a in [*node.args, *given_arguments.values()]} & SAFE_YAML
            )
            or (function == "Environment" and not is_true(given_arguments.get("autoescape")))
            or function in {"extractall", "from_string"}
            or any(
                not (isinstance(value, ast.Constant) and value.value in (False, None))
                for argument, value in given_arguments.items()
                if argument in FORBIDDEN_ARGUMENTS
            )
        )
        if wrong:
            found.append(f"{name}:{node.lineno}")
    return found


def test_no_code_runs_what_files_or_strings_say():
    paths = [ROOT / "setup.py", *(ROOT / "docs").rglob("*.py")]
    for package in (*MAY_IMPORT, "benchmarks"):
        paths += sorted((ROOT / package).rglob("*.py"))
    found = {
        str(path.relative_to(ROOT)): calls
        for path in paths
        if (calls := unsafe_calls(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert len(paths) > 100 and not found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "from torch import load\nload(p)",
        "import torch as t\nt.load(p)",
        "pickle.loads(b)",
        "from pickle import load as read\nread(f)",
        "pickle.Unpickler(f)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.Loader)",
        "yaml.unsafe_load(t)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "from os import popen\npopen(c)",
        "eval(t)",
        "exec(t)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "jinja2.Environment(loader=l)",
        "tarfile.open(p).extractall(d)",
        "tar.extractall(d)",
    ],
)
def test_the_rule_finds_what_it_looks_for(line):
    assert unsafe_calls(ast.parse(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p, map_location='cpu', weights_only=True)",
        "np.load(p, allow_pickle=False)",
        "np.load(p)",
        "json.loads(t)",
        "yaml.safe_load(t)",
        "yaml.load(t, Loader=yaml.CSafeLoader)",
        "model.eval()",
        "cursor.exec(t)",
        "subprocess.run(['ls'])",
        "jinja2.Environment(autoescape=True)",
    ],
)
def test_the_rule_leaves_the_rest_alone(line):
    assert not unsafe_calls(ast.parse(line))


# -- pickles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    write_base(root / "llama", "llama")
    write_visual_tokenizer(root / "eyes")
    return root


def with_a_pickle(source, target, intruder):
    """A model folder whose weights are a pickle that would write a file."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    torch.save({"x": intruder}, target / "pytorch_model.bin")
    return target


def test_every_command_refuses_a_file_that_would_run_code(folders, tmp_path, capsys):
    intruder = Intruder(tmp_path / "intruded")
    evil = tmp_path / "evil.pt"
    torch.save({"state_dict": {"x": intruder}}, evil)
    torch.load(evil, weights_only=False)
    assert (tmp_path / "intruded").exists()  # it is a file that runs code where it is let
    (tmp_path / "intruded").unlink()
    llama, eyes = folders / "llama", folders / "eyes"
    released, _ = write(tmp_path / "released", config(), random_state(config()))
    unified(capsys, llama, eyes, tmp_path / "unified")
    picture(0).save(tmp_path / "cat.png")
    bad_llama = with_a_pickle(llama, tmp_path / "bad_llama", intruder)
    bad_eyes = with_a_pickle(eyes, tmp_path / "bad_eyes", intruder)
    bad_model = with_a_pickle(tmp_path / "unified", tmp_path / "bad_model", intruder)
    out = ("--out", tmp_path / "out")
    for words in (
        ("convert", "tokenizer", "--from", "released", "--config", released, "--checkpoint", evil, *out),
        ("convert", "llava", "--model", tmp_path / "unified", "--projector", evil, *out),
        ("convert", "unified", "--llm", bad_llama, "--visual-tokenizer", eyes, *out),
        ("convert", "unified", "--llm", llama, "--visual-tokenizer", bad_eyes, *out),
        ("convert", "tokenizer", "--to", "released", "--model", bad_eyes, *out),
        ("convert", "llm", "--model", bad_model, *out),
        ("reconstruct", tmp_path / "cat.png", "--visual-tokenizer", bad_eyes, *out),
        ("caption", tmp_path / "cat.png", "--model", bad_model, "--visual-tokenizer", eyes),
    ):
        code, _, errors = call(words, capsys)
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (words, errors)
        assert not (tmp_path / "intruded").exists() and not (tmp_path / "out").exists(), words
    with pytest.raises(ValueError, match="evil.pt is refused: it is not a plain file of tensors"):
        PerceptualLoss(PerceptualConfig(net="alex", trunk=str(evil)))
    assert not (tmp_path / "intruded").exists()


# -- names -------------------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.sampled_from(["../../x", "/etc/x", "..", ".", "", "a/../../x", "pipe:touch x", "C:\\x", "\0", "~/x"]),
    st.text(max_size=80),
)


@settings(deadline=None)
@given(st.lists(NAMES, max_size=4))
def test_pictures_named_by_keys_stay_in_their_folder(keys):
    output = Path("/tmp")  # nothing is written here
    for path in free_names(output, keys):
        assert path.parent == output and path.suffix == ".png" and "\0" not in path.name


@settings(deadline=None)
@given(NAMES)
def test_what_is_below_a_folder(name):
    root = Path("/a/b")
    inside = "\0" in name or (root / name).resolve().is_relative_to(root)
    assert not is_below(name) or inside


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
def test_llava_json_reads_below_the_folder_of_pictures(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "pictures" / "own.png"):
        picture(0).save(path)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [{"image": image, "conversations": turns} for image in (name, "own.png")]
    (tmp_path / "list.json").write_text(json.dumps(records), encoding="utf-8")
    found = import_llava(tmp_path / "list.json", tmp_path / "pictures", tmp_path / "out")
    assert (found.samples, found.rejected) == (1, 1)
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["reason"] == f"{name}: not a name below the folder of the pictures"


def test_an_output_folder_is_never_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    Path("list.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    output = Path("pipe:touch ran; cat >", "out")
    import_llava("list.json", "pictures", output)
    assert (output / "shard-000000.tar").is_file() and not Path("ran").exists()


def test_data_sets_name_shards_of_their_own(tmp_path):
    manifest = DatasetManifest("f" * 64, 8, 2, 4, 16)
    manifest.save(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    entry = {"source": "", "sha256": "", "samples_in": 0, "samples": 0, "rejected": 0, "images": 0}
    content["shards"] = {"../../x.tar": entry}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DatasetError, match=r"'\.\./\.\./x\.tar' is not the name of a shard below"):
        DatasetManifest.load(tmp_path)
    meta = tmp_path / ".nv-meta"
    meta.mkdir()
    for name in ("split.yaml", "dataset.yaml"):
        (meta / name).touch()
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"/etc/x.tar": 1}}), encoding="utf-8")
    with pytest.raises(DatasetError, match="names a shard outside it, '/etc/x.tar'"):
        check_index(tmp_path)


# -- pages -------------------------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script>"


def test_the_report_shows_scripts_as_words(tmp_path):
    run = tmp_path / "<script>run"
    text = json.dumps(results())
    for words in ("red <apple> & leaf", "roter apfel", "blocks of similar layers: 1, 2"):
        assert words in text
        text = text.replace(words, EVIL)
    text = text.replace('"de"', json.dumps(EVIL)).replace('"k"', json.dumps(EVIL))
    write_run(run, json.loads(text))
    lines = [
        {"step": s, "split": split, "time": 1.0, f"loss/{EVIL}": s}
        for s in (1, 2)
        for split in ("train", "val")
    ]
    curves = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "mllm" / "metrics.jsonl").write_text(curves, encoding="utf-8")
    page = build_report(run).read_text(encoding="utf-8")
    assert "<script" not in page.lower() and page.count("&lt;script&gt;alert(") > 10


def test_the_report_embeds_pictures_of_the_run_only(tmp_path):
    measured = results()
    measured["reconstruction"]["per_picture"][0]["picture"] = "../../secret"
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    write_run(tmp_path / "run", measured)
    with pytest.raises(ValueError, match=r"a result names the picture '\.\./\.\./secret'"):
        build_report(tmp_path / "run")


def test_the_sheet_of_overfit_shows_scripts_as_words(tmp_path):
    picture(0).save(tmp_path / "p.png")
    pair = PairResult(EVIL, EVIL, EVIL, f"no {EVIL}", 0.5, "p.png", "p.png")
    page = _sheet(Reproduction([pair], {}, torch.zeros(1)), tmp_path)
    assert "<script" not in page and page.count("&lt;script&gt;") == 2
