"""`python -m twomamba_jax.generate`: another name of `python -m train.generate`, which stands above this package."""

import sys

if __name__ == "__main__":
    try:
        from train.generate import main
    except ImportError as error:
        needed = 'a clone of the repository, with what trains: pip install -e ".[train]"'
        sys.exit(f"error: {error}; generating from a run needs {needed}")
    sys.exit(main(sys.argv[1:]))
