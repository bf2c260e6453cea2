"""The caches of a layer run in the loop over them, which only reads them.

What goes into that loop layer by layer may be copied. So finite scores' caches are read in their stack, where they lie.
"""

from twomamba_jax.layers.cache import MixerCache
from twomamba_jax.ops.decoding.recurrent_cache import RecurrentCache
from twomamba_jax.ops.state import KeyValueCache


def detach(cache: MixerCache) -> tuple[MixerCache, RecurrentCache | None]:
    """A stack of caches in two parts: what a layer takes its own of, and a finite score's, which all layers read."""
    attention = cache.attention
    if isinstance(attention, KeyValueCache):
        return cache, None
    return cache._replace(attention=None), attention._replace(previous=None)


def attach(cache: MixerCache | None, stack: RecurrentCache | None, layer):
    """One layer's part of what `detach` made, as the mixer's `cache` and `layer`."""
    return (cache, None) if stack is None else (cache._replace(attention=stack), layer)
