"""Machines unlike those the project was written on: paths with spaces, other locales."""

import os
import shutil
import stat
import subprocess
import sys

import pytest

from launchers import processes
from tests.test_house import ROOT

# What POSIX leaves of a locale, with Python's own way out of it switched off.
BARE_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize("venv", [".venv", "other"])
def test_make_in_a_folder_with_spaces(tmp_path, venv):
    folder = tmp_path / "a folder with spaces"
    (folder / venv / "bin").mkdir(parents=True)
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "ruff", "mypy", "shellcheck", "dualtoken", "mkdocs"):
        program = folder / venv / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $@"; command -v ruff\n', encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / venv / ".installed").touch()
    command = ["make", "test", "quickstart", "docs", f"VENV={venv}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for line in ("ruff check .", "python -m pytest", "dualtoken quickstart", "mkdocs build --strict"):
        assert line in done.stdout
    assert str(folder / venv / "bin" / "ruff") in done.stdout  # on PATH for what the programs start


def test_launcher_needs_no_script_of_the_environment(monkeypatch):
    """Scripts that pip writes for a path with a space do not start; modules do."""
    started = []

    def popen(words, **settings):
        started.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "environment", lambda ranks: {})  # torch starts programs of its own
    monkeypatch.setattr(subprocess, "Popen", popen)
    for command in (
        processes.deepspeed_command("a.b", ["x=1"], 2),
        ["dualtoken", "report"],
        ["python", "-V"],
    ):
        with pytest.raises(KeyboardInterrupt):
            processes.run(command)
    assert [words[0] for words in started] == [sys.executable] * 3
    assert started[0][1:4] == ["-m", "deepspeed.launcher.runner", "--quiet"]


def test_drawings_are_named_in_a_bare_locale(tmp_path):
    """Names beyond ASCII are read, written and printed; the whole chain was run so by hand."""
    script = (
        "import pathlib, sys\n"
        "from data_pipeline.sources.text_tokenizer import train_text_tokenizer\n"
        "from launchers.commands.options import say\n"
        "train_text_tokenizer(pathlib.Path(sys.argv[1]), ['c\\u00edrculo'], 600)\n"
        "say('a circle: c\\u00edrculo')\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", script, str(tmp_path / "words")],
        cwd=ROOT,
        env={**os.environ, **BARE_LOCALE},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    own = [
        line
        for line in done.stderr.decode().splitlines()
        if "EncodingWarning" in line and str(ROOT / "data_pipeline") in line
    ]
    assert not own
