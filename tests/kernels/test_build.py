"""Compiling without a card: resources, errors, includes, cache; and what a launch hands over."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import build, compiler
from kernels.build import (
    BuildError,
    compile_source,
    kernel,
    pack_arguments,
)
from kernels.compiler import CACHE_VARIABLE, cache_folder
from kernels.errors import ConfigError
from kernels.registers import Resources, parse_log
from kernels.variants import ARCHITECTURES

SAMPLES = Path(__file__).parent / "cuda"
DEFINES = {"THREADS": 128}


REFUSAL = compiler.unavailable()
compiling = pytest.mark.skipif(bool(REFUSAL), reason=str(REFUSAL))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def sample(name: str = "sample.cu") -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     320 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 320 bytes cumulative stack size
ptxas info    : Function properties for called
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compile time = 5.047 ms
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 256 bytes smem, 372 bytes cmem[0]
"""


def test_the_log_is_read_kernel_by_kernel() -> None:
    assert parse_log(LOG) == {
        "first": Resources(38, 20, 28, 0, stack_bytes=328),
        "second": Resources(12, 0, 0, 256),
    }
    assert parse_log("") == {}


@compiling
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    compiled = compile_source("sample.cu", sample(), arch, DEFINES, SAMPLES)
    assert compiled.image.startswith(b"\x7fELF"), "a CUBIN, no PTX"
    assert set(compiled.functions) == {"reverse", "to_bfloat16"}
    found = compiled.functions["reverse"]
    assert found.registers > 0
    assert not found.spills
    assert found.shared_bytes >= 4 * DEFINES["THREADS"]
    assert compiled.compiler.startswith("NVRTC ")


@compiling
def test_spills_are_seen() -> None:
    compiled = compile_source("spilling.cu", sample("spilling.cu"), "sm_80", {})
    assert compiled.functions["spilling"].spills


@compiling
def test_an_error_names_kernel_architecture_compiler_and_log() -> None:
    with pytest.raises(BuildError) as caught:
        compile_source("broken.cu", "__global__ void k() { nothing_here(); }", "sm_90", {})
    for part in ("broken.cu", "sm_90", "NVRTC", "nothing_here"):
        assert part in str(caught.value)
    with pytest.raises(BuildError, match="sm_1"):
        compile_source("sample.cu", sample(), "sm_1", DEFINES, SAMPLES)
    with pytest.raises(BuildError, match="gives no kernel"):
        compile_source("empty.cu", "__device__ int f() { return 1; }", "sm_90", {})


@compiling
def test_headers_of_the_working_folder_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stray.cuh").write_text("#define N 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match="stray"):
        compile_source("k.cu", '#include "stray.cuh"\n', "sm_90", {}, SAMPLES)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were really compiled."""
    names: list[str] = []
    inner = compiler._compile

    def counting(name: str, *rest: Any) -> compiler.Compiled:
        names.append(name)
        return inner(name, *rest)

    monkeypatch.setattr(compiler, "_compile", counting)
    return names


@compiling
def test_the_second_compilation_reads_the_cache(counted: list[str], cache: Path) -> None:
    first = compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES)
    assert compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES) == first
    assert counted == ["sample.cu"]
    (entry,) = cache.iterdir()
    assert entry.name.startswith("sample-sm_90-")


@compiling
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_built_again(counted: list[str], cache: Path, damage: str) -> None:
    first = compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES)
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    entry.write_bytes({"cut": good[:-9], "flipped": flipped, "empty": b""}[damage])
    second = compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES)
    assert (second.image, second.functions) == (first.image, first.functions)
    assert len(counted) == 2
    assert compiler._read(entry) == second


@compiling
def test_what_the_image_depends_on_has_an_entry_of_its_own(
    counted: list[str], tmp_path: Path
) -> None:
    for name in ("sample.cu", "sample.cuh"):
        (tmp_path / name).write_text(sample(name))
    compile_source("sample.cu", sample(), "sm_90", DEFINES, tmp_path)
    compile_source("sample.cu", sample(), "sm_80", DEFINES, tmp_path)
    compile_source("sample.cu", sample(), "sm_90", {"THREADS": 64}, tmp_path)
    compile_source("sample.cu", sample() + "\n", "sm_90", DEFINES, tmp_path)
    (tmp_path / "sample.cuh").write_text(sample("sample.cuh").replace("2.0f", "3.0f"))
    compile_source("sample.cu", sample(), "sm_90", DEFINES, tmp_path)
    assert len(counted) == 5


@compiling
def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=CACHE_VARIABLE):
        compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "quantbench" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "quantbench" / "kernels"


def test_without_a_compiler_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(ConfigError, match="install a CUDA build of torch and cuda-core"):
        compile_source("sample.cu", sample(), "sm_90", DEFINES, SAMPLES)


# What a launch hands over


def test_arguments_have_the_types_of_the_parameters() -> None:
    x = torch.zeros(4)
    values, types = pack_arguments("k", (8, 4, 8, 4, 8, 8), (x, -3, 1 << 40, 0.5, None, 0.25))
    assert values == (x.data_ptr(), -3, 1 << 40, 0.5, 0, 0.25)
    assert types == (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_longlong,
        ctypes.c_float,
        ctypes.c_void_p,
        ctypes.c_double,
    )
    assert [ctypes.sizeof(kind) for kind in types] == [8, 4, 8, 4, 8, 8]


@pytest.mark.parametrize(
    ("sizes", "args", "message"),
    [
        ((8,), (), "takes 1 arguments, not 0"),
        ((4,), (torch.zeros(1),), "argument 0 of k has 4 bytes, which a tensor does not fit"),
        ((4, 4), (1, 1 << 31), "argument 1 of k has 4 bytes"),
        ((2,), (0.5,), "argument 0 of k has 2 bytes, which 0.5 does not fit"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    sizes: tuple[int, ...], args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        pack_arguments("k", sizes, args)


@compiling
def test_the_bindings_write_what_c_would() -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    given = pack_arguments("k", (8, 8, 4, 4), (torch.zeros(1), 1 << 40, 0.5, -7))
    held = driver._HelperKernelParams(given)
    addresses = (ctypes.c_void_p * 4).from_address(held.ckernelParams)
    for address, value, kind in zip(addresses, *given, strict=True):
        assert kind.from_address(address).value == value


class Driver:
    """A driver that remembers what it is asked."""

    def __init__(self, context: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.context = context
        real = importlib.import_module("cuda.bindings.driver")
        self.CUresult, self.CUfunction_attribute = real.CUresult, real.CUfunction_attribute
        self.launched = self.CUresult.CUDA_SUCCESS

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            if name == "cuLaunchKernel":
                return (self.launched,)
            return (self.CUresult.CUDA_SUCCESS, self.context)

        return call

    def asked(self, name: str) -> list[tuple[Any, ...]]:
        return [args for found, *args in self.calls if found == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    if REFUSAL:
        pytest.skip(REFUSAL)
    fake = Driver()
    monkeypatch.setattr(build, "_driver", lambda: fake)
    stream = type("Stream", (), {"cuda_stream": 77})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return fake


def test_a_launch_is_one_call_on_the_current_stream(driver: Driver) -> None:
    found = build.Kernel("k", 0, "function", (8, 4), Resources(32, 0, 0, 1024))
    x = torch.zeros(1)
    found.launch((3, 2, 1), (128, 1, 1), 0, x, 5)
    packed = ((x.data_ptr(), 5), (ctypes.c_void_p, ctypes.c_int))
    assert driver.asked("cuLaunchKernel") == [
        ["function", 3, 2, 1, 128, 1, 1, 0, 77, packed, 0],
    ]
    assert not driver.asked("cuFuncSetAttribute")
    assert not driver.asked("cuCtxSetCurrent")


def test_more_shared_memory_is_asked_for_once(driver: Driver) -> None:
    found = build.Kernel("k", 0, "function", (), Resources(32, 0, 0, 1024))
    for wanted in (47 << 10, (47 << 10) + 1, 100 << 10, 90 << 10):
        found.launch((1, 1, 1), (32, 1, 1), wanted)
    assert [args[-1] for args in driver.asked("cuFuncSetAttribute")] == [(47 << 10) + 1, 100 << 10]


def test_a_thread_without_a_context_gets_torchs(driver: Driver) -> None:
    driver.context = 0
    build.Kernel("k", 3, "function", (), Resources(32, 0, 0, 0)).launch((1, 1, 1), (32, 1, 1), 0)
    assert driver.asked("cuDeviceGet") == [[3]]
    assert driver.asked("cuCtxSetCurrent")


def test_what_the_driver_refuses_is_one_sentence(driver: Driver) -> None:
    driver.launched = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    found = build.Kernel("k", 0, "function", (), Resources(32, 0, 0, 0))
    with pytest.raises(build.DriverError, match="k: cuLaunchKernel failed with CUDA_ERROR_INVALID"):
        found.launch((1, 1, 1), (32, 1, 1), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_there_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"decode\.cu needs a CUDA card"):
        kernel("decode.cu", "decode", {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
def test_on_a_card() -> None:
    found = kernel(str(SAMPLES / "sample.cu"), "reverse", DEFINES)
    x = torch.randn(256, device="cuda").half()
    y = torch.empty(128, device="cuda")
    found.launch((1, 1, 1), (128, 1, 1), 0, x, y, 2, 0.5, 100)
    expected = x[::2].float() * (torch.arange(128, device="cuda") < 100)
    torch.testing.assert_close(y, expected.flip(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.launch((1, 1, 1), (128, 1, 1), 0, x, y, 2, 0.25, 100)
    graph.replay()
    torch.testing.assert_close(y, expected.flip(0) / 2)


def test_importing_compiles_nothing_and_touches_no_card() -> None:
    # torch itself imports cuda.bindings where it is installed.
    program = (
        "import sys, torch; import kernels.build; "
        "assert 'cuda.core' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_card_decides_the_architecture() -> None:
    assert build.architecture((8, 6)) == "sm_86"
    assert build.architecture((9, 0)) == "sm_90"
