"""Builds the native library; everything else is in pyproject.toml.

It is a plain shared library with a C ABI that is loaded by ctypes. It does not use Python's C API, so one build
serves every Python version, and where it cannot be built the package falls back to pure-Python reader threads.

ENGINE_LOADER_NATIVE_BUILD: "auto" (default) warns when the build fails, "require" makes that fatal, "0" skips it.
CXX and CXXFLAGS are respected.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE_DIR = Path("engine_loader/transfer/native")
LIBRARY = "libengine_loader_native"
COMPILERS = ("c++", "g++", "clang++")
SOURCES = NATIVE_DIR / "src"
FLAGS = ("-O3", f"-I{SOURCES}", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
LIBRARIES = ("-ldl",)  # dlopen lived in a library of its own before glibc 2.34
WITHOUT_NATIVE = (
    "engine_loader works without it, in pure Python and more slowly; "
    "install a C++17 compiler to have it, then: "
    "ENGINE_LOADER_NATIVE_BUILD=require pip install --no-cache-dir --force-reinstall --no-deps engine-loader"
)
BUILD_MODES = ("auto", "require", "0")


class NativeBuildError(Exception):
    """The native library could not be built; the message says why."""


def build_mode() -> str:
    mode = os.environ.get("ENGINE_LOADER_NATIVE_BUILD", "auto").strip().lower()
    if mode not in BUILD_MODES:
        sys.exit(f"ENGINE_LOADER_NATIVE_BUILD={mode!r} is not one of {', '.join(BUILD_MODES)}")
    return mode


def native_files(*patterns: str) -> list[str]:
    """Paths relative to the project, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / SOURCES).glob(f"*/{pattern}"))


def native_extensions() -> list[Extension]:
    sources = native_files("*.cpp")
    if not sources:
        return []
    name = ".".join((*NATIVE_DIR.parts, LIBRARY))
    return [Extension(name, sources=sources, depends=native_files("*.h"), language="c++")]


def find_compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    if chosen:
        return shlex.split(chosen)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NativeBuildError(f"no C++ compiler was found (tried {', '.join(COMPILERS)}; set CXX to name another)")


def compile_library(sources: list[str], library: Path) -> None:
    """Compile beside the target and rename, so that a process which has the old library mapped keeps it."""
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    command = [*find_compiler(), *FLAGS, *extra, *sources, "-o", str(unfinished), *LIBRARIES]
    library.parent.mkdir(parents=True, exist_ok=True)
    print(shlex.join(command))
    try:
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode != 0 or not unfinished.exists():
            raise NativeBuildError(f"{command[0]} ended with status {done.returncode}; what it said is above")
        unfinished.replace(library)
    except OSError as error:
        raise NativeBuildError(f"{command[0]} did not start: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class BuildNative(build_ext):
    """Builds the one shared library with one call of the compiler, and goes on without it unless it is required."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extensions(self) -> None:
        libraries = [(ext, (ROOT / self.get_ext_fullpath(ext.name)).resolve()) for ext in self.extensions]
        mode = build_mode()
        try:
            if mode == "0":
                raise NativeBuildError("ENGINE_LOADER_NATIVE_BUILD=0")
            for ext, library in libraries:
                compile_library(ext.sources, library)
        except NativeBuildError as error:
            if mode == "require":
                sys.exit(f"engine_loader: the native library could not be built, and is required: {error}")
            self.warn(f"the native library was not built: {error}. {WITHOUT_NATIVE}")
            for _, library in libraries:
                library.unlink(missing_ok=True)  # one from an earlier build would be packed as if it were this one's
            self.extensions = []
            self.distribution.ext_modules = []

    def copy_extensions_to_source(self) -> None:
        if not self.extensions:  # one from an earlier editable install may not fit these sources
            (ROOT / NATIVE_DIR / f"{LIBRARY}.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """A wheel for the platform but for every Python version; for every platform when it holds no library."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":  # only now is it known whether there is a library
            self.root_is_pure = not self.distribution.ext_modules

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
