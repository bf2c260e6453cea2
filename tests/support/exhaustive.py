"""Whether to run all that could be run: `TWOMAMBA_EXHAUSTIVE=1 pytest`.

Without it, where cases differ little, those run that meet every part once: the suite has ten minutes on two cores.
"""

import os

EXHAUSTIVE = bool(os.environ.get("TWOMAMBA_EXHAUSTIVE"))
