"""Settings for every test."""

import jax

# Nearly all of the suite's time is compilation. This turns off LLVM's optimisation of what is compiled (as JAX's own
# tests do), which halves it; the programs that the command-line tests start in processes of their own are optimised.
jax.config.update("jax_disable_most_optimizations", True)
