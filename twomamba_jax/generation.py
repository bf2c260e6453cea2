"""Generation from a language model: a prefill and a decode loop, each one jitted program."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from twomamba_jax.layers import Cache, LanguageModel, init_cache
from twomamba_jax.layers.layer_parameters import stack_layers, unstack_layers
from twomamba_jax.layers.tokens import as_tokens
from twomamba_jax.ops.decoding.cached_attention import FOLD_SIZE
from twomamba_jax.ops.integers import Integer, checked_integer
from twomamba_jax.ops.known import known
from twomamba_jax.sampling import GREEDY, Number, Sampling, check_sampling, sample
from twomamba_jax.shapes import AnyArray, Array, Bool, Float, Int, Lengths, Tokens


class Generation(NamedTuple):
    """New tokens [B, N], of which the first `lengths [B]` count (a stop token among them; zeros after it).

    Examples:
      >>> generation = generate(model, params, tokens, max_new_tokens=5)
      >>> generation.tokens.shape, generation.lengths.tolist()
      ((1, 5), [5])
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]


class Decoding(NamedTuple):
    """A generation between two tokens: what `prefill` starts, `decode` goes on with, and a caller may copy.

    `logits` are those of the next token, `keys` one `jax.random.key` per row, `count` the tokens generated so far, and
    `done` the rows that have met a stop token.

    Examples:
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> start.logits.shape, start.count.item(), start.done.tolist()
      ((1, 16), 0, [False])
    """

    cache: Cache
    logits: Float[Array, "B vocab"]
    keys: jax.Array
    count: Int[Array, ""]
    done: Bool[Array, "B"]


def generate(
    model: LanguageModel,
    params,
    tokens: Tokens | Sequence[Sequence[Integer]],
    *,
    max_new_tokens: Integer,
    lengths: Lengths | Sequence[Integer] | None = None,
    temperature: Number = 0.0,
    top_k: Integer | None = None,
    top_p: Number | None = None,
    stop_tokens: Sequence[Integer] | Int[AnyArray, "n"] = (),
    num_samples: Integer = 1,
    rng: AnyArray | None = None,
    prefill_size: Integer | None = None,
    fold_size: Integer = FOLD_SIZE,
    state_dtype=jnp.float32,
) -> Generation:
    """Continues each row of `tokens` by up to `max_new_tokens` tokens.

    The prompt is read in one call or in pieces (`prefill`), then a loop of single tokens runs on its cache (`decode`)
    until every row has met a stop token. Two programs are compiled, once per model, shapes, `top_k` and whether there
    is a `top_p`; temperatures, keys and stop tokens are values. A row's tokens depend on its prompt and key alone.

    Args:
      model: the model.
      params: its parameters.
      tokens: prompts [B, T], T >= 1, an array or lists; right-padded, with anything, where they differ in length.
      max_new_tokens: N >= 1.
      lengths: [B], the tokens that count in each prompt, 1 to T; None: all.
      temperature: 0 takes the likeliest token, above that samples from softmax(logits / temperature).
      top_k: samples from that many of the likeliest tokens only.
      top_p: samples from the fewest likeliest tokens whose probabilities sum to at least this, in (0, 1].
      stop_tokens: tokens that end a row. Their number is part of the program.
      num_samples: continuations of each prompt, which is read once. Row b * num_samples + s of the result is sample s
        of prompt b.
      rng: a `jax.random.key` or `PRNGKey`, from which row i draws by `fold_in(rng, i)`, or one key for each row of the
        result; needed by a temperature above 0.
      prefill_size: tokens of the prompt read at a time, for prompts whose activations do not fit; None: all.
      fold_size: as in `init_cache`.
      state_dtype: as in `init_cache`.

    Returns:
      `Generation`: tokens [B * num_samples, N] int32, and how many of them count.

    Raises:
      ValueError: an empty prompt, a token that the model does not have, numbers out of range, a temperature above 0, or
        traced by JAX, without `rng`.

    Examples:
      >>> generation = generate(model, params, [[1, 2, 3, 4]], max_new_tokens=5, temperature=0.8, rng=jax.random.key(1))
      >>> generation.tokens.shape
      (1, 5)
    """
    tokens, _, lengths = as_tokens(tokens, model.config.vocab_size, lengths=lengths, shortest=1)
    max_new_tokens = checked_integer("max_new_tokens", max_new_tokens)
    num_samples = checked_integer("num_samples", num_samples)
    sampling = check_sampling(Sampling(temperature, top_k, top_p), model.config.vocab_size)
    if rng is None and not (known(sampling.temperature) and sampling.temperature == 0):
        raise ValueError(
            f"temperature={sampling.temperature} samples and needs a random key: pass rng=jax.random.key(seed)"
        )
    batch, size = tokens.shape
    rng = check_keys(jax.random.key(0) if rng is None else rng, batch * num_samples)
    options = {"fold_size": fold_size, "dtype": model.execution.dtype, "state_dtype": state_dtype}
    cache = init_cache(model.config, batch, size + max_new_tokens, **options)
    start = prefill(model, params, tokens, cache, lengths=lengths, prefill_size=prefill_size)
    start = seed(fork(start, num_samples), rng)
    return decode(model, params, start, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens)[0]


def seed(decoding: Decoding, rng: AnyArray) -> Decoding:
    """The decoding with a key of its own for each row: `rng [rows]`, or `fold_in(rng, row)` of a single key.

    Raises ValueError for what are no keys, or not as many.

    Examples:
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> start = seed(start, jax.random.key(1))  # what a temperature above 0 then draws from
    """
    return decoding._replace(keys=_keys_beside(check_keys(rng, decoding.done.shape[0]), decoding.done))


@functools.partial(jax.jit, keep_unused=True)
def _keys_beside(rng: AnyArray, done: jax.Array) -> jax.Array:
    """`row_keys`, bound to a device if `done` is: for arrays of both kinds `decode` would be compiled once more."""
    return row_keys(rng, done.shape[0])


def row_keys(rng: AnyArray, rows: int) -> jax.Array:
    """Keys [rows]: `rng` itself if it is that already, else `fold_in(rng, row)` for each row. Raises ValueError."""
    rng = check_keys(rng, rows)
    if rng.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(rows))
    return rng[jnp.arange(rows)]  # a copy: what `decode` is given is donated


def check_keys(rng, rows: int) -> jax.Array:
    """One key or `rows` keys, with a key's dtype: those of `jax.random.PRNGKey` are words. Raises ValueError."""
    dtype = getattr(rng, "dtype", None)
    if dtype == jnp.uint32 and rng.ndim > 0 and rng.shape[-1:] == _words():
        rng = jax.random.wrap_key_data(jnp.asarray(rng))
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        found = type(rng).__name__ if dtype is None else f"{dtype} {rng.shape}"
        raise ValueError(f"rng must be made by jax.random.key(seed) or jax.random.PRNGKey(seed), got {found}")
    if rng.shape not in ((), (rows,)):
        raise ValueError(f"rng must be one key, or {rows} keys, one for each row of the result; got {rng.shape}")
    return rng


def _words() -> tuple[int, ...]:
    """The shape of a key's words, by the generator that is set."""
    return jax.eval_shape(jax.random.PRNGKey, 0).shape


def prefill(
    model: LanguageModel,
    params,
    tokens: Tokens | Sequence[Sequence[Integer]],
    cache: Cache,
    *,
    lengths: Lengths | Sequence[Integer] | None = None,
    prefill_size: Integer | None = None,
) -> Decoding:
    """Reads prompts into an empty cache, which is donated; `prefill_size` tokens at a time.

    Args:
      model: the model.
      params: its parameters.
      tokens: prompts [B, T], right-padded.
      cache: from `init_cache`, with room for T tokens.
      lengths: [B], the tokens that count; None: all.
      prefill_size: tokens of a piece; None: T.

    Returns:
      `Decoding` with keys of seed 0.

    Examples:
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> start.cache.position.tolist()
      [4]
    """
    prefill_size = checked_integer("prefill_size", prefill_size, or_none=True)
    return prefill_pieces(model, params, tokens, cache, lengths, prefill_size, _rules())


def _rules() -> tuple:
    """The logical axis rules that a trace would read: JAX does not see that they have changed, nor that it should."""
    return tuple(nn.get_logical_axis_rules())


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=3)
def prefill_pieces(model, params, tokens, cache, lengths, prefill_size, rules) -> Decoding:
    """`prefill` as the program that it is; `rules` are those that it is traced under."""
    batch, size = tokens.shape
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    apply = functools.partial(model.apply, {"params": params}, last_only=True)
    if prefill_size is None or prefill_size >= size:
        logits, cache = apply(tokens, cache=cache, lengths=lengths, cache_is_empty=True)
        logits = logits[:, 0]
    else:
        count = -(-size // prefill_size)
        pieces = jnp.pad(tokens, ((0, 0), (0, count * prefill_size - size))).reshape(batch, count, prefill_size)

        def read(carry, piece):
            cache, logits = carry
            tokens, start = piece
            new, cache = apply(tokens, cache=cache, lengths=jnp.clip(lengths - start, 0, prefill_size))
            ends = (start < lengths) & (lengths <= start + prefill_size)
            return (cache, jnp.where(ends[:, None], new[:, 0], logits)), None

        first = jnp.zeros((batch, model.config.vocab_size), jnp.promote_types(model.execution.dtype, jnp.float32))
        starts = jnp.arange(count) * prefill_size
        (cache, logits), _ = jax.lax.scan(read, (cache, first), (jnp.moveaxis(pieces, 1, 0), starts))
    keys = row_keys(jax.random.key(0), batch)
    return Decoding(cache, logits, keys, jnp.int32(0), jnp.zeros((batch,), bool))


def fork(decoding: Decoding, copies: Integer) -> Decoding:
    """Every row `copies` times, one after the other; random keys are repeated too.

    Examples:
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> fork(start, 3).cache.position.tolist()
      [4, 4, 4]
    """
    if copies == 1:
        return decoding

    def repeat(x, axis):
        return jnp.repeat(x, copies, axis=axis)

    cache = decoding.cache
    rows = cache.position, cache.rollback_left, decoding.logits, decoding.keys, decoding.done
    position, left, logits, keys, done = jax.tree.map(lambda x: repeat(x, 0), rows)
    layers = jax.tree.map(lambda x: repeat(x, 1), cache.layers)  # layers come first in a stack
    cache = Cache(layers, position, left, cache.rollback_limit)
    return Decoding(cache, logits, keys, decoding.count, done)


def decode(
    model: LanguageModel,
    params,
    decoding: Decoding,
    num_tokens: Integer,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[Integer] | Int[AnyArray, "n"] = (),
) -> tuple[Generation, Decoding]:
    """Up to `num_tokens` more tokens of every row that is not done, and where to go on; `decoding` is donated.

    The token that a row draws when `count` have been generated depends on its logits and `fold_in(key, count)` alone,
    so that a generation in pieces is the generation in one. It ends early when all rows are done.

    Examples:
      >>> start = prefill(model, params, tokens, init_cache(config, batch=1, max_length=9))
      >>> generation, decoding = decode(model, params, start, 5)
      >>> generation.tokens.shape, decoding.count.item()
      ((1, 5), 5)
    """
    temperature, top_k, top_p = sampling
    stops = jnp.ravel(jnp.asarray(stop_tokens, jnp.int32))
    return decode_loop(model, params, decoding, num_tokens, temperature, top_k, top_p, stops, _rules())


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 8), donate_argnums=2)
def decode_loop(model, params, decoding, num_tokens, temperature, top_k, top_p, stop_tokens, rules):
    """`decode` as the program that it is: `stop_tokens` int32 [n]; `rules` are those that it is traced under.

    `model`, `num_tokens`, `top_k` and `rules` are static.
    """
    rows = decoding.done.shape[0]
    scan_layers = model.execution.scan_layers
    if scan_layers is None:
        scan_layers = jax.default_backend() != "gpu"
    if not scan_layers:
        model = model.clone(execution=dataclasses.replace(model.execution, scan_layers=False))
        params = unstack_layers(model.config, params)

    def goes_on(carry):
        index, decoding, _ = carry
        return (index < num_tokens) & ~decoding.done.all()

    def step(carry):
        index, decoding, (tokens, lengths) = carry
        cache, logits, keys, count, done = decoding
        drawn = sample(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count), logits, temperature, top_k, top_p)
        drawn = jnp.where(done, 0, drawn)
        active = (~done).astype(jnp.int32)
        variables = {"params": params if scan_layers else stack_layers(params)}
        logits, cache = model.apply(variables, drawn[:, None], cache=cache, lengths=active)
        done = done | (drawn[:, None] == stop_tokens[None]).any(-1)
        generation = Generation(tokens.at[:, index].set(drawn), lengths + active)
        return index + 1, Decoding(cache, logits[:, 0], keys, count + 1, done), generation

    empty = Generation(jnp.zeros((rows, num_tokens), jnp.int32), jnp.zeros((rows,), jnp.int32))
    _, decoding, generation = jax.lax.while_loop(goes_on, step, (jnp.int32(0), decoding, empty))
    return generation, decoding
