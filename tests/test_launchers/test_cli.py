"""The `dualtoken` command: help a newcomer understands, one line for a mistake, quick to start."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from launchers import cli
from launchers.errors import UserError
from launchers.use import free_names
from tests.support.command import call

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "quickstart", "sample-data", "train", "plan", "pretokenize", "overfit", "reconstruct", "generate",
    "caption", "chat", "evaluate", "sweep", "report",
)  # fmt: skip


def test_help_names_every_command(capsys):
    code, out, err = call(["--help"], capsys)
    assert code == 0 and err == ""
    for command in COMMANDS:
        assert re.search(rf"│ {command} ", out), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_that_parses(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = call([command, "--help"], capsys)
    assert code == 0
    example = re.search(rf"(dualtoken {command}.*?)\[/\]", cli_docstring(command))
    assert example and example[1] in out
    assert parses(shlex.split(example[1])[1:]), example[1]


def test_the_folder_for_results_has_one_name_everywhere():
    import typer

    def options(group):
        for command in group.commands.values():
            yield from options(command) if hasattr(command, "commands") else command.params

    named = [
        set(option.opts) for option in options(typer.main.get_command(cli.app)) if option.name == "output"
    ]
    assert [names for names in named if names not in ({"--out", "--output"}, {"output"})] == []
    assert named.count({"--out", "--output"}) >= 10


def cli_docstring(command):
    return typer.main.get_command(cli.app).commands[command].callback.__doc__


def parses(arguments):
    """Whether a command line is understood; nothing is run."""
    import typer

    group = typer.main.get_command(cli.app)
    command = group.commands[arguments[0]]
    with command.make_context(arguments[0], arguments[1:]):
        return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'"),
        (["generate"], "Missing argument"),
        (["evaluate", "everything"], "'everything' is not one of"),
        (["reconstruct", "--nope", "x.png"], "No such option"),
        (["train", "quickstart_tokeniser"], "did you mean 'quickstart_tokenizer'?"),
        (["train", "quickstart_tokenizer", "stepz=3"], "unknown key 'stepz' (did you mean 'steps'?)"),
        (
            ["train", "quickstart_tokenizer", "micro_batch_size=7", "--ranks", "2"],
            "global_batch_size=8 cannot",
        ),
        (["report", "--run", "nowhere"], "nothing to report in nowhere"),
        (["reconstruct", "x.png", "--visual-tokenizer", "nowhere"], "no visual tokenizer in nowhere"),
        (["overfit"], "no visual tokenizer in runs/quickstart/tokenizer/export"),
        (["pretokenize", "--fit", "squeeze"], "'squeeze' is not one of 'resize', 'crop'"),
        (["sample-data", "somewhere", "--image-size", "4"], "image_size is 4"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(arguments, capsys)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("dry_run", [False, True])
def test_pretokenize_passes_its_options_on(capsys, monkeypatch, dry_run):
    """With none given they are the program's own defaults."""
    from data_pipeline.pretokenize.command import _parse_arguments
    from launchers import processes

    commands = []
    monkeypatch.setattr(
        processes, "run", lambda command, ranks: commands.append(command) or processes.Finished(0, 0, 0)
    )

    def passed_on(*options):
        words = ["pretokenize", "in", "--output", "out", "--visual-tokenizer", "vt", "--ranks", "2"]
        assert call([*words, *options, *["--dry-run"] * dry_run], capsys)[0] == 0
        command = commands.pop()
        return _parse_arguments(command[command.index("data_pipeline.pretokenize") + 1 :])

    mandatory = ["--inputs", "in", "--output", "out", "--visual-tokenizer", "vt"]
    own = [*mandatory, *["--dry-run", "--workers", "2"] * dry_run]
    assert passed_on() == _parse_arguments(own)
    options = shlex.split(
        "--prefix-keys --images-first --generate-images --chat-template vicuna --on-bad-shard skip "
        "--fit crop --default-language de --batch-size 8 --backend pil --precision bf16 --decoding-threads 3 "
        "--features float16 --vision-tower siglip --feature-layer 25 --tiles 1x2,2x1"
    )
    assert passed_on(*options) == _parse_arguments([*own, *options]) != _parse_arguments(own)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(**_):
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(TypeError):
        cli.main()


@pytest.mark.parametrize(
    ("command", "works", "goes_on"),
    [("evaluate", "evaluate.run_command", True), ("caption", "use.caption_files", False)],
)
def test_stopped_commands_say_so(command, works, goes_on, capsys, monkeypatch):
    """Where a person presses Ctrl-C: inside a command; typer turns that into an exit code."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"launchers.{works}", interrupted)
    code, _, err = call([command, *["cat.png"] * (command == "caption")], capsys)
    assert code == 130 and err.startswith("error: stopped") and err.count("\n") == 1
    assert ("goes on where it was" in err) == goes_on


def test_the_traceback_can_be_asked_for(monkeypatch):
    def wrong(**_):
        raise UserError("mend it")

    monkeypatch.setattr(cli, "app", wrong)
    monkeypatch.setenv(cli.RAISE, "1")
    with pytest.raises(UserError):
        cli.main()


def test_starts_without_the_heavy_packages():
    code = (
        "import sys, launchers.cli; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'megatron', 'PIL', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "red-apple.png").touch()
    found = free_names(tmp_path, ["red apple", "red/apple!", "red apple", "///", "x" * 100])
    assert [path.name for path in found] == [
        "red-apple-2.png", "red-apple-3.png", "red-apple-4.png", "picture.png", "x" * 60 + ".png",
    ]  # fmt: skip


def test_unreadable_pictures_are_named(tmp_path):
    from launchers.use import read_pictures

    with pytest.raises(UserError, match="no such file: .*gone.png"):
        read_pictures([tmp_path / "gone.png"], 16)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="bad.png is no picture that can be read"):
        read_pictures([tmp_path / "bad.png"], 16)
