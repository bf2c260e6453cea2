"""`python -m twomamba_jax.generate --workdir DIR --prompt TEXT`: the command line of `twomamba_jax.command_line`."""

import sys

from twomamba_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
