"""The keys of a configuration that the trainer reads: the type of each, its range, and the data sources that need it.

A configuration may have other keys besides, which mean nothing to the trainer but make another run of it.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.errors import UserError

LARGEST_COUNT = 2**31 - 1  # Steps, tokens and shapes are int32.
LARGEST_SEED = 2**63 - 1  # JAX takes a seed as an int64.
LONGEST_ROW = 2**30  # Positions of a row, its last target and padding included, are int32.
MOST_ROWS = 2**62  # Grain counts the rows of all passes in an int64.
# Layers, and the rows of a batch, are listed one by one before any array is made of them.
MOST_LAYERS = 2**16
MOST_ROWS_OF_A_BATCH = 2**20

ALL = ("corpus", "files", "huggingface", "recall")
TEXT = ("corpus", "files", "huggingface")
STORED = ("files", "huggingface")


@dataclass(frozen=True)
class Key:
    """What a value must be: of type `kind`, or None where `optional`; `least` and `most` are in the range.

    Floats are finite and in the range as float32 too, to which the optimiser and the model round them: 1 - 1e-9 is not
    below 1 there. `sources` are those of `data.source` that need the key; where it may be left out in any case, none.
    """

    kind: type
    optional: bool = False
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    sources: Collection[str] = ALL

    def check(self, name: str, value: Any) -> None:
        """Raises UserError naming `name`, its value and what it must be."""
        if value is None and self.optional:
            return
        kinds = {float: (float, int), tuple: (tuple, list)}.get(self.kind, (self.kind,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise UserError(f"{name} takes {'None or ' if self.optional else ''}{self.kind.__name__}, got {value!r}")
        if self.kind not in (int, float):
            return
        rounded = round_to_float32(value) if self.kind is float else value
        if not self._holds(rounded):
            seen = f", but is {rounded:g} in float32" if self._holds(value) else ""
            raise UserError(f"{name}={value} must be {self.range}{', or None' if self.optional else ''}{seen}")

    def _holds(self, value: float) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and (self.kind is int or abs(value) < math.inf)

    @property
    def range(self) -> str:
        """The range in words."""
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
        if self.kind is float and self.most == self.below == math.inf:
            words.append("finite")
        return " and ".join(words)


def round_to_float32(value: float) -> float:
    """The float32 nearest to `value`: infinite where that is too large, 0 where it would be subnormal, as in XLA."""
    if abs(value) > float(np.finfo(np.float32).max):
        return math.inf if value > 0 else -math.inf
    return 0.0 if abs(value) < float(np.finfo(np.float32).tiny) else float(np.float32(value))


def count(least: int = 1, most: int = LARGEST_COUNT, optional: bool = False, sources: Collection[str] = ALL) -> Key:
    """A number of something."""
    return Key(int, optional, least=least, most=most, sources=sources)


KEYS = {
    "name": Key(str),
    "size": Key(str),
    "variant": Key(str),
    "seed": count(0, LARGEST_SEED),
    "model.d_model": count(),
    "model.num_layers": count(most=MOST_LAYERS),
    "model.num_heads": count(),
    "model.head_dim": count(),
    "model.mlp_dim": count(0),
    "model.vocab_size": count(),
    "model.num_kv_heads": count(optional=True),
    "model.rope_theta": Key(float, above=0, sources=()),
    "model.norm_eps": Key(float, above=0, sources=()),
    "model.output_norm_eps": Key(float, optional=True, above=0, sources=()),
    "model.tie_embeddings": Key(bool, sources=()),
    "execution.dtype": Key(str),
    "execution.param_dtype": Key(str),
    "execution.remat": Key(str, sources=()),
    "execution.scan_layers": Key(bool, optional=True, sources=()),
    "execution.form": Key(str, optional=True, sources=()),
    "execution.implementation": Key(str, optional=True, sources=()),
    "execution.chunk_size": count(optional=True, sources=()),
    "execution.precision": Key(str, optional=True, sources=()),
    "execution.elementwise_kernels": Key(bool, sources=()),
    "execution.concurrent_kernels": Key(bool, sources=()),
    "data.source": Key(str),
    "data.root": Key(str, optional=True, sources=("corpus",)),
    "data.suffix": Key(str, sources=("corpus",)),
    "data.held_out_percent": count(0, 100, sources=TEXT),
    "data.tokenizer": Key(str, sources=TEXT),
    "data.eos_token": Key(str, optional=True, sources=TEXT),
    "data.bos_token": Key(str, optional=True, sources=TEXT),
    "data.packing": Key(str, sources=TEXT),
    "data.paths": Key(str, sources=("files",)),
    "data.held_out_paths": Key(str, optional=True, sources=("files",)),
    "data.text_key": Key(str, sources=STORED),
    "data.cache_dir": Key(str, sources=STORED),
    "data.dataset": Key(str, sources=("huggingface",)),
    "data.revision": Key(str, optional=True, sources=("huggingface",)),
    "data.subset": Key(str, optional=True, sources=("huggingface",)),
    "data.split": Key(str, sources=("huggingface",)),
    "data.held_out_split": Key(str, optional=True, sources=("huggingface",)),
    "data.streaming": Key(bool, sources=("huggingface",)),
    "data.held_out_documents": count(sources=("huggingface",)),
    "data.shuffle_rows": count(sources=("huggingface",)),
    "data.symbols": count(sources=("recall",)),
    "data.repeat": count(sources=("recall",)),
    "data.fillers": count(sources=("recall",)),
    "data.gap": Key(tuple, sources=("recall",)),
    "data.graded": Key(bool, sources=("recall",)),
    "data.train_rows": count(most=MOST_ROWS, sources=("recall",)),
    "data.held_out_rows": count(most=MOST_ROWS, sources=("recall",)),
    "steps": count(),
    "batch_size": count(most=MOST_ROWS_OF_A_BATCH),
    "length": count(most=LONGEST_ROW),
    "microbatches": count(),
    "loss_chunk_size": count(optional=True),
    # Beyond such ranges Adam makes NaN or infinity of finite gradients. A step does not look at its update for that: it
    # would be a second pass over parameters and moments, 1.3 ms of 87 for `small` by its bytes.
    "optimizer.learning_rate": Key(float, above=0, most=1e31),
    # train/schedules.py has the ranges of the learning rate's shape, which depend on one another.
    "optimizer.warmup_steps": Key(int, most=LARGEST_COUNT),
    "optimizer.schedule": Key(str),
    "optimizer.decay_steps": Key(int, optional=True, most=LARGEST_COUNT),
    "optimizer.final_fraction": Key(float),
    "optimizer.cooldown_steps": Key(int, optional=True, most=LARGEST_COUNT),
    # A mean of the past with all weight on the past, 1, never learns what it is a mean of, and Adam divides 0 by 0.
    "optimizer.b1": Key(float, least=0, below=1),
    "optimizer.b2": Key(float, least=0, below=1),
    # A parameter without a gradient (the embedding of a token that has not come yet) is 0 / (0 + eps).
    "optimizer.eps": Key(float, above=0),
    "optimizer.weight_decay": Key(float, least=0, most=1000),
    "optimizer.clip_norm": Key(float, optional=True, above=0),
    "mesh.data": Key(int),
    "mesh.fsdp": Key(int),
    "mesh.tensor": Key(int),
    "mesh.sequence": Key(int),
    "distributed.coordinator_address": Key(str, optional=True),
    "distributed.num_processes": count(optional=True),
    "distributed.process_id": count(0, optional=True),
    "distributed.timeout": count(),
    "log_every": count(),
    "eval_every": count(),
    "eval_rows": count(optional=True),
    "checkpoint_every": count(),
    "checkpoints_kept": count(),
    "skip_limit": count(),
    "log.tensorboard": Key(bool),
    "log.wandb": Key(bool),
    "log.wandb_project": Key(str),
    "profile.start": count(optional=True),
    "profile.steps": count(),
    "sample.prompt": Key(str, sources=TEXT),
    "sample.tokens": count(sources=TEXT),
    "sample.temperature": Key(float, least=0),
}


def group_of(name: str) -> str:
    """What is before the first dot of a key; a key outside of all groups is a group of its own."""
    return name.partition(".")[0]


GROUPS = tuple(dict.fromkeys(map(group_of, KEYS)))


def check_keys(flat: Mapping[str, Any], groups: Collection[str] = GROUPS) -> None:
    """Raises UserError where a flat configuration lacks a key of `groups` that is needed, or has a wrong value.

    A group that is absent as a whole is named by its name alone.
    """
    keys = {name: key for name, key in KEYS.items() if group_of(name) in groups}
    for group in groups:
        if group in flat and group not in keys:
            raise UserError(f"{group}={flat[group]!r} must be a group of keys")
    source, present = flat.get("data.source"), set(map(group_of, flat))
    needed = [name for name, key in keys.items() if key.sources == ALL or source in key.sources]
    missing = [name for name in needed if name not in flat]
    if missing:
        named = dict.fromkeys(name if group_of(name) in present else group_of(name) for name in missing)
        raise UserError(
            f"the configuration lacks {', '.join(named)}: it is for another version, or for another program; "
            "configs/base.py has every key"
        )
    for name, key in keys.items():
        if name in flat:
            key.check(name, flat[name])
