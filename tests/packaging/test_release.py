"""What a release consists of: built here without a compiler, installed, and used. make wheels and make test-wheel do it
at length, with the native library."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import __version__

ROOT = Path(__file__).resolve().parents[2]
TREE = ("engine_loader", "patches", "LICENSE", "README.md", "pyproject.toml", "setup.py")
LIBRARY = "engine_loader/transfer/native/libengine_loader_native.so"
IN_WHEELS = {".py", ".c", ".h", ".patch", ".typed"}

# Stands for a compiler that takes minutes: what it makes is only packed here.
COMPILER = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'wb').write(b'a library')\n"


def build(kind: str, tree: Path, out: Path, environment: dict[str, str], options: str = "None") -> Path:
    """Build ``kind`` (sdist or wheel) of ``tree`` as pip does, with the setuptools that is installed."""
    program = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}, {options}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this tree, unpacked: what it lacks, no wheel has."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("*.so", "*.tmp", "__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(ROOT / name, tree)
    sdist = build("sdist", tree, tmp_path_factory.mktemp("sdist"), {})
    assert sdist.name == f"engine_loader-{__version__}.tar.gz"
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    return out / f"engine_loader-{__version__}"


@pytest.mark.slow
def test_a_wheel_without_a_compiler_holds_the_whole_package_and_loads(unpacked: Path, tmp_path: Path) -> None:
    # No compiler is found, so the build goes on without the library, as pip does on such a machine.
    wheel = build(
        "wheel", unpacked, tmp_path, {"ENGINE_LOADER_NATIVE_BUILD": "auto", "PATH": "/nonexistent", "CXX": ""}
    )
    assert wheel.name == f"engine_loader-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    native = ROOT / "engine_loader/transfer/native/src"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "engine_loader").rglob("*")
        if path.suffix in IN_WHEELS and native not in path.parents
    } | {f"engine_loader/patches/{path.name}" for path in (ROOT / "patches").glob("*.patch")}
    assert packed == wanted

    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    save_file({"w": torch.arange(5)}, tmp_path / "model.safetensors")
    program = (
        "import engine_loader, sys\n"
        "with engine_loader.open_checkpoint(sys.argv[1]) as model:\n"
        "    print(engine_loader.__file__, model.get_tensor('w').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.safetensors")],
        env={"PATH": "/nonexistent", "PYTHONPATH": str(target)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split(maxsplit=1) == [f"{target}/engine_loader/__init__.py", "[0, 1, 2, 3, 4]\n"]


@pytest.mark.slow
def test_a_wheel_with_the_library_is_for_a_platform_and_every_python(unpacked: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler.py"
    compiler.write_text(COMPILER)
    environment = {"ENGINE_LOADER_NATIVE_BUILD": "require", "CXX": f"{sys.executable} {compiler}"}
    options = "{'--build-option': ['--plat-name=manylinux_2_28_aarch64']}"
    wheel = build("wheel", unpacked, tmp_path, environment, options)
    assert wheel.name == f"engine_loader-{__version__}-py3-none-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(LIBRARY) == b"a library"
        assert not [name for name in archive.namelist() if name.endswith((".cpp", "src/"))]
        metadata = archive.read(f"engine_loader-{__version__}.dist-info/METADATA").decode()
        assert f"\nVersion: {__version__}\n" in metadata
        assert "Root-Is-Purelib: false" in archive.read(f"engine_loader-{__version__}.dist-info/WHEEL").decode()


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]


def test_the_changelog_begins_with_what_is_unreleased_or_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [__version__])
