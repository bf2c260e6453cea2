"""`benchmarks/step_parts.py`: which part of a model an operation of a compiled program belongs to."""

import importlib

import pytest

FORWARD = "jit(train_step)/jvp(LanguageModel)/eval_jaxpr/layers_0"
BACKWARD = "jit(train_step)/transpose(jvp(LanguageModel))/eval_jaxpr/checkpoint/layers_0"
KERNEL = 'custom_call_target="mosaic_gpu_v2", metadata={'


@pytest.mark.parametrize(
    ("before", "name", "part"),
    [
        ("", f"{FORWARD}/mixer/mixer._convolved/mixer._project/q/dot_general", "projections of the mixers, forward"),
        ("", f"{FORWARD}/mixer/mixer._convolved_together/dot_general", "projections of the mixers, forward"),
        ("", f"{BACKWARD}/mixer/mixer._per_head/decay/dot", "projections of the mixers, backward"),
        ("", f"{BACKWARD}/mixer/out/dot_general", "projections of the mixers, backward"),
        ("", f"{FORWARD}/mixer/mixer._convolved/mixer._convolve/add", "rest of the mixers, forward"),
        (KERNEL, f"{BACKWARD}/mixer/squared_backward_keys/mpmd_map", "attention kernels, backward"),
        (KERNEL, f"{BACKWARD}/mixer/scan_backward/mpmd_map", "attention kernels, backward"),
        (KERNEL, f"{BACKWARD}/mixer_norm/jit(norm_backward)/norm_backward/mpmd_map", "norms, backward"),
        (KERNEL, f"{BACKWARD}/mlp/jit(swiglu_backward)/swiglu_backward/mpmd_map", "MLPs, backward"),
        (
            KERNEL,
            f"{BACKWARD}/mixer/mixer._convolved_together/jit(convolution_backward)/convolution_backward/mpmd_map",
            "rest of the mixers, backward",
        ),
        (KERNEL, "jit(train_step)/jvp()/while/body/eval_jaxpr/jit(softmax_rows)/mpmd_map", "head and loss"),
        ("", "jit(train_step)/mul", "optimiser"),
        ("", "", "without a name"),
    ],
)
def test_an_operation_belongs_to_a_part(before, name, part):
    script = importlib.import_module("step_parts")
    assert script.part_of(f'  %x = f32[8] fusion(%y), {before}op_name="{name}"' if name else "") == part


@pytest.mark.parametrize(
    "operation", ["all-reduce(", "all-gather-start(", "reduce-scatter-done(", "collective-permute("]
)
def test_what_waits_for_other_devices_is_a_part_of_its_own(operation):
    script = importlib.import_module("step_parts")
    assert script.part_of(f'  %x = f32[8] {operation}%y), op_name="{BACKWARD}/mixer/out/dot_general"') == "collectives"


class Event:
    """Of a trace."""

    def __init__(self, name, start, duration):
        self.name, self.start_ns, self.duration_ns, self.stats = name, start, duration, []


class Named:
    """A plane, with its lines, or a line, with its events."""

    def __init__(self, name, parts):
        self.name, self.lines, self.events = name, parts, parts


def test_counts_what_nothing_hides():
    """Of a collective of 10 to 40 ms, behind kernels of 0 to 20 and of 35 to 50; then none until 60."""
    script = importlib.import_module("step_parts")
    ms = 1_000_000
    kernels = Named("Stream #1", [Event("a", 0, 20 * ms), Event("b", 35 * ms, 15 * ms), Event("c", 60 * ms, 5 * ms)])
    collectives = Named("Stream #2", [Event("ncclDevKernel_AllReduce", 10 * ms, 30 * ms)])
    steps = Named("Steps", [Event("train_step", 0, 65 * ms)])
    trace = type("Trace", (), {"planes": [Named("/device:GPU:0", [kernels, collectives, steps])]})
    assert script.parts_of(trace, "", 1) == {script.WAITS: 15, script.IDLE: 10}
