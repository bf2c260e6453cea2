"""Log likelihoods of continuations, and greedy continuations, of many prompts: what an evaluation asks of a model.

Prompts go in rows of equal padded length, and each is read once: its cache serves all its continuations. The shape that
a request is computed in depends on the request alone, so others beside it change no more than its row.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twomamba_jax.generation import Decoding, decode, prefill
from twomamba_jax.layers import LanguageModel, init_cache

SHORTEST = 8  # the least padded length: powers of two from here are few shapes
BLOCK = 16  # tokens between two looks for a stop string

Pair = tuple[Sequence[int], Sequence[int]]


def padded(length: int) -> int:
    """The power of two that `length` is padded to."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


class Scorer:
    """Scores and continues token sequences with one model."""

    def __init__(self, model: LanguageModel, params: Any, tokenizer: Any, rows: int = 8, max_length: int = 2048):
        """`rows` are computed together; of a request the last `max_length` tokens count."""
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.rows, self.max_length = rows, max_length

    @property
    def prefix(self) -> list[int]:
        """What stands before a text: the token that opens a document, or the end of the one before."""
        tokenizer = self.tokenizer
        return [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """The tokens of both, cut where those of the context end; white space between them is the continuation's."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before, whole = self.tokenizer.encode(context), self.tokenizer.encode(context + continuation)
        return [*self.prefix, *before.tolist()], whole[len(before) :].tolist()

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) log p(continuation | context), in nats, and whether greedy decoding gives it.

        A context has at least one token. An empty continuation has (0, True).
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        groups: dict[tuple[int, int], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, (context, continuation) in enumerate(pairs):
            if continuation:
                kept = tuple(context[-max(1, self.max_length - len(continuation)) :])
                groups[padded(len(kept)), padded(len(continuation))][kept].append(number)
        for (size, more), contexts in sorted(groups.items(), reverse=True):  # the longest first: memory ends it early
            for batch in _batches(list(contexts), self.rows):
                start = self._read(batch, size, size + more)
                waiting = [list(contexts[context]) for context in batch]
                while any(waiting):
                    numbers = [row.pop() if row else None for row in waiting]
                    rows = [() if number is None else pairs[number][1] for number in numbers]
                    tokens, lengths = self._pad(rows, more)
                    sums, greedy = _score(self.model, self.params, start.cache, start.logits, tokens, lengths)
                    for number, total, same in zip(numbers, np.asarray(sums).tolist(), np.asarray(greedy).tolist()):
                        if number is not None:
                            results[number] = total, same
        return results

    def rolling(self, tokens: Sequence[int]) -> float:
        """log p(tokens), each predicted once, from windows of `max_length`: the last reaches as far back as it can."""
        whole, size, pairs = [*self.prefix, *tokens], self.max_length, []
        for start in range(1, len(whole), size):
            end = min(start + size, len(whole))
            pairs.append((whole[max(0, end - size - 1) : start], whole[start:end]))
        scorer = Scorer(self.model, self.params, self.tokenizer, self.rows, size + 1)
        return sum(total for total, _ in scorer.loglikelihoods(pairs))

    def continuations(self, contexts: Sequence[Sequence[int]], until: Sequence[str], max_tokens: int) -> list[str]:
        """The greedy text behind each context, up to a string of `until`, an end of document, or `max_tokens`."""
        results = [""] * len(contexts)
        groups: dict[int, list[int]] = defaultdict(list)
        for number, context in enumerate(contexts):
            groups[padded(min(len(context), self.max_length))].append(number)
        for size, numbers in sorted(groups.items(), reverse=True):
            for batch in _batches(numbers, self.rows):
                texts = self._continue(
                    [contexts[number][-self.max_length :] for number in batch], size, until, max_tokens
                )
                for number, text in zip(batch, texts):
                    results[number] = text
        return results

    def _continue(self, batch, size, until, max_tokens) -> list[str]:
        state = self._read(batch, size, size + -(-max_tokens // BLOCK) * BLOCK)
        ids: list[list[int]] = [[] for _ in batch]
        texts, open_rows = [""] * len(batch), set(range(len(batch)))
        for start in range(0, max_tokens, BLOCK):
            done = np.array([row not in open_rows for row in range(self.rows)])
            state = state._replace(done=jnp.asarray(done) | state.done)
            new, state = decode(self.model, self.params, state, BLOCK, stop_tokens=(self.tokenizer.eos_id,))
            tokens, lengths, ended = (np.asarray(array) for array in (new.tokens, new.lengths, state.done))
            for row in sorted(open_rows):
                ids[row] += tokens[row, : min(lengths[row], max_tokens - start)].tolist()
                text = self.tokenizer.decode(ids[row])
                cuts = [text.find(stop) for stop in until if stop and stop in text]
                texts[row] = text[: min(cuts)] if cuts else text
                if cuts or ended[row]:
                    open_rows.discard(row)
            if not open_rows:
                break
        return texts

    def _read(self, batch: Sequence[Sequence[int]], size: int, capacity: int) -> Decoding:
        """The cache after each context, and the logits behind it; rows without one read a token."""
        tokens, lengths = self._pad([*batch, *[self.prefix] * (self.rows - len(batch))], size)
        cache = init_cache(self.model.config, self.rows, capacity, dtype=self.model.execution.dtype)
        return prefill(self.model, self.params, tokens, cache, lengths=lengths)

    def _pad(self, rows: Sequence[Sequence[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = np.zeros((self.rows, size), np.int32), np.zeros(self.rows, np.int32)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return tokens, lengths


def _batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, cache, logits, tokens, lengths):
    """Sums [B] of the log likelihoods of tokens [B, T] behind a cache with `logits` [B, vocab]; are all greedy?"""
    more, _ = model.apply({"params": params}, tokens, cache=cache, lengths=lengths)
    logits = jnp.concatenate([logits[:, None], more[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    counts = jnp.arange(tokens.shape[1]) < lengths[:, None]
    greedy = (jnp.argmax(logits, axis=-1) == tokens) | ~counts
    return jnp.sum(jnp.where(counts, chosen, 0), axis=1), greedy.all(axis=1)
