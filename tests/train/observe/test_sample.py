"""The sample of a trained model."""

import numpy as np
from ml_collections import ConfigDict
from support.models import model_of, params_of

from train.data.task import Task
from train.observe.sample import sample_text


def test_a_model_of_named_kernels_is_sampled_from_where_they_have_no_such_call():
    """Reading a prompt of four tokens into a cache is no call of theirs, and here none is."""
    task = Task([], [], {}, prompt=np.arange(4), render=lambda tokens: " ".join(map(str, tokens)))
    options = ConfigDict({"tokens": 3, "temperature": 0.0})
    params, texts = params_of(model_of("softmax")), []
    for implementation in ("mosaic_gpu", "xla"):
        model = model_of("softmax", implementation=implementation)
        texts.append(sample_text(model, params, task, options, seed=0))
    assert texts[0] == texts[1]
    assert texts[0].startswith("0 1 2 3 ")
    assert len(texts[0].split()) == 7
