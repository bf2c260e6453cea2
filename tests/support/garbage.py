"""Python's garbage collector, for programs that do little but trace and compile."""

import gc


def collect_less():
    """Leaves what there is out of collections from now on, and has fewer of them.

    Tracing allocates much and leaves few cycles: looking for them takes a sixth of such a program's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
