"""Puts the clone's root on the path when it is imported: `train` and `configs` are in no wheel."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
