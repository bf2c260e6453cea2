"""Whether to run all that could be run: `TWOMAMBA_EXHAUSTIVE=1 pytest`.

Without it, where cases differ little, those run that meet every part once: the suite has ten minutes on two cores.
"""

import os

import pytest

EXHAUSTIVE = bool(os.environ.get("TWOMAMBA_EXHAUSTIVE"))


def exhaustive(kept: str) -> pytest.MarkDecorator:
    """Marks a test of exhaustive runs alone; `kept` says which tests show the same, or its parts, in every run."""
    return pytest.mark.skipif(not EXHAUSTIVE, reason=f"exhaustive runs only; in every run: {kept}")
