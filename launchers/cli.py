"""The `dualtoken` command. What a command needs is imported when it runs, so that help comes at once."""

import os
import sys

import typer

from launchers.commands import data, evaluate, measure, plan, train, use
from launchers.errors import UserError

RAISE = "DUALTOKEN_TRACEBACK"
GO_ON = ("quickstart", "train", "pretokenize", "overfit", "evaluate", "ablate", "sweep")
"""Commands that, started again, keep what they had done."""
INTERRUPTED = 130

app = typer.Typer(
    name="dualtoken",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrain and use vision-language models with dual visual vocabularies.\n\n"
    "Start with [bold]dualtoken quickstart[/]: on a laptop it trains everything small, on sample drawings, "
    "and writes a report in about a quarter of an hour. The other commands then work on its results in "
    "runs/quickstart; options point them elsewhere.",
)
for group in (train, plan, use, evaluate, measure, data):
    app.add_typer(group.commands)


def main() -> None:
    """Run the command; mistakes are one line on standard error and exit code 2.

    With DUALTOKEN_TRACEBACK=1 in the environment errors keep their traceback.
    """
    if sys.argv[1:] and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # by the launcher of DeepSpeed, which says the same in the environment
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of defaults in its own configs
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer makes this of Ctrl-C
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        goes_on = sys.argv[1:] and sys.argv[1] in GO_ON
        hint = "; started again, the same command goes on where it was" if goes_on else ""
        _fail(f"stopped{hint}", INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:  # the command line itself is wrong
            if not usage():
                sys.exit(2)  # no command given: the help has been shown
            _fail(f"{_one_line(usage())} (see: dualtoken --help)", 2)
        # ValueError is what every part of the project raises for mistakes of its user.
        if os.environ.get(RAISE) or not isinstance(error, UserError | ValueError | OSError | ImportError):
            raise
        _fail(_one_line(str(error)), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
