"""What every configuration shares: the sizes, the paper's optimiser and schedule, the default corpus.

`nano` is made for two CPU cores and `lab` for minutes of one GPU (benchmarks/ladder.py); both have schedules of their
own. `small` and `medium` are the paper's (Appendix B):
AdamW (0.9, 0.999), eps 1e-7, weight decay 0.01 on every parameter, learning rate 1e-4, 10,000 steps of linear warm-up
from 0, then linear decay to 0 at step 1,000,000 of which the run makes the first 100,000, with 32 rows of 2048 tokens.
Their vocabulary has the paper's 32,000 entries: the default corpus is made of bytes and leaves most of them unused.
`large` is no model of the paper's: their shape and schedule at 1.1 B parameters, for many devices (docs/sharding.md).

A value given by `optional` may also be None on the command line.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

SIZES = {
    "nano": {"d_model": 128, "num_layers": 4, "num_heads": 2, "head_dim": 64, "mlp_dim": 256, "vocab_size": 512},
    "lab": {"d_model": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, "mlp_dim": 1024, "vocab_size": 512},
    "small": {"d_model": 1024, "num_layers": 20, "num_heads": 16, "head_dim": 64, "mlp_dim": 2048, "vocab_size": 32000},
    "medium": {
        "d_model": 1536,
        "num_layers": 27,
        "num_heads": 24,
        "head_dim": 64,
        "mlp_dim": 3072,
        "vocab_size": 32000,
    },
    "large": {"d_model": 2048, "num_layers": 24, "num_heads": 32, "head_dim": 64, "mlp_dim": 4096, "vocab_size": 32000},
}


def optional(kind: type, value: Any = None) -> FieldReference:
    """A value of type `kind` that may also be None."""
    return FieldReference(value, field_type=kind)


def get_config(name: str, variant: str, size: str) -> ConfigDict:
    """The configuration of run `name`: `variant` in `size`. Raises ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    config = ConfigDict()
    config.name = name
    config.size = size
    config.variant = variant  # one name for all layers, or a pattern (twomamba_jax.parse_pattern)
    config.seed = 0

    config.model = ConfigDict(SIZES[size])
    config.model.num_kv_heads = optional(int)  # None: as many as query heads
    config.model.rope_theta = 10000.0
    config.model.norm_eps = 1e-5
    config.model.output_norm_eps = optional(float)  # of the mixers' output norm; None: norm_eps
    config.model.tie_embeddings = False  # True: the head is the transposed embedding

    config.execution = ConfigDict()
    config.execution.dtype = "bfloat16"
    config.execution.param_dtype = "float32"
    config.execution.remat = "dots"  # or "none", "states", "full": what is computed again in the backward pass
    config.execution.scan_layers = optional(bool)  # whether layers run in a loop; None: train/layer_loop.py decides
    config.execution.form = optional(str)
    config.execution.implementation = optional(str)
    config.execution.chunk_size = optional(int)
    config.execution.precision = optional(str)
    config.execution.elementwise_kernels = True  # of norms, convolutions and MLPs, on Hopper (docs/training.md)
    config.execution.concurrent_kernels = False  # some at the same time, for memory (docs/training.md)

    config.data = ConfigDict()
    config.data.source = "corpus"
    config.data.root = optional(str)  # None: the source of Python's own standard library
    config.data.suffix = ".py"
    config.data.held_out_percent = 5
    config.data.tokenizer = "bytes"  # or the path of a tokenizer.json or a SentencePiece .model
    config.data.eos_token = optional(str)  # of a tokenizer.json: what closes a document; None: a known name in it
    config.data.bos_token = optional(str)  # and what opens one
    config.data.packing = "packed"  # or "documents": one a row, as the paper did, cut off at `length`
    # source "files": files, directories and patterns, separated by commas
    config.data.paths = ""
    config.data.held_out_paths = optional(str)  # None: held_out_percent of the documents of `paths`, or of a single one
    config.data.text_key = "text"  # where JSON lines, Parquet and Arrow have the text
    config.data.cache_dir = "runs/tokens"
    # source "huggingface": a directory, or a dataset of the Hub with the commit as its revision
    config.data.dataset = ""
    config.data.revision = optional(str)
    config.data.subset = optional(str)
    config.data.split = "train"
    config.data.held_out_split = optional(str)  # None: held_out_percent of the documents of `split`
    config.data.streaming = False  # True: packed as it comes, no cache
    config.data.held_out_documents = 1000  # of a stream: its first
    config.data.shuffle_rows = 1024  # of a stream: rows that are shuffled with one another

    config.steps = 100_000
    config.batch_size = 32
    config.length = 2048
    config.microbatches = 1  # that a batch is cut into, one after the other; the result is the whole batch's
    config.loss_chunk_size = optional(int)  # tokens whose logits a device holds at once; None: from the vocabulary

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "linear"  # or "cosine", "wsd": how the learning rate falls (train/schedules.py)
    config.optimizer.decay_steps = optional(int, 1_000_000)  # where the learning rate ends; None: at `steps`
    config.optimizer.final_fraction = 0.0  # of the peak: the learning rate at its end
    config.optimizer.cooldown_steps = optional(int)  # of "wsd": the last steps, in which it falls
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-7
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = optional(float)

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})  # -1: the devices that are left
    # Several processes (docs/sharding.md). All None: SLURM and Open MPI are detected, else there is one process.
    config.distributed = ConfigDict()
    config.distributed.coordinator_address = optional(str)  # HOST:PORT of process 0
    config.distributed.num_processes = optional(int)
    config.distributed.process_id = optional(int)
    config.distributed.timeout = 300  # seconds for all processes to come

    config.log_every = 100
    config.eval_every = 1000
    config.eval_rows = optional(int, 1024)  # spread evenly over the held-out split; None: all of it
    config.checkpoint_every = 1000
    config.checkpoints_kept = 3  # the last; the best held-out one is kept besides
    config.skip_limit = 10  # so many steps in a row with a loss or gradient that is not finite end the run

    config.log = ConfigDict({"tensorboard": False, "wandb": False, "wandb_project": "twomamba"})
    config.profile = ConfigDict({"start": optional(int), "steps": 5})  # steps under JAX's profiler

    config.sample = ConfigDict({"prompt": "def ", "tokens": 256, "temperature": 0.7})

    if size == "nano":
        config.execution.dtype = "float32"
        # Without it XLA's scratch memory is four times as large, and two CPU cores spend a third of each step on the
        # page faults of that (measured: 186 against 149 microseconds of CPU time a token).
        config.execution.remat = "full"
        config.steps = 800
        config.batch_size = 8
        config.length = 256
        config.optimizer.learning_rate = 3e-3
        config.optimizer.warmup_steps = 100
        config.optimizer.decay_steps = None
        config.optimizer.clip_norm = 1.0
        config.log_every = 20
        config.eval_every = 200
        config.eval_rows = 512
        config.checkpoint_every = 200
    if size == "lab":
        config.steps = 1200
        config.batch_size = 16
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 150
        config.optimizer.schedule = "cosine"
        config.optimizer.decay_steps = None
        config.optimizer.clip_norm = 1.0
        config.log_every = 50
        config.eval_every = 400
        config.eval_rows = None
        config.checkpoint_every = 400
    return config
