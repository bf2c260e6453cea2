"""Calls of the chunked kernels for their tests: random arrays, and what an implementation makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from support import oracle

from twomamba_jax import decay_attention
from twomamba_jax.ops.score import num_features
from twomamba_jax.ops.state import FiniteState


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x):
    return np.asarray(x).astype(np.float64)


def assert_near(got, want, bound, message=""):
    """Within `bound` of the largest entry."""
    error = np.abs(wide(got) - want).max(initial=0)
    assert error <= bound * np.abs(want).max(initial=0), (message, error, np.abs(want).max(initial=0))


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a call, with a state in and out.

    strength: of the decays; edges: the first token of every segment but the state's.
    """

    tokens: int
    score: str = "squared"
    head_dim: int = 64
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    normalize: bool = True
    decay: bool = True
    strength: float = 0.03
    edges: tuple[int, ...] = ()

    def __str__(self):
        flags = [name for name in ("normalize", "decay") if getattr(self, name)] + ["segments"] * bool(self.edges)
        sizes = f"B{self.batch}-T{self.tokens}", "H{}G{}".format(*self.heads), f"K{self.head_dim}"
        return "-".join([self.score, *sizes, *flags])

    @property
    def segment_ids(self) -> jax.Array | None:
        """[B, T], the same in every row; None without edges."""
        if not self.edges:
            return None
        ids = np.searchsorted(self.edges, np.arange(self.tokens), side="right")
        return jnp.asarray(np.broadcast_to(ids, (self.batch, self.tokens)))

    def inputs(self) -> dict[str, jax.Array | FiniteState | None]:
        """q, k, v, log_decay, state."""
        (heads, groups), shape, dim = self.heads, (self.batch, self.tokens), self.head_dim
        decay = np.float32(-self.strength) * abs(np.asarray(normal(4, *shape, groups, dtype=jnp.float32)))
        before = [np.asarray(normal(seed, self.batch, groups, 70, dim, dtype=jnp.float32)) for seed in (5, 6)]
        q, k, v = (normal(seed, *shape, n, dim) for seed, n in ((0, heads), (2, groups), (3, groups)))
        if self.score == "linear" and self.normalize:  # denominators are sums of scores, which must not be negative
            q, k, before[0] = abs(q), abs(k), abs(before[0])
        phi = before[0] if self.score == "linear" else oracle.symmetric_features(before[0]).astype(np.float32)
        state = FiniteState(*map(jnp.asarray, (np.einsum("bgtd,bgtv->bgdv", phi, before[1]), phi.sum(2))))
        return {"q": q, "k": k, "v": v, "log_decay": jnp.asarray(decay) if self.decay else None, "state": state}

    def cotangents(self) -> tuple[jax.Array, FiniteState]:
        """Of y and of the final state."""
        (heads, groups), dim = self.heads, self.head_dim
        shape = self.batch, groups, num_features(self.score, dim)
        shapes = FiniteState((*shape, dim), shape)
        dstate = FiniteState(
            *(np.float32(0.05) * np.asarray(normal(7 + i, *shape, dtype=jnp.float32)) for i, shape in enumerate(shapes))
        )
        return normal(1, self.batch, self.tokens, heads, dim), dstate

    def operation(self, q, k, v, log_decay, state, segment_ids=None, **options):
        """(y, final state), of any inputs."""
        return decay_attention(
            *(q, k, v, log_decay),
            score=self.score,
            normalize=self.normalize,
            segment_ids=segment_ids,
            initial_state=state,
            return_final_state=True,
            form="chunked",
            **options,
        )

    def outputs(self, implementation="mosaic_gpu", **options) -> dict[str, jax.Array]:
        """y and the final state, as `results` names them."""
        y, final = self.operation(
            **self.inputs(), segment_ids=self.segment_ids, implementation=implementation, **options
        )
        return {"y": y, "kv": final.kv, "key_sum": final.key_sum}

    def results(self, wrap=lambda f: f, implementation="mosaic_gpu", **options) -> dict[str, jax.Array]:
        """y, the final state, and the gradients of every input, of the kernels; named as the oracle names them.

        Under the interpreter `wrap` must not be `jax.jit`: kernels that run at the same time wait for each other.
        """

        def run(inputs, cotangents):
            def operation(inputs):
                return self.operation(**inputs, segment_ids=self.segment_ids, implementation=implementation, **options)

            (y, final), pull = jax.vjp(operation, inputs)
            return y, final, pull(cotangents)[0]

        y, final, gradients = wrap(run)(self.inputs(), self.cotangents())
        return _named(y, final, gradients, gradients.pop("state"))

    def oracle(self) -> dict[str, np.ndarray]:
        """The same from the definition in float64."""
        inputs, (dy, dfinal) = self.inputs(), self.cotangents()
        options = {"score": self.score, "normalize": self.normalize, "segment_ids": self.segment_ids}
        options["initial_state"] = inputs.pop("state")
        y, final = oracle.forward(*inputs.values(), **options)
        gradients = oracle.gradients(dy, dfinal, *inputs.values(), **options)
        dstate = gradients.pop("initial_kv"), gradients.pop("initial_key_sum")
        return _named(y, FiniteState(*final), gradients, FiniteState(*dstate))


def _named(y, final: FiniteState, gradients: dict, dstate: FiniteState) -> dict:
    found = {"y": y, "kv": final.kv, "key_sum": final.key_sum, "initial_kv": dstate.kv}
    return found | {"initial_key_sum": dstate.key_sum} | {name: x for name, x in gradients.items() if x is not None}
