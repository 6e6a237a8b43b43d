"""The sandbox: right programs pass, wrong ones fail, and hostile ones end without a trace."""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat_jax import sandbox
from nanochat_jax.sandbox import Limits, Result, run_python

QUICK = Limits(seconds=1.0)


def run(code: str) -> Result:
    return run_python(code)


@pytest.fixture(scope="module")
def held() -> tuple[str, ...]:
    return run("pass").held


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_right_program():
    result = run("import math, collections, re\nassert math.isqrt(9) == 3\nprint('é')")
    assert result.ok and result.output == "é\n" and result.seconds < 10


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ""),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import numpy", "ModuleNotFoundError"),
        ("input()", "EOFError"),
        ("\0", "null bytes"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_wrong_programs(code, output):
    result = run(code)
    assert result.status == "error" and output in result.output


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os, time; os.setsid(); time.sleep(60)",
        "import signal\nfor n in range(1, 32):\n  if n not in (9, 19): signal.signal(n, signal.SIG_IGN)"
        "\nwhile True: pass",
    ],
)
def test_looping_ends_in_time(code):
    result = run_python(code, QUICK)
    assert result.status == "timeout" and result.seconds < 6


def test_forking_leaves_nothing_behind(held, tmp_path):
    copy = tmp_path / "sandbox_copy.py"  # a name that no other test's processes have
    copy.write_text(Path(sandbox.__file__).read_text())
    if "processes" in held or "descendants" in held:
        own = runpy.run_path(str(copy), run_name="sandbox_copy")
        program = "import os, time\nfor _ in range(6): os.fork()\nos.setsid()\ntime.sleep(60)"
        result = own["run_python"](program, own["Limits"](seconds=5.0))
        assert not result.ok and ("processes" not in held or "BlockingIOError" in result.output)
        deadline = time.monotonic() + 30  # of themselves they would sleep for 60
        while processes_with(copy.name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_subprocess_and_threads(held):
    if "processes" in held:
        assert "BlockingIOError" in run("import subprocess; subprocess.run(['true'])").output
        assert "can't start new thread" in run("import threading; threading.Thread().start()").output


@pytest.mark.parametrize("code", ["x = [0] * 10**9", "x = []\nwhile True: x.append(bytes(10**6))"])
def test_memory(code, held):
    assert "memory" in held and "MemoryError" in run(code).output


def test_flood_is_cut():
    result = run("while True: print('x' * 1000)")
    assert result.status == "error" and len(result.output) <= QUICK.output_bytes
    assert run("print('x' * 10)").ok


def test_files(held, tmp_path):
    assert run("import os\nopen('a', 'w').write('x' * 1000)\nassert os.listdir() == ['a']").ok
    assert run("import os; assert os.listdir() == []").ok
    assert "File too large" in run("open('a', 'w').write('x' * 10**7)").output
    if "files" in held:
        assert "Read-only file system" in run(f"open({str(tmp_path / 'a')!r}, 'w')").output
        many = "n = 0\nwhile True:\n  open(str(n), 'w').write('x' * 60000); n += 1"
        assert "No space left" in run(many).output


def test_another_program_in_its_place_gets_no_rights(held, tmp_path):
    """execve gives a uid 0 all that its namespace has to give, if it is let."""
    if "files" in held:
        taken = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
rights = open("/proc/self/status").read().partition("CapEff:")[2].split()[0]
writable = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
changed = libc.syscall(442, -100, b"/", 0x8000, writable, 32)
mounted = libc.mount(b"tmpfs", os.getcwd().encode(), b"tmpfs", ctypes.c_ulong(0), b"size=2g")
assert (int(rights, 16), changed, mounted) == (0, -1, -1), (rights, changed, mounted)
"""
        exec_it = f"import os, sys\nos.execv({sys.executable!r}, ['python', '-I', '-S', '-c', {taken!r} + CHECK])"
        victim = tmp_path / "a"
        written = run(exec_it.replace("CHECK", repr(f"open({str(victim)!r}, 'w')"))).output
        assert "Read-only file system" in written and not victim.exists(), written
        assert run(f"import os\nos.unshare(os.CLONE_NEWUSER)\n{taken}").status == "error"


def test_network(held):
    if "network" in held:
        result = run("import socket; socket.create_connection(('127.0.0.1', 9), 1)")
        assert "Network is unreachable" in result.output


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    result = run(
        "import os, sys\nprint([k for k in os.environ if k != 'LC_CTYPE'], [p for p in sys.path if 'site' in p])"
    )
    assert result.output == "[] []\n"


def test_cannot_end_its_keeper_with_success(held):
    if "descendants" in held:
        assert not run_python("import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nwhile True: pass", QUICK).ok


def test_without_namespaces(monkeypatch, tmp_path):
    script = tmp_path / "python"
    code = "import os, runpy, sys; vars(os).pop('unshare', 0); runpy.run_path(sys.argv[2], run_name='__main__')"
    # -I -S -X utf8 FILE FD: the program sees FILE and FD as its own arguments
    script.write_text(f'#!/bin/sh\nshift 4\nexec {sys.executable} -I -S -X utf8 -c "{code}" "$2" "$1"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    result = run("print('fine')")
    assert result.ok and "network" not in result.held and "memory" in result.held
    assert ("processes" in result.held) == (os.getuid() != 0)
    assert run_python("while True: pass", QUICK).status == "timeout"


def test_a_sandbox_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start"):
        run("pass")


def test_works_in_threads():
    results: list[Result] = []
    threads = [threading.Thread(target=lambda n=n: results.append(run(f"print({n})"))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.output for result in results) == [f"{n}\n" for n in range(4)]
