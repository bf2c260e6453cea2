"""`benchmarks/compile_kernels.py`: on small kernels, without a GPU, and on whatever the compilers may say."""

import functools
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax import lax

PATH = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def multiply_in_turns(x_ref, y_ref, o_ref, x_s, y_s, o_s, full, *, in_flight):
    """sum_i (i x) @ y: every turn of a rolled loop computes a left operand, in the same registers."""
    for source, target in ((x_ref, x_s), (y_ref, y_s)):
        plgpu.copy_gmem_to_smem(source, target, full)
        plgpu.barrier_wait(full)
    x = plgpu.load(x_s, layout=plgpu.Layout.WGMMA)

    def multiply(acc):
        def turn(i, _):
            plgpu.wgmma(acc, x * i.astype(jnp.bfloat16), y_s)
            plgpu.wgmma_wait(in_flight)

        lax.fori_loop(0, 8, turn, None)
        return lax.optimization_barrier(acc[...])

    o_s[...] = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_s, o_ref)
    plgpu.wait_smem_to_gmem(0)


def named(name, function, *arguments):
    return types.SimpleNamespace(name=name, function=function, arguments=arguments)


def programs():
    """What the script compiles, in a process of its own: a kernel, and two kernels with other operations."""
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def kernel(name, in_flight):
        return plgpu.kernel(
            functools.partial(multiply_in_turns, in_flight=in_flight),
            out_type=x,
            scratch_types=[plgpu.SMEM(x.shape, x.dtype, transforms=TILED) for _ in range(3)] + [plgpu.Barrier()],
            kernel_name=name,
        )

    def both(x, y):
        return kernel("racing_1", 1)(jnp.cumsum(x, axis=0), kernel("also_safe", 0)(y, x)).sum(axis=1)

    yield named("one", kernel("safe", 0), x, x)
    yield named("both/of them", both, x, x)


def test_compiles_and_tells_the_racing_kernel_from_the_safe_ones(tmp_path):
    here = [str(PATH.parents[1]), str(Path(__file__).parent)]
    out, dump = tmp_path / "report.json", tmp_path / "dump"
    run = subprocess.run(
        [sys.executable, PATH, "--programs", "test_compile_kernels", "--json", out, "--dump", dump],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
        capture_output=True,
        text=True,
    )
    if run.returncode == 2 and run.stdout.startswith("cannot compile for an H100 here"):
        pytest.skip(run.stdout.strip())
    assert run.returncode == 1, run.stdout + run.stderr
    report = json.loads(out.read_text())
    assert report["failed"] == []
    assert report["versions"].keys() == {"jax", "jaxlib"}
    found = {(kernel["program"], kernel["kernel"]): kernel for kernel in report["kernels"]}
    assert found.keys() == {("one", "safe"), ("both/of them", "racing_1"), ("both/of them", "also_safe")}
    for (program, name), kernel in found.items():
        assert 32 + 16 < kernel["registers"] <= 255  # an accumulator and an operand at least
        assert kernel["spill_bytes"] == 0
        assert kernel["shared_bytes"] == 3 * 64 * 64 * 2 + 8  # a barrier
        assert f"{program} {name}: {kernel['registers']} registers, 0 bytes spilled, 24584 bytes" in run.stdout
        assert list(dump.glob(f"{program.replace('/of ', '_of_')}/{name}_*.ptx"))
        assert len(kernel["problems"]) == (16 if name == "racing_1" else 0)  # the operand's registers
        assert all("overwritten, a left operand of the wgmma" in problem for problem in kernel["problems"])


@pytest.fixture
def script(monkeypatch):
    """The script as a module, which calls functions instead of compiling them."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", "")
    module = importlib.import_module("compile_kernels")
    monkeypatch.setattr(module, "compile_for_target", lambda function, arguments: function(*arguments))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))
    return module


@pytest.fixture
def run(script, monkeypatch, capfd):
    """Runs the script on functions by their names: the exit status and what it prints."""

    def run(functions, *arguments):
        found = [named(name, function) for name, function in functions.items()]
        monkeypatch.setitem(sys.modules, "some_programs", types.SimpleNamespace(programs=lambda: iter(found)))
        status = script.main(["--programs", "some_programs", *map(str, arguments)])
        return status, capfd.readouterr().out.splitlines()

    return run


def write(name="kernel_0", *, stores=0, loads=0, warning="", body="", sass=None):
    """A program's function, that writes what Mosaic GPU does of a kernel."""
    spills = f"{stores} bytes spill stores, {loads} bytes spill loads"
    log = [f"ptxas info    : {warning}", "ptxas info    : 0 bytes gmem", f"    0 bytes stack frame, {spills}"]
    log += ["ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem"]
    if stores:
        log.insert(1, f"ptxas warning : Registers are spilled to local memory, {spills}")
    launch = "gpu.launch async [%0] dynamic_shared_memory_size {} {{\n  gpu.dynamic_shared_memory\n}}\n"
    files = {
        "resources.txt": "",
        "mlir-passes.log": launch.format("%smem") + launch.format("%c51288_i32"),
        "ptx": f".visible .entry {name}(\n)\n{{\n{body}\nret;\n}}\n",
        "ptxas": "\n".join(log),
        **({"sass_ctrl": sass} if sass else {}),
    }

    def function():
        for suffix, text in files.items():
            Path(os.environ["MOSAIC_GPU_DUMP_TO"], f"{name}.{suffix}").write_text(text)

    return function


LINE = "p kernel: 168 registers, 0 bytes spilled, 51288 bytes of shared memory, 0.0 s"
RACE = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2,%r3,%r4}, %rd2, p, 1, 1, 1;
mov.b64 {%r1, %r2}, %rd3; mov.b64 {%r3, %r4}, %rd3; add.f32 %f3, %f1, %f2;"""

PRODUCT = "HGMMA.64x64x16.F32.BF16 R32, R28, gdesc[UR8], R32"
CODE = PRODUCT, "MOV R9, R1", f"{PRODUCT}, gsb0", "EXIT"
SASS = "\n".join(f"  -:-:-:Y:01  /*{16 * n:04x}*/  {line} " for n, line in enumerate(CODE))
OVERWRITTEN = "overwritten, a left operand of the wgmma of line 1, which may be in flight"


@pytest.mark.parametrize(
    ("written", "status", "lines"),
    [
        ({}, 0, [LINE]),
        ({"sass": SASS}, 0, [LINE.replace("0.0 s", "2 HGMMA, 0.0 s")]),
        (
            {"sass": SASS.replace("R9", "R29")},
            1,
            [LINE.replace("0.0 s", "2 HGMMA, 0.0 s"), f"    SASS line 2: R29 {OVERWRITTEN}"],
        ),
        ({"warning": "(C7519) warpgroup.arrive is injected in around line 5"}, 0, [LINE]),
        ({"warning": "(C7507) 'setmaxnreg' ignored"}, 1, [LINE, "    C7507: 'setmaxnreg' ignored"]),
        ({"stores": 12, "loads": 8}, 1, [LINE.replace("0 bytes s", "20 bytes s"), "    spills 20 bytes"]),
    ],
)
def test_a_line_per_kernel_and_what_is_wrong_with_it(run, written, status, lines):
    assert run({"p": write(**written)}) == (status, lines)


def test_shows_a_few_findings_and_writes_all(run, tmp_path):
    out = tmp_path / "report.json"
    status, lines = run({"p": write(body=RACE)}, "--json", out)
    assert status == 1
    assert lines[0] == LINE
    assert lines[1] == "    PTX line 5: %f1 used, an accumulator of the wgmma of line 4, which may be in flight"
    assert lines[5:] == ["    and 2 more"]
    (kernel,) = json.loads(out.read_text())["kernels"]
    assert len(kernel["problems"]) == 6
    assert (kernel["program"], kernel["kernel"], kernel["hgmma"]) == ("p", "kernel", None)


def test_kernels_are_in_the_order_of_compilation(run):
    def several():
        for name in ("b_x_10", "a_9", "b_8"):
            write(name)()

    status, lines = run({"p": several})
    assert status == 0
    assert [line.partition(":")[0] for line in lines] == ["p b", "p a", "p b_x"]


def test_goes_on_after_a_program_that_fails(run, tmp_path):
    def wrong():
        raise ValueError("64 is no multiple of 7")

    def again():
        Path(os.environ["MOSAIC_GPU_DUMP_TO"], "kernel_0.resources.txt").touch()

    out = tmp_path / "report.json"
    status, lines = run({"w": wrong, "xla": lambda: None, "p": write(), "again": again}, "--json", out)
    assert status == 1
    assert lines == ["w: fails", "xla: fails", LINE, "again: only kernels of programs before it"]
    assert json.loads(out.read_text())["failed"] == ["w", "xla"]


def test_says_why_a_program_fails_but_keeps_the_noise_of_compilers_in_the_dump(script, tmp_path, capfd):
    def noisy():
        os.write(2, b"nvdisasm invocation failed\n")
        write()()

    programs = [named("a/b c", noisy), named("xla", lambda: None)]
    assert script.compile_all(programs, tmp_path)[1] == ["xla"]
    errors = capfd.readouterr().err
    assert "nvdisasm" not in errors
    assert "ValueError: xla has no Mosaic GPU kernel" in errors
    assert (tmp_path / "a_b_c" / "stderr.txt").read_text() == "nvdisasm invocation failed\n"
    assert (tmp_path / "a_b_c" / "kernel_0.ptx").exists()


def test_only_some_programs(run):
    functions = {name: write(f"{name}_0") for name in ("forward", "backward", "other")}
    status, lines = run(functions, "--only", "ward")
    assert status == 0
    assert [line.partition(":")[0] for line in lines] == ["forward forward", "backward backward"]
    assert run(functions, "--only", "x") == (2, ["--only x: expected a part of forward, backward, other"])


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("topology not implemented for cuda"),
        RuntimeError(
            "No PTX compilation provider is available. Neither ptxas/nvlink ...\n - ptxas_path: Couldn't find"
        ),
    ],
)
def test_says_so_where_nothing_can_be_compiled(script, run, monkeypatch, error):
    def compile_for_target(function, arguments):
        raise error

    monkeypatch.setattr(script, "compile_for_target", compile_for_target)
    status, (line,) = run({"p": write()})
    assert status == 2
    reason = str(error).partition(". ")[0]
    assert line == f'cannot compile for an H100 here: {reason}; pip install "jax[cuda13]" brings what it takes'


def test_does_not_mix_dumps(script, tmp_path, capsys):
    (tmp_path / "kernel_0.ptx").touch()
    with pytest.raises(SystemExit) as exit_:
        script.parse(["--dump", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"--dump {tmp_path}: expected a new folder, or an empty one" in capsys.readouterr().err
