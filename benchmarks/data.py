"""Speed of the input pipeline on this machine's cores: `python benchmarks/data.py --tokenizer bytes bpe`.

Text of the size asked for, made of the default corpus over and over with numbers changed, as JSON lines, is tokenised
and packed into the cache, opened again, and read as batches of `configs/2mamba.py:small`. `bpe` is a tokenizer.json of
32,000 tokens trained on the default corpus. Prints a Markdown table; the last column is the pipeline's time for a token
over that of a training step at --step_tokens_per_second.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import clone  # noqa: F401
import tokenizers

from train.configuration import apply_overrides, load_config
from train.data.corpus import read_corpus
from train.data.rows import training_batches
from train.data.task import make_task

COLUMNS = (
    "tokenizer", "packing", "text, MB", "tokens", "tokenise and pack, s", "MB/s", "open again, s", "batches, tokens/s",
    "of a step, %",
)  # fmt: skip


def write_text(path: Path, megabytes: float) -> None:
    """JSON lines of documents, one a line, `megabytes` million bytes of text."""
    texts = [bytes(document).decode("utf-8", "replace") for document in read_corpus(None, ".py", 5).train]
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while True:
            for text in texts:
                text = text.replace("0", str(copy)) + f"# {copy}\n"
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= megabytes * 1e6:
                    return
            copy += 1


def train_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE of `vocab_size` tokens, as a tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = (bytes(document).decode("utf-8", "replace") for document in read_corpus(None, ".py", 5).train)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def measure(root: Path, tokenizer: str, packing: str, batches: int) -> list[str]:
    """The cells of a row up to the speed of the batches."""
    config = load_config("configs/2mamba.py:small")
    spec = tokenizer if tokenizer == "bytes" else str(root / "bpe.json")
    settings = {"source": "files", "paths": root / "text.jsonl", "cache_dir": root / tokenizer, "tokenizer": spec}
    settings["packing"] = packing
    apply_overrides(config, [(f"data.{key}", str(value)) for key, value in settings.items()])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        task = make_task(config, lambda _: None)
        seconds.append(time.perf_counter() - start)
    iterator = training_batches(task.train, config.batch_size, config.seed)
    for _ in range(batches // 10 + 1):  # what was read ahead is not the pipeline's speed
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    rate = batches * config.batch_size * config.length / (time.perf_counter() - start)
    iterator.close()
    size, tokens = ((task.identity[f"train_{key}"] + task.identity[f"held_out_{key}"]) for key in ("bytes", "tokens"))
    made, opened = seconds
    cells = [f"{size / 1e6:,.0f}", f"{tokens:,}", f"{made:.1f}", f"{size / 1e6 / made:.1f}", f"{opened:.2f}"]
    return [tokenizer, packing, *cells, f"{rate:,.0f}"]


def main(arguments: Sequence[str]) -> int:
    """Measures and prints. The first row of a tokenizer makes the cache, so only it has that time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--tokenizer", nargs="+", choices=("bytes", "bpe"), default=["bytes", "bpe"])
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batches", type=int, default=500, help="batches that are timed")
    parser.add_argument("--step_tokens_per_second", type=float, default=100_090, help="see docs/kernels.md")
    options = parser.parse_args(arguments)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("grain", "tokenizers", "numpy"))
    print(f"{os.cpu_count()} cores, {versions}\n\n| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_text(root / "text.jsonl", options.megabytes)
        if "bpe" in options.tokenizer:
            train_tokenizer(root / "bpe.json", options.vocab_size)
        for tokenizer in options.tokenizer:
            for packing in ("packed", "documents"):
                cells = measure(root, tokenizer, packing, options.batches)
                if packing != "packed":
                    cells[4:6] = "", ""
                rate = float(cells[-1].replace(",", ""))
                print(f"| {' | '.join(cells)} | {100 * options.step_tokens_per_second / rate:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
