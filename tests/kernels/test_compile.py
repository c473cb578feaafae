"""The kernels compile for GPUs that are not there, and what does not fit them is found out."""

import copy
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, assert_refused, in_turn, run_program
from jax import export

from pallas_kernels import programs, targets, tiles
from pallas_kernels.compile import ALL_KERNELS
from pallas_kernels.tuning import aot, stream_cases
from pallas_kernels.tuning.cases import (
    ATTENTION,
    Case,
    looped_standard_cases,
    standard_cases,
    stream_standard_cases,
)
from pallas_kernels.tuning.shapes import (
    LONG,
    SCORING,
    TRAINING,
    WINDOWED_SCORING,
    WINDOWED_TRAINING,
    Shape,
)

pytestmark = pytest.mark.usefixtures("optimized")

try:
    aot.check_plugin()
    aot.find_assembler()
    MISSING = None
except aot.Unavailable as error:
    MISSING = str(error)
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

NO_PRODUCT = tuple(
    name
    for operation in stream_cases.WITHOUT_PRODUCTS
    for name in stream_cases.OPERATIONS[operation]
)
TRITON = "__gpu$xla.gpu.triton"
# For which kernels are compiled, not lowered alone.
COMPILED = "rtx5070"
# Where it can be, it is compiled from beginning to end.
LOWERED = [name for name in targets.TARGETS if name != COMPILED or MISSING]
# Keys and values of two stages alone fill more shared memory than an RTX 5070 has.
TOO_LARGE = {"block_q": 64, "block_k": 256, "num_warps": 8, "num_stages": 3}


@pytest.mark.slow
@needs_compiler
def test_all_kernels_compile_and_fit(tmp_path):
    """Those of every shape, which takes two minutes of a core: `.ci/run` asks for it."""
    kernels = _compiled_by_the_command(tmp_path)
    expected = {(name, str(c.shape)) for c in standard_cases() for name in c.kernels(COMPILED)}
    assert {(kernel["kernel"], kernel["shape"]) for kernel in kernels} == expected


@needs_compiler
def test_the_command_compiles_what_it_is_asked_for(tmp_path):
    kernels = _compiled_by_the_command(tmp_path, "--kernel", "gelu_forward", "--kernel", "matmul")
    of_both = {"gelu_forward", "gelu_backward", "matmul", "weight_grads"}
    assert {kernel["kernel"] for kernel in kernels} == of_both


def _compiled_by_the_command(folder, *words):
    file = folder / "kernels.json"
    # In its own process: what its workers send back must be of the module that they have imported.
    words = ("--target", COMPILED, "--json", file, *words)
    result = run_program("pallas_kernels.compile", *words, env=os.environ)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 with a problem" in result.stdout
    kernels = json.loads(file.read_text())["kernels"]
    _assert_fit(kernels, COMPILED)
    return kernels


def test_there_are_kernels_for_every_shape():
    """All that is trained or scored, by the kernels of one row or of many."""
    cases = standard_cases()
    attending = [case for case in cases if case.operation == ATTENTION]
    compiled = {(name, *_sizes(c.shape)) for c in attending for name in c.kernels(COMPILED)}
    forward = {tuple(sizes) for name, *sizes in compiled if name.endswith("forward")}
    trained, scored = TRAINING + LONG + WINDOWED_TRAINING, SCORING + WINDOWED_SCORING
    assert forward == {_sizes(shape) for shape in trained + scored}
    for sizes in (_sizes(shape) for shape in trained):
        whole_row = ("fused_row_forward", *sizes) in compiled
        names = ("fused_row_backward",) if whole_row else ("flash_d_q", "flash_d_kv")
        assert {(name, *sizes) for name in names} <= compiled
    others = stream_standard_cases() + looped_standard_cases()
    assert set(map(repr, others)) == set(map(repr, cases)) - set(map(repr, attending))


@needs_compiler
def test_kernels_of_each_kind_compile_and_fit():
    """The narrowest of each that are asked for the same, which compile the fastest."""
    narrowest = {}
    for case in sorted(standard_cases(), key=lambda case: case.shape[-1]):
        key = case.kernels(COMPILED), case.asked() if case.operation == ATTENTION else case.dtype
        narrowest.setdefault(key, case)
    kinds = list(narrowest.values())
    reports = aot.measure([COMPILED], kinds)
    assert [report.kernel for report in reports] == [k for c in kinds for k in c.kernels(COMPILED)]
    assert {report.kernel for report in reports} == set(ALL_KERNELS)
    _assert_fit([report.as_json() for report in reports], COMPILED)


@needs_compiler
@pytest.mark.slow
def test_kernels_of_each_kind_compile_for_the_data_centre_too():
    """In bfloat16, whose products its own tensor cores make."""
    scored, looped = "add_layer_norm_cross_entropy", standard_cases()[-1].operation
    kinds = [
        next(case for case in standard_cases() if case.operation == scored),
        *(c for c in standard_cases() if c.operation == looped and str(c.shape) == "128x64x4x16"),
    ]
    reports = aot.measure(["b200"], kinds)
    assert [report.kernel for report in reports] == [k for c in kinds for k in c.kernels("b200")]
    _assert_fit([report.as_json() for report in reports], "b200")
    assert all("tcgen05.mma" in report.tensor_cores for report in reports)


def _assert_fit(kernels, target):
    for kernel in kernels:
        assert kernel["ok"] and kernel["target"] == target, kernel
        assert 0 <= kernel["shared_memory_bytes"] <= kernel["shared_memory_limit_bytes"]
        assert kernel["shared_memory_limit_bytes"] == targets.TARGETS[target].shared_memory
        assert 0 < kernel["registers"] <= 255
        has_products = kernel["kernel"] not in NO_PRODUCT
        assert bool(kernel["tensor_core_instructions"]) or not has_products


@needs_compiler
def test_a_tile_that_does_not_fit_is_reported():
    case = Case(ATTENTION, Shape(1, 512, 1, 64), kernel="flash_forward", settings=TOO_LARGE)
    [report] = aot.measure(["rtx5070"], [case])
    assert "hared memory" in report.problem
    assert report.shared_memory > targets.TARGETS["rtx5070"].shared_memory
    assert report.registers is None


@needs_compiler
def test_a_spilling_kernel_is_reported():
    case = Case(
        ATTENTION, Shape(1, 64, 1, 128), kernel="fused_row_forward", settings={"num_warps": 1}
    )
    [report] = aot.measure(["rtx5070"], [case])
    assert report.problem == f"spills {report.spilled} B a thread, more than {aot.MOST_SPILLED}"


@pytest.mark.slow
@needs_compiler
def test_one_bad_tile_in_the_table_fails_the_command_and_is_named(tmp_path):
    shutil.copytree(ROOT / "pallas_kernels", tmp_path / "pallas_kernels")
    table = copy.deepcopy(tiles.table())
    table["rtx5070"]["flash_forward"]["head 64, 16 bits"] |= TOO_LARGE
    (tmp_path / "pallas_kernels" / tiles.FILE.name).write_text(tiles.as_text(table))
    command = "-m pallas_kernels.compile --target rtx5070 --shape 1x512x1x64 --json found.json"
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "Exception ignored" not in result.stderr
    kernels = json.loads((tmp_path / "found.json").read_text())["kernels"]
    problems = {kernel["kernel"]: kernel["problem"] for kernel in kernels}
    assert "hared memory" in problems["flash_forward"]
    assert "hared memory" not in str([problems["flash_d_q"], problems["flash_d_kv"]])


@pytest.mark.parametrize(
    ("case", "target"),
    in_turn(standard_cases(), LOWERED),
    ids=lambda x: x if isinstance(x, str) else f"{x.operation} {x.shape} {x.asked()}",
)
def test_all_kernels_lower_to_triton_without_a_gpu(case, target):
    function, arguments = case.program(target)
    with targets.compiling_for(target):
        exported = export.export(
            jax.jit(function),
            platforms=["cuda"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(TRITON)],
        )(*arguments)
    # Forward, and backward in one kernel or in two; an MLP's two products, and four backward.
    expected = (6,) if case.operation == "mlp" else (2, 3) if case.backward else (1,)
    assert exported.mlir_module().count(TRITON) in expected


@pytest.mark.parametrize(
    "words, said",
    [
        ("--target rtx9999", ("--target", "'rtx9999'", "rtx5070, b200, h100")),
        ("--target rtx5070,", ("--target", "''")),
        ("--shape 64x4x64", ("--shape", "'64x4x64'", "BATCHxLENGTHxHEADSxHEAD_DIM")),
        ("--shape 1x0x4x64", ("--shape", "'1x0x4x64'")),
        ("--shape 1x64x4x13", ("--shape 1x64x4x13", "even")),
        ("--shape 1x64x4x1024", ("--shape 1x64x4x1024", "too large")),
        ("--kernel nothing", ("--kernel", "'nothing'", tiles.LOOPED)),
        ("--kernel fused_row_forward --shape 1x64x4x64", ("--shape: not allowed", "--kernel")),
        ("--json no/such/folder/file.json", ("--json no/such/folder/file.json",)),
    ],
)
def test_bad_command_lines_are_refused(words, said):
    assert_refused(run_program("pallas_kernels.compile", *words.split()), *said)


def test_a_missing_plugin_is_named(tmp_path):
    _package(tmp_path / "jax_plugins")
    result = run_program("pallas_kernels.compile", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert_refused(result, "plugin", "pip install 'spak-jax[aot]'")


def test_a_missing_assembler_is_named(tmp_path):
    for name in ("jax_plugins", "jax_plugins/xla_cuda13", "nvidia"):
        _package(tmp_path / name)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}
    assert_refused(run_program("pallas_kernels.compile", env=environment), "ptxas")


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "pallas_kernels.tune"),
        ("-m", "benchmarks.kernels"),
        ("-c", "import jax; from spak_jax import command_line as c; c.run_program(jax.devices)"),
    ],
    ids=["tune", "benchmark", "run_program"],
)
@pytest.mark.skipif(
    any(map(os.path.exists, programs.DEVICE_FILES)), reason="needs a machine without a GPU"
)
def test_no_program_misses_libraries_of_a_gpu_that_is_not_there(command):
    chosen_by_jax = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    chosen_by_jax.pop("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", None)
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=chosen_by_jax, capture_output=True, text=True
    )
    assert "Traceback" not in result.stderr and "plugin" not in result.stderr
    refused = "JAX's backend here is cpu" in result.stderr
    assert refused if command[0] == "-m" else not result.stderr


def test_chips_get_the_tiles_of_their_own_target_or_the_most_cautious():
    named = {capability: targets.name_of(capability) for capability in ("9.0", "10.0", "12.0")}
    assert named == {"9.0": "h100", "10.0": "b200", "12.0": "rtx5070"}
    assert targets.name_of("8.9") == targets.MOST_CAUTIOUS
    smallest = min(targets.TARGETS.values(), key=lambda target: target.shared_memory)
    assert targets.TARGETS[targets.MOST_CAUTIOUS] == smallest


def _sizes(shape: Shape | str) -> tuple[int, int]:
    """Length and head_dim."""
    _, length, _, head_dim = map(int, str(shape).split("x"))
    return length, head_dim


def _package(folder) -> None:
    """An empty package, which hides an installed one of its name."""
    folder.mkdir()
    (folder / "__init__.py").touch()
