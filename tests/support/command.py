"""The `dualtoken` command in this process."""

import sys

import pytest

from launchers import cli


def call(arguments, capsys):
    """Exit code, output and errors of `dualtoken ARGUMENTS`."""
    before = sys.argv
    sys.argv = ["dualtoken", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err
