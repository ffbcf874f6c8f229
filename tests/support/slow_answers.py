"""`python -m eval.understanding` where every batch takes a while, so that a test can kill it in between."""

import sys
import time

from eval.understanding.command import main
from eval.understanding.unified import UnifiedAnswerer

own = UnifiedAnswerer.answer


def slowly(*arguments):
    time.sleep(0.3)
    return own(*arguments)


if __name__ == "__main__":
    UnifiedAnswerer.answer = slowly
    sys.exit(main())
