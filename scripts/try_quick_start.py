"""Runs what docs/quick-start.md says of a machine without a GPU, line by line, as a person who has nothing else would.

python -m scripts.try_quick_start WHEEL        (make test-quick-start)

In an empty directory, with a home of its own; `engine-loader` is the wheel, and every other package is pip's. A line
that starts a server runs beside the following ones: until its like is started, or to the end. A server is waited for,
asked where the text says so, and stopped by Ctrl-C. Takes about ten minutes on two cores, and 4 GB of disk.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "quick-start.md"
SECTION = "## Without a GPU, a model and a bucket\n"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VLLM = "python -m vllm.entrypoints.openai.api_server"
READY = {VLLM: "/health", "moto_server": "/"}
"""Beginning of a command that starts a server -> what answers when it is ready."""
PATIENCE_S = 400
KEPT = ("PATH", "LANG", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE")
SAVED = ("compile cache: saved", "compile cache: nothing new to save")
EXPECTED = {
    "engine-loader doctor": "✓ vLLM --load-format b10_3fs: registered",
    "engine-loader report": "ready after",
    "engine-loader compile-cache explain": "hit",
    "engine-loader convert tiny-llama step-0 --to dcp": "step-0: 1 file, 21 tensors",
    "engine-loader convert step-0 converted": "converted: 1 file, 21 tensors",
    "engine-loader inspect converted --check": "sound: the header of 1 file",
    "engine-loader inspect s3://models/tiny-llama --check": "sound: the headers of ",
}
"""A command -> what it has to print."""
IN_LOGS = (
    ("b10_3fs: loaded ", "from posix", "compile cache: miss", "compile cache: saved"),
    ("b10_3fs: loaded ", "from posix", "compile cache: hit"),
    ("b10_3fs: loaded ", "from object_store"),
)
"""What each of vLLM's starts has to say."""


@dataclass(frozen=True)
class Step:
    """A line of a shell block, or a block of Python."""

    language: str
    text: str


def steps(document: str) -> list[Step]:
    """What the section says to do, in its order."""
    _, found, section = document.partition(SECTION)
    if not found:
        sys.exit(f"{DOCUMENT} has no section {SECTION.strip()!r}")
    return list(_steps(section.partition("\n## ")[0]))


def _steps(section: str) -> Iterator[Step]:
    for language, block in BLOCK.findall(section):
        if language == "python":
            yield Step(language, block)
        else:
            yield from (Step(language, line) for line in block.splitlines() if line.strip())


@dataclass
class Server:
    """A command that goes on."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, url: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not _answers(url):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.text()[-6000:]}\nit did not answer at {url}: its log is above")
            time.sleep(0.5)

    def wait_until_it_says(self, words: Sequence[str]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not any(one in self.text() for one in words):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.text()[-6000:]}\nit did not say {' or '.join(words)}: its log is above")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ctrl-C, as the terminal sends it: to all that the command started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                sys.exit("Ctrl-C did not end it within a minute")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class Terminal:
    """Runs steps one after another. What they export holds for those that follow.

    Attributes:
        answers: the text of every completion.
        logs: what each start of vLLM printed.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory, self._environment = directory, environment
        self._state = directory.parent / "state"
        self._state.touch()
        self._servers: dict[str, Server] = {}
        self._question = ""
        self.answers: list[str] = []
        self.logs: list[str] = []

    def run(self, step: Step) -> None:
        beginning = next((one for one in READY if step.text.startswith(one)), None)
        if beginning is not None:
            self._serve(beginning, step.text)
        elif step.text.startswith("curl "):
            self._question = step.text
            self._ask()
        elif step.language == "python":
            self._finish(f"python - <<'END OF THE PROGRAM'\n{step.text}END OF THE PROGRAM", "python - …")
        else:
            if step.text.startswith("rm "):
                self._stop(VLLM)  # as the text says before that
            printed = self._finish(step.text)
            if (wanted := EXPECTED.get(step.text)) and wanted not in printed:
                sys.exit(f"{printed}\n{step.text}: that does not have {wanted!r}")

    def stop(self) -> None:
        for beginning in list(self._servers):
            self._stop(beginning)

    def _finish(self, line: str, title: str = "") -> str:
        print(f"$ {title or line}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f". {self._state}\n{line}\nstatus=$?\nexport -p > {self._state}\nexit $status"],
            cwd=self._directory,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\n{line}: status {done.returncode}")
        print(f"  {time.monotonic() - began:.1f} s", flush=True)
        return done.stdout

    def _serve(self, beginning: str, line: str) -> None:
        self._stop(beginning)
        print(f"$ {line} &", flush=True)
        began = time.monotonic()
        log = self._directory.parent / f"server-{len(self.logs)}-{len(self._servers)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f". {self._state}\nexec {line}"],
                cwd=self._directory,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = self._servers[beginning] = Server(process, log)
        words = shlex.split(line)
        server.wait_for(f"http://127.0.0.1:{words[words.index('--port') + 1]}{READY[beginning]}")
        print(f"  answers after {time.monotonic() - began:.1f} s", flush=True)
        if beginning == VLLM and self._question:
            self._ask()

    def _ask(self) -> None:
        printed = self._finish(self._question)
        found = re.search(r"^\{.*\}$", printed, re.MULTILINE)
        if found is None or not (choices := json.loads(found[0]).get("choices")):
            sys.exit(f"{printed}\nthat is no completion")
        self.answers.append(choices[0]["text"])

    def _stop(self, beginning: str) -> None:
        server = self._servers.pop(beginning, None)
        if server is None:
            return
        if beginning == VLLM:
            server.wait_until_it_says(SAVED)
            self.logs.append(server.text())
        server.stop()


def main() -> None:
    (wheel,) = Path(sys.argv[1]).resolve().parent.glob(Path(sys.argv[1]).name)
    with tempfile.TemporaryDirectory(prefix="quick-start-") as scratch:
        home, directory, wheels, constraints = (Path(scratch) / name for name in ("home", "empty", "wheels", "pins"))
        for one in (home, directory, wheels):
            one.mkdir()
        shutil.copy(wheel, wheels)
        constraints.write_text(f"engine-loader=={wheel.name.split('-')[1]}\n")  # not a newer one of an index
        kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PIP_")}
        place = {
            "HOME": str(home),
            "TMPDIR": scratch,
            "PIP_CONSTRAINT": str(constraints),
            "PIP_FIND_LINKS": f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip(),
            "PIP_QUIET": "1",
        }
        terminal = Terminal(directory, {**kept, **place})
        try:
            for step in steps(DOCUMENT.read_text()):
                terminal.run(step)
        finally:
            terminal.stop()
    for number, (log, words) in enumerate(zip(terminal.logs, IN_LOGS, strict=True), start=1):
        for line in log.splitlines():
            if "b10_3fs: loaded" in line or "compile cache:" in line:
                print(f"start {number}: {line}")
        if missing := [one for one in words if one not in log]:
            sys.exit(f"{log[-6000:]}\nstart {number} does not say {missing}")
    if len(terminal.answers) != len(IN_LOGS) or len(set(terminal.answers)) != 1:
        sys.exit(f"the answers are not the same: {terminal.answers}")
    print(f"ok: docs/quick-start.md with {wheel.name}: {len(terminal.answers)} starts, the same answer")


if __name__ == "__main__":
    main()
