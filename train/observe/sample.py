"""A sample of the trained model, as the text of sample.txt."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from train.data.task import Task
from train.random_key import random_key
from train.restore import for_any_call
from train.sharding import ONE_ROW_RULES
from twomamba_jax.generation import generate
from twomamba_jax.layers import LanguageModel


def sample_text(model: LanguageModel, params: Any, task: Task, options: ConfigDict, seed: int) -> str:
    """The task's prompt and how the model continues it; where there is a right continuation, that and the score too.

    Without one, `options.tokens` tokens are sampled. `options.temperature` 0 is greedy.
    """
    count = options.tokens if task.truth is None else task.truth.size
    with nn.logical_axis_rules(ONE_ROW_RULES):
        generation = generate(
            for_any_call(model),
            params,
            jnp.asarray(task.prompt, jnp.int32)[None],
            max_new_tokens=count,
            temperature=options.temperature,
            rng=random_key(seed),
        )
    continuation = np.asarray(generation.tokens)[0]
    if task.truth is None:
        return task.render(np.concatenate([task.prompt, continuation])) + "\n"
    right = int(np.sum(continuation == task.truth))
    return (
        f"prompt:     {task.render(task.prompt)}\n"
        f"prediction: {task.render(continuation)}\n"
        f"truth:      {task.render(task.truth)}\n"
        f"{right} of {count} right\n"
    )
