"""Command line of weights in and out: `python -m train.convert import DIR --workdir OUT`, `... export ...`."""

import sys

from train.convert.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
