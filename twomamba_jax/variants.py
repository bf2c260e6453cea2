"""The paper's models and ablations as data: what each mixer is, and where the paper reports it.

Losses are the paper's test losses in nats per token after 90,000 steps at batch 32 on FineWeb. The size and context are
the small model's at T = 2048 unless the source says otherwise.
"""

import ast
import dataclasses
import difflib
import re
from typing import Any

from twomamba_jax.config import MixerConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """A mixer, the place in the paper that it comes from, and the paper's figure for it (None: it has none).

    Examples:
      >>> VARIANTS["2mamba"].mixer.score, VARIANTS["2mamba"].paper_loss
      ('squared', 2.62)
    """

    mixer: MixerConfig
    source: str
    paper_loss: float | None = None


# The linear model of the ablations: no normalisation of the scores, an RMSNorm of the output.
_OUTPUT_NORM = MixerConfig(score="linear", norm="output")
# Algorithms 2 and 3.
_MAMBA2 = MixerConfig(
    score="linear",
    norm="output",
    activation="silu",
    activation_on="qkv",
    conv_width=4,
    decay="discretized",
    discretize_values=True,
    dt_bias=True,
    d_residual=True,
    z_gate=True,
    scale=1.0,
)
_MAMBA2S = MixerConfig(score="linear", norm="output", conv_width=2, decay="softplus", discretize_values=True)
HALF_LIVES = 1.0, 1024.0  # tokens, from the first head to the last
_2MAMBA = MixerConfig(score="squared", norm="softmax", conv_width=2, decay="softplus")


def _change(mixer: MixerConfig, **changes) -> MixerConfig:
    return dataclasses.replace(mixer, **changes)


_2MAMBA_DT_LONG = _change(_2MAMBA, discretize_values=True, half_lives=HALF_LIVES)


VARIANTS: dict[str, Variant] = {
    # The named models.
    "softmax": Variant(MixerConfig(score="exp", norm="softmax", rope=True), "Figures 1 and 5a, 'Softmax'", 2.73),
    "linear": Variant(
        MixerConfig(score="linear", norm="softmax", activation="relu"),
        "Figures 1 and 2, Table 2, 'SM Norm + ReLU'",
        3.03,
    ),
    "mamba2": Variant(
        _MAMBA2,
        "Algorithms 2 and 3; the published Mamba-2 figures are of another implementation's layer, so it has none",
    ),
    "mamba2s": Variant(
        _MAMBA2S, "Algorithm 4, Table 3 and Figures 4 and 5a, 'Conv (w=2) + A-mask softplus + value discretize'", 2.76
    ),
    "2mamba": Variant(_2MAMBA, "Algorithm 5, Figure 6, '2Mamba', medium", 2.62),
    "2mamba-e": Variant(_change(_2MAMBA, score="exp"), "Figure 10, '2Mamba-E', medium", 2.59),
    # Their neighbours.
    "2mamba-dt": Variant(
        _change(_2MAMBA, discretize_values=True),
        "Figure 5a, 'Squared + Conv (w=2) + A mask softplus + discretize'; Figure 5b: unstable at medium",
        2.73,
    ),
    "2mamba-e-dt": Variant(
        _change(_2MAMBA, score="exp", discretize_values=True), "in the authors' code; no figure in the paper"
    ),
    "squared-output-norm": Variant(
        _change(_MAMBA2S, score="squared"), "in the authors' code (squared Mamba-2S before Section 5's norm); no figure"
    ),
    # Our own: long half-lives at first, which the state of second order has room for (docs/accuracy.md).
    "2mamba-long": Variant(_change(_2MAMBA, half_lives=HALF_LIVES), "2mamba with long half-lives; not the paper's"),
    "2mamba-dt-long": Variant(_2MAMBA_DT_LONG, "2mamba-dt with long half-lives; not the paper's"),
    "2mamba-e-long": Variant(
        _change(_2MAMBA, score="exp", half_lives=HALF_LIVES), "2mamba-e with long half-lives; not the paper's"
    ),
    "2mamba-dt-long-norm": Variant(
        _change(_2MAMBA_DT_LONG, normalize_keys=True), "2mamba-dt-long with normalised keys; not the paper's"
    ),
    **{
        f"2mamba-dt-long-k{qk_dim}": Variant(
            _change(_2MAMBA_DT_LONG, qk_dim=qk_dim),
            f"2mamba-dt-long with K = {qk_dim} for a state of {qk_dim * (qk_dim + 1) // 2} x V; not the paper's",
        )
        for qk_dim in (16, 32, 128)
    },
    # As its authors released it (state-spaces/mamba2-*, Hugging Face's Mamba2ForCausalLM).
    "mamba2-released": Variant(
        _change(_MAMBA2, qk_dim=128, qk_groups=1, d_per_head=True, z_bias=False),
        "Mamba-2 as released (arXiv 2405.21060): queries and keys of 128 that all heads share; not the paper's",
    ),
    "softmax-conv2": Variant(
        MixerConfig(score="exp", norm="softmax", rope=True, conv_width=2),
        "softmax with the convolution of 2mamba, to tell its effect from that of the decay; not the paper's",
    ),
    "memoryless": Variant(
        _change(_2MAMBA, decay="memoryless"),
        "2Mamba with its mixing cut, the floor of the recall task; not the paper's",
    ),
    # Table 1 and Figure 2: a convolution, and an activation after it, on linear attention with an output norm.
    "output-norm-relu": Variant(
        _change(_OUTPUT_NORM, activation="relu"), "Table 1 'ReLU', Table 2 and Figure 2 'Out Norm + ReLU'", 3.06
    ),
    "conv2": Variant(_change(_OUTPUT_NORM, conv_width=2), "Tables 1, 2 and 3, 'Conv (w=2)'", 2.93),
    "conv3": Variant(_change(_OUTPUT_NORM, conv_width=3), "Tables 1 and 2, 'Conv (w=3)'", 2.91),
    "conv4": Variant(_change(_OUTPUT_NORM, conv_width=4), "Table 1, 'Conv (w=4)'", 2.90),
    "conv2-silu": Variant(
        _change(_OUTPUT_NORM, conv_width=2, activation="silu"), "Tables 1 and 2, 'Conv (w=2) + SiLU'", 2.90
    ),
    "conv3-silu": Variant(_change(_OUTPUT_NORM, conv_width=3, activation="silu"), "Table 1, 'Conv (w=3) + SiLU'", 2.89),
    "conv4-silu": Variant(_change(_OUTPUT_NORM, conv_width=4, activation="silu"), "Table 1, 'Conv (w=4) + SiLU'", 2.89),
    # Table 2 and Figure 3: the other components of Mamba-2, each alone.
    "output-norm": Variant(_OUTPUT_NORM, "Table 2 and Figure 2 'Out Norm', Table 3 'Plain Linear'", 3.13),
    "d-residual": Variant(_change(_OUTPUT_NORM, d_residual=True), "Table 2 and Figure 3, 'D res'", 3.11),
    "z-gate": Variant(_change(_OUTPUT_NORM, z_gate=True), "Table 2 and Figure 3, 'Z gate'", 3.13),
    "value-dt": Variant(
        _change(_OUTPUT_NORM, discretize_values=True), "Table 2 and Figure 3, 'value discretize'", 3.06
    ),
    "decay-original": Variant(
        _change(_OUTPUT_NORM, decay="discretized"), "Table 2 and Figure 3, 'A-mask original'", 2.98
    ),
    "decay-softplus": Variant(_change(_OUTPUT_NORM, decay="softplus"), "Table 2 and Figure 3, 'A-mask softplus'", 2.88),
    # Table 3 and Figure 4: the build-up to Mamba-2S, and what adds nothing to it.
    "conv2-decay-original": Variant(
        _change(_OUTPUT_NORM, conv_width=2, decay="discretized"), "Table 3 and Figure 4a, '+ A-mask original'", 2.80
    ),
    "conv2-decay-softplus": Variant(
        _change(_OUTPUT_NORM, conv_width=2, decay="softplus"), "Table 3 and Figure 4a, '+ A-mask softplus'", 2.77
    ),
    "mamba2s-silu": Variant(_change(_MAMBA2S, activation="silu"), "Table 3 and Figure 4b, 'Mamba-2S + SiLU'", 2.76),
    "mamba2s-d-residual": Variant(
        _change(_MAMBA2S, d_residual=True), "Table 3 and Figure 4b, 'Mamba-2S + D res'", 2.76
    ),
    "mamba2s-z-gate": Variant(_change(_MAMBA2S, z_gate=True), "Table 3 and Figure 4b, 'Mamba-2S + Z gate'", 2.78),
}


def parse_pattern(pattern: str, num_layers: int) -> tuple[MixerConfig, ...]:
    """The mixer of each layer, from one line.

    `"2mamba"` is every layer. `"softmax,2mamba*,softmax"` is softmax first and last and 2mamba between: entries are
    separated by commas, `name*3` stands for three layers and `name*`, at most once, for all that are left, one or more.
    `"mamba2(qk_dim=128, conv_width=3)"` is a variant with other values of some fields of its `MixerConfig`.

    Raises:
      ValueError: an unknown variant or field (naming the nearest), a malformed entry, values that make no mixer, or a
        total that is not `num_layers`.

    Examples:
      >>> [mixer.score for mixer in parse_pattern("softmax,2mamba*,softmax", 4)]
      ['exp', 'squared', 'squared', 'exp']
      >>> parse_pattern("2mamba(conv_width=4)", 1)[0].conv_width
      4
    """
    entries = [_parse_entry(entry, pattern) for entry in _split(pattern)]
    if len(entries) == 1 and "*" not in pattern.rpartition(")")[2]:
        entries = [(entries[0][0], None)]
    fixed = sum(count for _, count in entries if count is not None)
    fills = sum(count is None for _, count in entries)
    if fills > 1:
        raise ValueError(f"pattern {pattern!r} has {fills} entries that end in '*': at most one can take what is left")
    if fixed + fills > num_layers or (not fills and fixed != num_layers):
        least = "at least " if fills else ""
        raise ValueError(f"pattern {pattern!r} names {least}{fixed + fills} layers, but the model has {num_layers}")
    mixers: list[MixerConfig] = []
    for mixer, count in entries:
        mixers.extend([mixer] * (num_layers - fixed if count is None else count))
    return tuple(mixers)


def entry_of(name: str, mixer: MixerConfig) -> str:
    """The entry of a pattern that is `mixer`: a variant, and what the mixer has of its own."""
    base = VARIANTS[name].mixer
    names = [field.name for field in dataclasses.fields(MixerConfig)]
    changes = [f"{one}={getattr(mixer, one)!r}" for one in names if getattr(mixer, one) != getattr(base, one)]
    return f"{name}({', '.join(changes)})" if changes else name


def _split(pattern: str) -> list[str]:
    """The entries of a pattern: what commas separate that are in no parentheses."""
    entries, depth = [""], 0
    for letter in pattern:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


def _parse_entry(entry: str, pattern: str) -> tuple[MixerConfig, int | None]:
    """(mixer, count) of `name`, `name*3` or `name*` (None), with or without fields in parentheses behind the name."""
    match = re.fullmatch(r"\s*([^*()]*?)\s*(?:\((.*)\))?\s*(\*\s*([1-9]\d*)?)?\s*", entry)
    if match is None:
        raise ValueError(
            f"pattern {pattern!r}: {entry!r} is no entry; expected name, name*COUNT or name*, or name(field=value, ...)"
        )
    name, fields, star, count = match.groups()
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0)
        raise ValueError(f"unknown variant {name!r}: did you mean {near[0]!r}? All: {', '.join(VARIANTS)}")
    mixer = VARIANTS[name].mixer
    if fields is not None:
        values = _parse_fields(fields, entry)
        try:
            mixer = dataclasses.replace(mixer, **values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.strip()!r}: {error}") from error
    return mixer, int(count) if count else None if star else 1


def _parse_fields(text: str, entry: str) -> dict[str, Any]:
    """The fields of `field=value, ...`, values as Python writes them."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.keywords) or call.args:
            raise ValueError("these are no fields with values")
        values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(values) < len(call.keywords):
            raise ValueError("a field has two values")
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"{entry.strip()!r}: expected field=value, ... with numbers, 'texts', True, False or None"
        ) from error
    known = [field.name for field in dataclasses.fields(MixerConfig)]
    for field in values:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0)
            raise ValueError(f"{entry.strip()!r}: unknown field {field!r}: did you mean {near[0]!r}?")
    return values
