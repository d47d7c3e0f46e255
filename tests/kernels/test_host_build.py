"""Building the C kernels: errors in one sentence, and a cache that survives what happens to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import host_build
from kernels.compiler import CACHE_VARIABLE
from kernels.host_build import HostBuildError, library, unavailable

ROOT = Path(__file__).parents[2]
SOURCE = "#include <stdint.h>\nint32_t qb_answer(void) { return 42; }\n"

compiled = pytest.mark.skipif(bool(unavailable()), reason=f"no C compiler: {unavailable()}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small source, an empty cache, and nothing built in this process."""
    sources = tmp_path / "c"
    sources.mkdir()
    (sources / "answer.c").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(host_build, "SOURCES", sources)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    host_build._library.cache_clear()
    return tmp_path


def answer() -> int:
    host_build._library.cache_clear()
    return int(library().qb_answer())


def entry(folder: Path) -> Path:
    (found,) = (folder / "cache").glob("*.so")
    return found


@compiled
def test_it_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer() == 42
    left = {path.suffix for path in (folder / "cache").iterdir()}
    assert left == {".so", ".sha256"}, "no temporary files"

    def build(*arguments: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(host_build, "_build", build)
    assert answer() == 42


@compiled
def test_another_source_is_another_entry(folder: Path) -> None:
    assert answer() == 42
    (folder / "c" / "answer.c").write_text(SOURCE.replace("42", "43"), encoding="utf-8")
    assert answer() == 43
    assert len(list((folder / "cache").glob("*.so"))) == 2


@compiled
@pytest.mark.parametrize("damage", ["cut", "digest", "gone"])
def test_a_damaged_entry_is_built_again(folder: Path, damage: str) -> None:
    # In a process of its own: a library that is loaded cannot be damaged safely.
    build_elsewhere(folder)
    found = entry(folder)
    whole = found.read_bytes()
    if damage == "cut":
        found.write_bytes(whole[: len(whole) // 2])
    elif damage == "digest":
        found.with_suffix(".sha256").write_text("0" * 64, encoding="utf-8")
    else:
        found.with_suffix(".sha256").unlink()
    assert answer() == 42


CODE = (
    "import sys; from pathlib import Path; from kernels import host_build; "
    "host_build.SOURCES = Path(sys.argv[1]); print(host_build.library().qb_answer())"
)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(folder / "c")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)


def build_elsewhere(folder: Path) -> None:
    with start(folder) as process:
        assert process.communicate()[0] == "42\n"


@compiled
def test_two_processes_build_at_once(folder: Path) -> None:
    with start(folder) as one, start(folder) as other:
        assert (one.communicate()[0], other.communicate()[0]) == ("42\n", "42\n")
    assert host_build._sound(entry(folder))


def test_a_missing_compiler_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(
        HostBuildError, match="there is no `no-such-compiler`: install gcc or clang"
    ):
        library()
    assert "install gcc" in str(unavailable())


@compiled
def test_an_error_of_the_compiler_is_shown(folder: Path) -> None:
    (folder / "c" / "answer.c").write_text("int broken(", encoding="utf-8")
    with pytest.raises(HostBuildError, match=r"(?s)not compile with `\w+`: .*broken"):
        library()
    assert not list((folder / "cache").iterdir()), "nothing is left behind"


@compiled
def test_a_cache_that_cannot_be_written_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "file"))
    with pytest.raises(HostBuildError, match=f"set {CACHE_VARIABLE} to a folder"):
        library()


LOADED = (
    "from pathlib import Path; from kernels.host_build import library; library(); "
    "maps = Path('/proc/self/maps').read_text(encoding='utf-8').splitlines(); "
    "print(len({m.split()[-1] for m in maps if 'gomp' in m or 'libomp' in m or 'iomp' in m}))"
)


@compiled
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="lists no loaded libraries")
def test_openmp_is_the_one_torch_has() -> None:
    # In a process of its own: libraries that other tests import bring theirs.
    command = [sys.executable, "-c", LOADED]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "1\n"


def test_the_command_says_what_came_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_build, "unavailable", lambda: None)
    assert host_build.main() == 0
    monkeypatch.setattr(host_build, "unavailable", lambda: "there is no `cc`")
    assert host_build.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "C kernels: built for this processor",
        "C kernels: not built, there is no `cc`",
    ]
