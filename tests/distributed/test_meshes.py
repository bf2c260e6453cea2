"""Training steps on meshes of eight simulated devices are those of one device, and are cut as the rules say."""

import json
import math

import pytest
from support.exhaustive import EXHAUSTIVE

VARIANTS = ("2mamba", "2mamba-e", "mamba2", "mamba2-released", "mamba2s", "linear", "softmax")

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "sequence 8": {"sequence": 8},
    "fsdp 2 x tensor 2 x sequence 2": {"fsdp": 2, "tensor": 2, "sequence": 2},
}

# A device's part of the parameters: embedding [vocab 64, embed 32], head [32, 64], the queries' kernel [layers 1, embed
# 32, heads 4, head_dim 16], and the last of the MLP [layers 1, mlp 64, embed 32].
PARTS = {
    "data 8": ([64, 32], [32, 64], [1, 32, 4, 16], [1, 64, 32]),
    "fsdp 8": ([64, 4], [4, 64], [1, 4, 4, 16], [1, 64, 4]),
    "tensor 4 x data 2": ([16, 32], [32, 16], [1, 32, 1, 16], [1, 16, 32]),
    "sequence 8": ([64, 32], [32, 64], [1, 32, 4, 16], [1, 64, 32]),
    "fsdp 2 x tensor 2 x sequence 2": ([32, 16], [16, 32], [1, 16, 2, 16], [1, 32, 16]),
}
PATHS = (
    "['embedding']['embedding']",
    "['head']",
    "['layers_0']['mixer']['q']['kernel']",
    "['layers_0']['mlp']['down']['kernel']",
)


# In every run 2mamba where all parts meet. (Where only tokens are cut: test_sequence.py, with every score.)
CASES = [
    (variant, mesh)
    for variant in VARIANTS
    for mesh in MESHES
    if EXHAUSTIVE or (variant, mesh) == ("2mamba", "fsdp 2 x tensor 2 x sequence 2")
]


@pytest.fixture(scope="module")
def steps(simulate):
    return simulate("meshes.py", json.dumps(MESHES), json.dumps(CASES))


@pytest.mark.parametrize(("variant", "mesh"), CASES)
def test_a_step_is_that_of_one_device(steps, variant, mesh):
    step = steps[f"{variant} {mesh}"]
    assert step["loss"] < 1e-5
    assert step["gradients"] < 1e-5
    assert step["parameters"] < 1e-5
    # Activations are cut too, or a device would need as much scratch memory as one alone. A state of second order,
    # or of keys of 128, is as large wherever tokens are cut, and larger than all that a device has of so few.
    if variant not in ("2mamba", "mamba2-released") or "sequence" not in MESHES[mesh]:
        assert step["scratch"] < 0.4


@pytest.mark.parametrize("mesh", [mesh for variant, mesh in CASES if variant == "2mamba"])
def test_the_state_that_a_step_returns_is_cut_as_the_rules_say(steps, mesh):
    shapes = steps[f"2mamba {mesh}"]["shapes"]
    for prefix in (".params", ".opt_state[0].trace"):
        assert [shapes[prefix + path][1] for path in PATHS] == list(PARTS[mesh])


@pytest.mark.parametrize(("variant", "mesh"), [case for case in CASES if "fsdp" in MESHES[case[1]]])
def test_no_large_array_is_replicated_under_fsdp(steps, variant, mesh):
    """Taps of convolutions are small in any model but one as small as this."""
    shapes, parts = steps[f"{variant} {mesh}"]["shapes"], MESHES[mesh]["fsdp"]
    count = sum(math.prod(whole) for whole, _ in shapes.values())
    large = [path for path, (whole, _) in shapes.items() if math.prod(whole) > count / 100 and "conv_" not in path]
    assert len(large) > 4
    assert all(math.prod(shapes[path][1]) <= math.prod(shapes[path][0]) / parts for path in large)


def test_a_checkpoint_of_eight_devices_resumes_on_fewer(simulate, tmp_path):
    """On four that cut it otherwise; on one, which is the whole of what each of the four puts together."""
    counts = (8, 4, 1) if EXHAUSTIVE else (8, 4)
    losses = simulate("resume.py", tmp_path, *counts)
    for count in counts[1:]:
        assert losses[str(count)] == pytest.approx(losses["8"], rel=1e-5)
