"""Command line of weights in and out: `python -m train.convert import DIR --workdir OUT`, `... export ...`."""

from train.keyboard import take_interrupts

if __name__ == "__main__":
    take_interrupts()  # before the imports below, which take seconds

import sys

from train.convert.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
