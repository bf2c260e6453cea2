"""The caches of a run of equal layers in the loop over them, which only reads them.

What goes into that loop layer by layer may be copied. So the large states are read in their stack, where they lie.
"""

from twomamba_jax.layers.cache import MixerCache
from twomamba_jax.ops.attention_cache import AttentionCache
from twomamba_jax.ops.state import FiniteState, LayerState


def detach(cache: MixerCache) -> tuple[MixerCache, FiniteState | None]:
    """A stack of caches without its large states, and those of a finite score, for layers that only read them."""
    attention = cache.attention
    if isinstance(attention, AttentionCache):
        return cache, None
    return cache._replace(attention=attention._replace(state=None, previous=None)), attention.state


def attach(cache: MixerCache, states: FiniteState | None, layer) -> MixerCache:
    """One layer's part of what `detach` made, whole again for the mixer."""
    if states is None:
        return cache
    return cache._replace(attention=cache.attention._replace(state=LayerState(states, layer)))
