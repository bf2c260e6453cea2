"""Where the time of a compiled training step goes: that of its operations on the device, by part of the model."""

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

# The first pattern that is found in an operation's line of the compiled program says which part it belongs to.
PARTS = {
    "attention kernels": r'custom_call_target="(mosaic_gpu|triton_kernel_call|__cudnn)'
    r"(?!.*/((norm|convolution|swiglu)_backward/|jit\(softmax_rows))",
    "slices and stacks of the loop over layers": r"LanguageModel\)+/while/body/(jit\(dynamic|dynamic)",
    "head and loss": r"jvp\(\)|/head",
    "embedding": r"embedding|_take",
    "norms": r"/(\w+_)?norm/",
    "projections of the mixers": r"/mixer/(mixer\._convolved/)?(mixer\._project|\w*\._per_head|out)"
    r"|/mixer/mixer\._convolved_together/dot_general",
    "rest of the mixers": r"/mixer/",
    "MLPs": r"/mlp/",
    "rest of the model": r"LanguageModel",
    "optimiser": r'op_name="jit\(train_step\)/',
}
OTHER = "without a name"
CONTROL = re.compile(r"\s(while|conditional|call)\(")  # their bodies' operations are counted
COLLECTIVE = re.compile(r"nccl|p2p|all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute", re.IGNORECASE)
WAITS, IDLE = "of collectives, hidden by nothing", "no kernel"


def traced(step: Callable[[], None], steps: int, program: str) -> dict[str, float]:
    """Milliseconds of each part of one step, the longest first, of `steps` calls that wait for their end.

    `program` is the compiled program's text. Operations that run at a time count one by one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        (path,) = Path(folder).glob("**/*.xplane.pb")
        return parts_of(jax.profiler.ProfileData.from_file(str(path)), program, steps)


def parts_of(trace: jax.profiler.ProfileData, program: str, steps: int) -> dict[str, float]:
    """As `traced`, of a trace. Of several devices the first counts.

    Where GPUs wait for one another also WAITS and IDLE, which are no parts: how long the first one does nothing but
    collectives, and nothing at all.
    """
    lines = {}
    for line in program.splitlines():
        if found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            lines[found[1]] = line
    planes = {plane.name: plane for plane in trace.planes}
    first = min((name for name in planes if name.startswith("/device:GPU:")), default="/host:CPU")
    nanoseconds = Counter()
    with warnings.catch_warnings():  # one of JAX's own binding, which where it is an error ends the process
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in (event for line in planes[first].lines for event in line.events):
            name = next((value for key, value in event.stats if key == "hlo_op"), None)
            text = lines.get(name, "")
            if name is not None and not CONTROL.search(text):
                nanoseconds[part_of(text)] += event.duration_ns
        streams = [line for line in planes[first].lines if line.name.startswith("Stream")]
        spans = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for line in streams
            for event in line.events
        ]
    if any(COLLECTIVE.search(name) for *_, name in spans):
        busy, working = covered(spans), covered([span for span in spans if not COLLECTIVE.search(span[2])])
        nanoseconds[WAITS] = busy - working
        nanoseconds[IDLE] = max(end for _, end, _ in spans) - min(start for start, *_ in spans) - busy
    return {part: total / steps / 1e6 for part, total in nanoseconds.most_common()}


def covered(spans: Iterable[tuple[float, float, str]]) -> float:
    """How long at least one of the spans (start, end, name) lasts."""
    total, until = 0.0, float("-inf")
    for start, end, _ in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def part_of(line: str) -> str:
    """The part that a line of the compiled program belongs to, and its direction where there are two.

    What the backward pass computes again of the forward pass counts as backward.
    """
    if re.search(rf"\s({COLLECTIVE.pattern})(-start|-done)?\(", line):
        return "collectives"
    line = " ".join(re.findall(r'(?:op_name|custom_call_target)="[^"]*"', line))
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, line)), OTHER)
    if "jvp(" not in line or "jvp()" in line:
        return part
    return f"{part}, {'backward' if 'transpose(jvp' in line else 'forward'}"
