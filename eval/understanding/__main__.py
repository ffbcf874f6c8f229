"""The command; its options are in command.py."""

import sys

from eval.understanding.command import main

if __name__ == "__main__":
    sys.exit(main())
