"""`hosl serve` whose passes take 60 ms longer, so that questions wait and are merged: slow_server.py serve ..."""

import sys
import time

from hosl.cli import main
from hosl.service import scheduler

answers = scheduler._answers


def slowly(together):
    time.sleep(0.06)
    return answers(together)


scheduler._answers = slowly
sys.exit(main(sys.argv[1:]))
