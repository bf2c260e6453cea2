"""A PyTorch transformer to train beside ours, in a process of its own: what a user would pick instead.

The shape of Llama 2 at the sizes of a configuration: RMSNorm, rotary positions, causal softmax attention by
`scaled_dot_product_attention`, SwiGLU, an untied head; one product each for q, k, v and for gate and up. Float32
parameters under bfloat16 autocast, whole logits, fused AdamW, all through `torch.compile`. Rows hold random tokens, and
their documents are not kept apart. `benchmarks/train_step.py --peers torch` runs it.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from turns import serve

WARM_UP_STEPS = 3  # the first compiles


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp_dim: int, eps: float):
        """The layers of one block, without biases."""
        super().__init__()
        self.shape = heads, head_dim
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x, rotation):
        """x [B, T, E] and the rotation's cosines and sines, each [T, head_dim / 2]."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, *self.shape)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        y = functional.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x, rotation):
    """Rotary positions: the two halves of a head as a complex number times that of the token, in float32."""
    cosine, sine = rotation
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, left * sine + right * cosine), dim=-1).to(x.dtype)


class Transformer(nn.Module):
    """The loss of a row of tokens."""

    def __init__(self, model: dict[str, Any], length: int):
        """Of the sizes of `config.model`."""
        super().__init__()
        width, head_dim, vocab_size = model["d_model"], model["head_dim"], model["vocab_size"]
        sizes = width, model["num_heads"], head_dim, model["mlp_dim"], model["norm_eps"]
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(model["num_layers"]))
        self.norm, self.head = nn.RMSNorm(width, model["norm_eps"]), nn.Linear(width, vocab_size, bias=False)
        frequencies = model["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.arange(length)[:, None] * frequencies
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        """The mean cross entropy in float32, of tokens and targets [B, T]."""
        x = self.embedding(tokens).to(torch.bfloat16)
        for block in self.blocks:
            x = block(x, (self.cosine, self.sine))
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def flops_per_token(model: dict[str, Any], counted: int, length: int) -> float:
    """As train/observe/flops.py has it of a model with softmax attention; `counted` are the parameters in products."""
    return 6 * counted + 3 * model["num_layers"] * model["num_heads"] * length * 2 * model["head_dim"]


def turns(row: dict[str, Any], model: dict[str, Any], optimizer: dict[str, Any], steps: list[int]) -> Iterator[dict]:
    """The row ready, compiled, and with the figures so far after each turn of so many steps; else with a note."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        batch, length = row["batch"], row["length"]
        network = Transformer(model, length)
        rates = {"lr": optimizer["learning_rate"], "betas": (optimizer["b1"], optimizer["b2"])}
        decay = {"eps": optimizer["eps"], "weight_decay": optimizer["weight_decay"]}
        yield row
        network = network.to(device)
        adamw = torch.optim.AdamW(network.parameters(), **rates, **decay, fused=True)
        loss_of = torch.compile(network, mode=row["setting"])
        tokens = torch.randint(model["vocab_size"], (batch, length + 1), device=device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def advance() -> float:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(inputs, targets)
            loss.backward()
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            return loss.detach().item()  # waits for the device

        start = time.perf_counter()
        losses = [advance() for _ in range(WARM_UP_STEPS)]
        if device == "cuda":
            torch.cuda.synchronize()
        row |= {"compile_seconds": time.perf_counter() - start}
        yield row
        total = sum(parameter.numel() for parameter in network.parameters())
        flops, medians = flops_per_token(model, total - network.embedding.weight.numel(), length), []
        for count in steps:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                losses.append(advance())
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            medians.append(1e3 * statistics.median(times))
            yield row | {
                "device": torch.cuda.get_device_name() if device == "cuda" else device,
                "version": torch.__version__,
                "parameters": total,
                "losses": losses,
                "milliseconds_by_turn": medians,
                "flops_per_token": flops,
                "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
            }
    except Exception as error:  # Whatever a compiler or a device raises: the other runs are wanted all the same.
        while True:
            yield row | {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


if __name__ == "__main__":
    serve(turns(*json.loads(sys.argv[1])))
