"""Compiling in another process, which may abort, hang or print without end, and takes nobody with it."""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as pipe
from typing import Any

from kpx.errors import CompileError, TargetError
from kpx.hardware import cpu, gpu, plugins, tpu
from kpx.hardware.target import Target

Progress = Callable[[float, int], None]
"""Called now and then while a worker compiles, with the seconds so far and the bytes that it holds."""

_STARTUP_SECONDS = 120
_LAST_WORDS = 12  # lines
_LOG_BYTES = 1 << 20
_TICK_SECONDS = 0.2  # between reports of progress


class Worker:
    """A process that compiles with one vendor's compiler, started when first asked and again where it died."""

    def __init__(
        self,
        platform: str,
        environment: dict[str, str],
        paths: list[str],
        stubs: list[str],
        python: str = sys.executable,
    ):
        self._platform = platform
        self._python = python
        self._environment = environment
        self._paths = paths
        self._stubs = stubs
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen, Connection] | None = None
        file, self._log = tempfile.mkstemp(prefix="kpx-worker-", suffix=".log")
        os.close(file)

    def ask(self, request: dict[str, Any], limit_s: float, progress: Progress | None = None) -> dict[str, Any]:
        """The worker's answer to a request.

        Raises:
            CompileError: the compiler refused the module, aborted, or took longer than the limit.
        """
        with self._lock:
            if os.path.getsize(self._log) > _LOG_BYTES:
                os.truncate(self._log, 0)
            process, connection = self._process()
            try:
                connection.send(request)
            except OSError:
                raise self._died(process) from None
            answer = self._receive(process, connection, limit_s, progress)
        if "error" in answer:
            raise CompileError(answer["error"])
        return answer

    def stop(self) -> None:
        """Ends the process; the next request starts another."""
        if self._running is None:
            return
        process, connection = self._running
        self._running = None
        connection.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Ends the process for good."""
        self.stop()
        pathlib.Path(self._log).unlink(missing_ok=True)

    def _process(self) -> tuple[subprocess.Popen, Connection]:
        if self._running is not None and self._running[0].poll() is None:
            return self._running
        self.stop()
        ours, theirs = pipe()
        settings = {"pipe": theirs.fileno(), "platform": self._platform, "stubs": self._stubs}
        if self._python == sys.executable:
            path = os.pathsep.join([*self._paths, *(p for p in sys.path if p)])
            script = ["-m", "kpx.hardware.worker_main"]
        else:
            path, script = "", [str(pathlib.Path(__file__).with_name("worker_elsewhere.py"))]
        os.truncate(self._log, 0)  # an earlier process's words are not this one's
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [self._python, "-P", *script, json.dumps(settings)],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so that what it starts ends with it
            )
        theirs.close()
        self._running = process, ours
        self._receive(process, ours, _STARTUP_SECONDS, None)
        return self._running

    def _receive(
        self, process: subprocess.Popen, connection: Connection, limit_s: float, progress: Progress | None
    ) -> dict[str, Any]:
        started = time.monotonic()
        try:
            while not connection.poll(min(_TICK_SECONDS, limit_s)):
                elapsed = time.monotonic() - started
                if elapsed >= limit_s:
                    words = self._last_words()
                    self.stop()
                    raise CompileError(
                        f"The compiler for {self._platform} had not ended after {limit_s:g} seconds, and was stopped. Raise "
                        f"the limit with `kpx.Config(compile_seconds=...)`.{words}"
                    )
                if progress is not None:
                    progress(elapsed, _resident_bytes(process.pid))
            return connection.recv()
        except (EOFError, OSError):
            raise self._died(process) from None
        except KeyboardInterrupt:
            self.stop()  # it is in the middle of a request
            raise

    def _died(self, process: subprocess.Popen) -> CompileError:
        code = process.wait()
        words = self._last_words()
        self.stop()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return CompileError(
            f"The compiler for {self._platform} aborted: its process {how}. Your process goes on, and the next compile "
            f"starts another.{words}"
        )

    def _last_words(self) -> str:
        with open(self._log, "rb") as log:
            log.seek(max(os.path.getsize(self._log) - 8192, 0))
            lines = log.read().decode(errors="replace").strip().splitlines()
        lines = [
            line[:400] for line in lines if line.strip() and not line.startswith("***")
        ]  # less an empty stack trace
        kept = lines[-_LAST_WORDS:]
        return "\nIts last words:\n" + "\n".join(kept) if kept else ""


def _resident_bytes(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


_WORKERS: dict[tuple[str, str | None], Worker] = {}
_LOCK = threading.Lock()


def worker(target: Target) -> Worker:
    """The worker that compiles for a target.

    Raises:
        TargetError: the vendor's compiler is not installed; the command that installs it is in the error.
    """
    with _LOCK:
        key = target.platform, target.isa
        if key not in _WORKERS:
            _WORKERS[key] = _make(target)
        return _WORKERS[key]


def _make(target: Target) -> Worker:
    platform = target.platform
    if platform == "cpu":
        isa = {} if target.isa is None else {"XLA_FLAGS": f"--xla_cpu_max_isa={cpu.ISAS[target.isa]}"}
        return Worker(platform, isa, [], [])
    if (paths := plugins.find(platform)) is None:
        raise TargetError(
            f"The compiler for `{target}` is not installed. Install it (about {plugins.plugin(platform).size} MB, into a "
            f"folder of kpx's own): `{plugins.install_command(platform)}`."
        )
    stubs = [str(stub) for stub in plugins.drivers(platform)]
    environment = tpu.ENVIRONMENT if platform == "tpu" else gpu.ENVIRONMENT
    return Worker(platform, environment, paths, stubs, plugins.python(platform))


@atexit.register
def close_all() -> None:
    """Ends every worker."""
    with _LOCK:
        while _WORKERS:
            _WORKERS.popitem()[1].close()
