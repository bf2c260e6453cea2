"""`python -m twomamba_jax.generate`: another name of `python -m train.generate`, which stands above this package.

To `import` it is the function `twomamba_jax.generate`, whose place in the package a module would take.
"""

import sys

from twomamba_jax.generation import generate

if __name__ == "__main__":
    try:
        from train.generate import main
    except ImportError as error:
        needed = 'run this in a clone of the repository, after pip install -e ".[train]"'
        print(f"error: {error}: {needed}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1:]))
sys.modules[__name__] = generate
