"""Choosing an implementation: backend, explain, list_ops, strict mode, missing libraries."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aigc_fast
from aigc_fast import _host, _libraries, ops

ROOT = Path(__file__).parents[1]
X = torch.randn(2, 8)


def run_python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a fresh interpreter; its standard error too."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_default_is_the_compiled_kernel() -> None:
    found = aigc_fast.explain(ops.bias_act, X, act="relu")
    assert found.op == "bias_act"
    assert found.implementation == "cpu"
    assert found.reason == f"cpu_{_libraries.cpu_level()}"
    assert str(found) == f"bias_act: cpu ({found.reason})"


def test_explain_sees_through_autograd() -> None:
    assert aigc_fast.explain(ops.bias_act, X.clone().requires_grad_()).implementation == "cpu"


def test_explain_checks_arguments() -> None:
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        aigc_fast.explain(ops.bias_act, X, torch.zeros(3))
    with pytest.raises(TypeError, match="function must be one of aigc_fast.ops"):
        aigc_fast.explain(torch.relu, X)
    with pytest.raises(TypeError, match=r"aigc_fast.ops itself, such as ops.rms_norm, got 'rms_"):
        aigc_fast.explain("rms_norm", X)


def test_explain_knows_what_backend_forces() -> None:
    with aigc_fast.backend("reference"):
        found = aigc_fast.explain(ops.bias_act, X)
    assert str(found) == "bias_act: reference (backend forces it)"
    with aigc_fast.backend("cuda"), pytest.raises(RuntimeError, match="bias_act has no cuda"):
        aigc_fast.explain(ops.bias_act, X)


def test_explain_speaks_of_the_function_that_was_asked_about() -> None:
    level = _libraries.cpu_level()
    found = str(aigc_fast.explain(ops.layer_norm, X))
    assert found == f"layer_norm: cpu (cpu_{level}, as operator modulated_norm)"
    # What calls one is none of the library's: its operator is explained.
    assert aigc_fast.explain(lambda: ops.layer_norm(X)).op == "modulated_norm"
    linear = aigc_fast.explain(ops.linear, X, torch.zeros(3, 8))
    assert str(linear) == "linear: torch (it is made of torch's own operators)"


def test_explain_computes_nothing() -> None:
    image, kernel, taps = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), torch.ones(4)
    calls: dict = {
        "conv2d_resample": (image, kernel, taps, 2),
        "linear": (X, torch.zeros(3, 8)),
        "merge_attention": ([image] * 2, [image[..., 0]] * 2),
        "modulated_conv2d": (image, kernel, torch.ones(1, 2)),
        "quantize_weight": (torch.randn(16, 32), 4),
        "upsample_conv2d": (image, kernel),
    }
    for name, args in calls.items():
        with _Computed() as computed:
            found = aigc_fast.explain(getattr(ops, name), *args)
        assert found.op == name and not computed.operators
    with _Computed() as computed:
        ops.linear(*calls["linear"])
    assert computed.operators
    with pytest.raises(ValueError, match="weight must have the channels of x"):
        aigc_fast.explain(ops.upsample_conv2d, image, kernel[:, :1])


class _Computed(TorchDispatchMode):
    """What torch computes of numbers, and not of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if tensors and not any(isinstance(a, FakeTensor) for a in tensors):
            self.operators.append(func)
        return func(*args, **kwargs or {})


def test_explain_leaves_calls_of_other_threads_alone() -> None:
    asking, answered = threading.Event(), threading.Event()

    def slow() -> None:
        asking.set()
        answered.wait(10)
        ops.bias_act(X, act="relu")

    def ask() -> None:
        found.append(aigc_fast.explain(slow))

    found: list = []
    other = threading.Thread(target=ask)
    other.start()
    assert asking.wait(10)
    assert torch.equal(ops.bias_act(X, act="relu"), X.relu() * 2**0.5)
    with aigc_fast.backend("reference"):
        answered.set()
        other.join()
        assert aigc_fast.explain(ops.bias_act, X).op == "bias_act"
    assert found[0].op == "bias_act"
    assert torch.equal(ops.bias_act(X, act="relu"), X.relu() * 2**0.5)


def test_backend_forces_and_restores() -> None:
    with pytest.raises(ValueError, match="name must be one of reference, cpu, triton, cuda"):
        aigc_fast.backend("gpu")
    want = torch.relu(X)
    for name in ("reference", "cpu"):
        with aigc_fast.backend(name):
            torch.testing.assert_close(ops.bias_act(X, act="relu", gain=1), want)
    missing = pytest.raises(RuntimeError, match="bias_act has no cuda implementation")
    with missing, aigc_fast.backend("cuda"):
        ops.bias_act(X)
    assert aigc_fast.explain(ops.bias_act, X).implementation == "cpu"


def test_backend_holds_for_what_torch_computes() -> None:
    image, kernel = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    calls: list = [(ops.linear, X, X), (ops.upsample_conv2d, image, kernel)]
    calls += [(ops.conv2d_resample, image, kernel)]
    for function, *args in calls:
        refused = pytest.raises(
            RuntimeError, match=f"{function.__name__}: backend cuda got tensors"
        )
        with aigc_fast.backend("cuda"):
            with refused:
                function(*args)
            with refused:
                aigc_fast.explain(function, *args)
        for name in ("reference", "cpu"):
            with aigc_fast.backend(name):
                assert function(*args).shape
                assert aigc_fast.explain(function, *args).implementation == "torch"
    with aigc_fast.backend("cuda"), pytest.raises(TypeError, match="x must be a torch.Tensor"):
        ops.linear([1.0], None)


def test_list_ops() -> None:
    rows = {row["op"]: row for row in aigc_fast.list_ops()}
    assert sorted(rows) == sorted(ops.__all__)
    assert {"reference", "cpu"} <= set(rows["bias_act"]["implementations"])
    assert rows["bias_act"]["dtypes"] == ["float64", "float32", "bfloat16", "float16"]
    assert rows["bias_act"]["made_of"] == ["bias_act"]
    assert rows["layer_norm"]["implementations"] == rows["bias_act"]["implementations"]
    assert rows["linear"]["made_of"] == ["linear_product", "torch"]
    plain = rows["upsample_conv2d"]
    assert plain["made_of"] == plain["implementations"] == ["torch"]
    assert rows["modulated_conv2d"]["made_of"][-2:] == ["conv3x3", "torch"]


@pytest.mark.parametrize("level", list(_libraries.CPU_LEVELS))
def test_each_cpu_level_can_be_forced(level) -> None:
    features = _host.cpu_features()
    if not all(features.get(n) for n in _libraries.CPU_LEVELS[level]):
        pytest.skip(f"this CPU cannot run {level}")
    code = """
        import torch, aigc_fast
        print(aigc_fast.explain(aigc_fast.ops.bias_act, torch.randn(3, 4)))
    """
    assert f"(cpu_{level})" in run_python(code, AIGC_FAST_CPU=level)


def test_unknown_cpu_level_is_refused() -> None:
    code = """
        try:
            import aigc_fast
        except ValueError as error:
            print(error)
    """
    assert "AIGC_FAST_CPU must be one of avx512, avx2, baseline" in run_python(
        code, AIGC_FAST_CPU="sse9"
    )


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_without_its_library_it_warns_once_and_runs_the_reference(damage, tmp_path) -> None:
    package = tmp_path / "aigc_fast"
    shutil.copytree(ROOT / "aigc_fast", package, ignore=shutil.ignore_patterns("lib", "kernels"))
    if damage == "corrupt":
        (package / "lib").mkdir()
        for level in _libraries.CPU_LEVELS:
            (package / "lib" / f"cpu_{level}.so").write_bytes(b"no library")
    code = """
        import aigc_fast, torch
        x = torch.randn(3, 4)
        print(aigc_fast.explain(aigc_fast.ops.bias_act, x).implementation)
        print(torch.equal(aigc_fast.ops.bias_act(x, act="relu", gain=1), x.relu()))
    """
    out = run_python(code, cwd=tmp_path, AIGC_FAST_STRICT="0")
    assert out.count("UserWarning") == 1
    assert "plain PyTorch" in out and "make build" in out
    assert "reference\nTrue" in out


def test_importing_needs_no_triton() -> None:
    code = """
        import sys
        import aigc_fast
        assert "triton" not in sys.modules or "torch._dynamo" in sys.modules
        print("triton.language" in sys.modules)
    """
    assert "False" in run_python(code)


# ---- the house: imports run one way ---------------------------------------------------------

FLOORS = {  # a package may import itself and what stands below it
    "cli": {
        "training",
        "models",
        "schedulers",
        "nn",
        "io",
        "ops",
        "_libraries",
        "_host",
        "_timing",
    },
    "integrations": {"nn", "ops", "schedulers"},
    "training": {"models", "nn", "schedulers", "ops", "io"},
    "models": {"nn", "schedulers", "ops", "io"},
    "schedulers": {"ops"},
    "nn": {"ops"},
    "io": {"ops"},
    "ops": {"_libraries", "kernels"},
}


def imported(path: Path) -> set[str]:
    """Second names of all `aigc_fast.<name>` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "aigc_fast":
                names |= {alias.name for alias in node.names}
            elif match := re.match(r"aigc_fast\.(\w+)", node.module):
                names.add(match[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if match := re.match(r"aigc_fast\.(\w+)", alias.name):
                    names.add(match[1])
    return names


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_imports_run_one_way(package) -> None:
    public = {"ops", "_libraries", "_host", "_timing", "nn", "models", "schedulers", "training"}
    public |= {"io", "cli", "integrations", "kernels"}
    for path in (ROOT / "aigc_fast" / package).rglob("*.py"):
        above = (imported(path) & public) - FLOORS[package] - {package}
        assert not above, f"{path} imports {above}"


def test_kernels_know_only_triton_and_torch() -> None:
    known = {"torch", "triton", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= known
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in known, path


# ---- the host module --------------------------------------------------------------------------


def test_int4_codes_pack_and_unpack() -> None:
    numpy = pytest.importorskip("numpy")
    codes = numpy.random.default_rng(0).integers(0, 16, (3, 34), dtype=numpy.uint8)
    packed = _host.pack_int4(codes)
    assert packed.shape == (3, 17)
    assert packed[0, 0] == codes[0, 0] | codes[0, 1] << 4
    numpy.testing.assert_array_equal(_host.unpack_int4(packed), codes)
    with pytest.raises(ValueError, match="even number of columns"):
        _host.pack_int4(codes[:, :3])
    with pytest.raises(ValueError, match=r"codes must be in \[0, 15\], got 16"):
        _host.pack_int4(numpy.full((1, 2), 16, numpy.uint8))


def test_build_info() -> None:
    info = _host.build_info()
    assert info["cpu_levels"] and info["compiler"]
    assert set(info) == {"torch", "cpu_levels", "cuda_archs", "compiler"}
