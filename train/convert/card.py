"""The model card of an export: what the model is, what it was trained on, and its held-out figures."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train.observe.metrics import read_metrics


def model_card(workdir: Path, config: ConfigDict, count: int, step: int, layout: str) -> str:
    """README.md of the checkpoint of `step`, with `count` parameters."""
    corpus = json.loads((workdir / "corpus.json").read_text(encoding="utf-8"))
    model, data = config.model, config.data
    records = read_metrics(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    figures = next((record for record in records if record["step"] == step and "eval/loss" in record), None)
    lines = [
        f"# {config.name}-{config.size}",
        "",
        f"A language model of twomamba-jax, variant `{config.variant}` (2Mamba, arXiv 2602.17363).",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count:,} |",
        f"| layers, d_model, mlp | {model.num_layers}, {model.d_model}, {model.mlp_dim} |",
        f"| heads x dim | {model.num_heads} x {model.head_dim}, {_heads(model)} of keys and values |",
        f"| vocabulary | {model.vocab_size:,} |",
        f"| tokenizer | {Path(str(data.get('tokenizer', 'none'))).name}, digest `{corpus.get('tokenizer')}` |",
        f"| steps, batch, length | {step:,}, {config.batch_size}, {config.length} |",
        f"| data | {_data(config, corpus)} |",
        f"| layout | {layout} |",
        "",
        "Held-out figures, nats a token:",
        "",
    ]
    if figures is None:
        lines.append("none was measured at this step.")
    else:
        shown = {key: value for key, value in figures.items() if key.startswith("eval/") and value is not None}
        lines += ["| figure | value |", "|---|---:|", *(f"| {key} | {value:.6g} |" for key, value in shown.items())]
    return "\n".join([*lines, ""])


def _heads(model: ConfigDict) -> int:
    return model.num_heads if model.num_kv_heads is None else model.num_kv_heads


def _data(config: ConfigDict, corpus: dict[str, Any]) -> str:
    if "imported" in corpus:
        return f"imported from `{corpus['imported']['directory']}`, of which nothing more is known"
    return f"`{config.data.source}`, digest `{corpus.get('digest')}`"
