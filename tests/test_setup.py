"""The shell scripts: how they choose a Python and a jax, skip what is done, and stop when a stage fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train/setup.sh", "train/demo.sh", "tests/run.sh", ".ci/run"]
PIN = re.compile(r"^([\w.-]+)==([\w.]+)", re.MULTILINE)

# Plays an interpreter of version {version}: answers the probe, makes virtual environments with itself in them, and
# writes what pip and the stages are asked for into the file $CALLS.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m "*)
    echo "$*" >>"$CALLS"
    [[ $2 != "$FAIL" ]] || exit 3
    [[ $2 != "$HANG" ]] || {{ trap "exit 0" INT; sleep 60; }} ;;
  *import*sysconfig*) [[ " $* " == *" {minor} "* ]] && echo {version} || {{ echo "{version} is wrong" >&2; exit 1; }} ;;
esac
"""
BROKEN_SHIM = "#!/bin/bash\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def fake_python(version: str) -> str:
    return FAKE_PYTHON.format(version=version, minor=version.rpartition(".")[0])


class Machine:
    """A copy of the scripts in a folder with a space in its name, and a PATH with few real programs on it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "the clone"
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.calls = folder / "calls"
        for name in [
            *SCRIPTS,
            "train/stages.sh",
            *sorted(path.name for path in ROOT.glob("requirements*.txt")),
            "constraints.txt",
        ]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir()
        self.home.mkdir()
        # Without grep, setup.sh cannot look for a TPU: these tests go the same way on a machine that has one.
        for tool in ["bash", "cat", "cksum", "cp", "dirname", "ls", "mkdir", "rm", "sed", "sleep"]:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls), "FAIL": "", "HANG": ""} | extra

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / script), *arguments],
            cwd=self.home, env=self.environment(**environment), capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def dry_run(self, **environment: str) -> str:
        done = self.run("train/setup.sh", "--dry-run", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


@pytest.mark.parametrize("script", ["train/setup.sh", "train/demo.sh", "tests/run.sh"])
def test_help(machine: Machine, script: str) -> None:
    done = machine.run(script, "--help")
    assert done.returncode == 0 and f"bash {script} [--" in done.stdout and "set -" not in done.stdout


@pytest.mark.parametrize("script", ["train/setup.sh", "train/demo.sh"])
def test_unknown_argument_is_refused(machine: Machine, script: str) -> None:
    done = machine.run(script, "--qick")
    assert done.returncode != 0 and "--qick" in done.stderr


def test_every_direct_pin_is_in_the_constraints() -> None:
    def pins(name: str) -> dict[str, str]:
        return {package.lower().replace("_", "-"): pin for package, pin in PIN.findall((ROOT / name).read_text())}

    direct = pins("requirements.txt") | pins("requirements-dev.txt") | pins("requirements-tpu.txt")
    assert len(direct) >= 20
    assert direct.items() <= pins("constraints.txt").items()


def test_prefers_the_oldest_supported_python_on_the_path(machine: Machine) -> None:
    for version in ["3.11.9", "3.13.2", "3.14.0"]:
        write_script(machine.bin / f"python{version.rpartition('.')[0]}", fake_python(version))
    write_script(machine.bin / "python3", fake_python("3.12.7"))
    assert f"{machine.bin}/python3.13, Python 3.13.2" in machine.dry_run()
    write_script(machine.bin / "python3.12", fake_python("3.12.4"))
    assert f"{machine.bin}/python3.12, Python 3.12.4" in machine.dry_run()


def test_passes_a_broken_shim_by(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", BROKEN_SHIM)
    behind = machine.home / "behind"
    write_script(behind / "python3.12", fake_python("3.12.5"))
    assert f"{behind}/python3.12, Python 3.12.5" in machine.dry_run(PATH=f"{machine.bin}:{behind}")


@pytest.mark.parametrize("place", [".pyenv/versions/3.12.1/bin/python", "miniforge3/bin/python"])
def test_finds_a_python_that_is_not_on_the_path(machine: Machine, place: str) -> None:
    write_script(machine.bin / "python3", fake_python("3.11.2"))
    write_script(machine.home / place, fake_python("3.12.1"))
    assert f"{machine.home / place}, Python 3.12.1" in machine.dry_run()


def test_named_python_wins_or_is_refused(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    write_script(machine.home / "mine", fake_python("3.13.1"))
    assert "/mine, Python 3.13.1" in machine.dry_run(PYTHON=str(machine.home / "mine"))
    write_script(machine.home / "old", fake_python("3.9.1"))
    done = machine.run("train/setup.sh", PYTHON=str(machine.home / "old"))
    assert done.returncode == 1 and "/old: 3.9.1" in done.stderr and not (machine.root / ".venv").exists()


def test_says_what_it_tried_when_no_python_fits(machine: Machine) -> None:
    none = machine.run("train/setup.sh")
    assert none.returncode == 1 and "nothing: there is no python" in none.stderr
    write_script(machine.bin / "python3.12", BROKEN_SHIM)
    write_script(machine.bin / "python3", fake_python("3.11.2"))
    some = machine.run("train/setup.sh")
    assert some.returncode == 1 and "apt-get install" in some.stderr
    assert f"{machine.bin}/python3.12: pyenv: python3.12: command not found" in some.stderr
    assert f"{machine.bin}/python3: 3.11.2" in some.stderr


def test_probe_accepts_and_refuses_real_interpreters() -> None:
    probe = re.search(r"^probe='(.*?)'$", (ROOT / "train/setup.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert probe

    def ask(program: str, *versions: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-E", "-c", program, *versions], capture_output=True, text=True, timeout=120
        )

    here = "{}.{}".format(*sys.version_info)
    assert ask(probe[1], here).stdout.startswith(here + ".")
    assert "is not one of 2.6, 2.7" in ask(probe[1], "2.6", "2.7").stderr
    without_ensurepip = "import sys; sys.modules['ensurepip'] = None\n" + probe[1]
    refused = ask(without_ensurepip, here)
    assert refused.returncode == 1 and "lacks the modules: ensurepip" in refused.stderr


@pytest.mark.parametrize(
    ("smi", "extra"),
    [
        ("580.65.06, 9.0", "cuda13"),
        ("595.10, 12.0\n595.10, 12.0", "cuda13"),
        ("580.95.05, 7.0", "cuda12"),
        ("570.124.06, 9.0", "cuda12"),
        ("525.60.13, 8.0", "cuda12"),
        ("470.256.02, 8.0", "cpu"),
        ("580.65.06, [N/A]", "cuda13"),
        ("", "cpu"),
        ("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", "cpu"),
    ],
)
def test_jax_fits_the_nvidia_driver(machine: Machine, smi: str, extra: str) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    write_script(machine.bin / "nvidia-smi", f"#!/bin/bash\necho '{smi}'\n")
    assert machine.dry_run().endswith(f"jax for {extra}\n")


def test_jax_fits_a_tpu_and_can_be_chosen(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    assert machine.dry_run(PJRT_DEVICE="TPU").endswith("jax for tpu\n")
    assert machine.dry_run(JAX_PLATFORM_EXTRA="cuda12", PJRT_DEVICE="TPU").endswith("jax for cuda12\n")
    done = machine.run("train/setup.sh", JAX_PLATFORM_EXTRA="rocm")
    assert done.returncode == 1 and "JAX_PLATFORM_EXTRA=rocm" in done.stderr


def test_second_run_installs_nothing(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    first = machine.run("train/setup.sh")
    assert first.returncode == 0, first.stderr
    (install,) = machine.called()
    assert "-c constraints.txt -r requirements.txt jax[cpu]" in install

    started = time.perf_counter()
    assert machine.run("train/setup.sh").returncode == 0
    assert time.perf_counter() - started < 2
    assert len(machine.called()) == 1

    machine.run("train/setup.sh", "--dev")
    assert len(machine.called()) == 2 and "-r requirements-dev.txt" in machine.called()[1]
    (machine.root / "requirements.txt").write_text("jax==0.0.1\n")
    machine.run("train/setup.sh")
    assert len(machine.called()) == 3


def test_the_compiler_for_tpus_lies_beside_the_packages(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    for _ in range(2):
        assert machine.run("train/setup.sh", "--preflight").returncode == 0
    _, libtpu = machine.called()
    assert "-r requirements-tpu.txt" in libtpu and libtpu.endswith(f"--target {machine.root}/.venv/libtpu --upgrade")
    machine.run("train/setup.sh", "--preflight", JAX_PLATFORM_EXTRA="tpu")
    assert sum("requirements-tpu.txt" in call for call in machine.called()) == 1  # a TPU has its own


@pytest.mark.parametrize(
    ("user", "calls"), [("0", ["update -qq", "install -qq --yes --no-install-recommends chromium"]), ("1000", [])]
)
def test_root_gets_a_browser_and_others_are_told_how(machine: Machine, user: str, calls: list[str]) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    write_script(machine.bin / "id", f"#!/bin/bash\necho {user}\n")
    write_script(machine.bin / "apt-get", '#!/bin/bash\necho "apt-get $*" >>"$CALLS"\n')
    done = machine.run("tests/run.sh", "--no-demo")
    assert [call.removeprefix("apt-get ") for call in machine.called() if call.startswith("apt-get")] == calls
    assert "apt-get install chromium, or .venv/bin/python -m playwright install chromium" in done.stderr
    write_script(machine.bin / "chromium", "#!/bin/bash\n")
    assert "chromium" not in machine.run("tests/run.sh", "--no-demo").stderr


def test_failed_installation_is_done_again(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    failed = machine.run("train/setup.sh", FAIL="pip")
    assert failed.returncode == 1 and "pip could not install requirements.txt" in failed.stderr
    assert machine.run("train/setup.sh").returncode == 0
    assert len(machine.called()) == 2

    requirements = machine.root / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text("jax==0.0.1\n")
    assert machine.run("train/setup.sh", FAIL="pip").returncode == 1
    requirements.write_text(before)  # what the failed installation left is not what was there before it
    machine.run("train/setup.sh")
    assert len(machine.called()) == 4


def test_environment_is_made_anew_when_it_must(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    write_script(machine.bin / "python3.13", fake_python("3.13.1"))
    assert "there is none yet" in machine.run("train/setup.sh").stdout
    write_script(machine.root / ".venv/bin/python", BROKEN_SHIM)
    assert "does not work" in machine.run("train/setup.sh").stdout
    assert "has Python 3.12.5" in machine.run("train/setup.sh", PYTHON="python3.13").stdout
    assert "making" not in machine.run("train/setup.sh", JAX_PLATFORM_EXTRA="cuda12").stdout
    # jax for a GPU serves a CPU as well, but not another accelerator
    assert "jax for cuda12" in machine.run("train/setup.sh").stdout
    assert "present one has jax for cuda12" in machine.run("train/setup.sh", JAX_PLATFORM_EXTRA="cuda13").stdout


def test_demo_calls_every_stage_in_turn(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    done = machine.run("train/demo.sh", "--quick", "--out", "my runs")
    assert done.returncode == 0, done.stderr
    stages = [call.split()[1].removeprefix("train.") for call in machine.called()]
    base = ["pip", "tokenizer", "prepare", "pretrain", "evaluate", "sample"]
    chat = ["sft", "evaluate", "pairs", "dpo", "evaluate", "rl", "evaluate", "serve.cli", "report"]
    assert stages == base + chat
    assert machine.called()[-1].endswith(f"--run {machine.home}/my runs/quick")
    assert "[15/15] report" in done.stdout and "Everything lies in" in done.stdout


def test_demo_stops_at_a_failing_stage_and_says_how_to_go_on(machine: Machine) -> None:
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    done = machine.run("train/demo.sh", "--run", "a b", FAIL="train.prepare")
    assert done.returncode == 3
    assert "Stage 3 of 15, prepare, failed with exit status 3" in done.stderr
    assert done.stderr.endswith("demo.sh --run a\\ b\n")
    assert machine.called()[-1].startswith("-m train.prepare")


def test_interrupted_demo_does_not_go_on(machine: Machine) -> None:
    """The stage at work ends well on Ctrl-C, having saved; bash alone would then start the next one."""
    write_script(machine.bin / "python3.12", fake_python("3.12.5"))
    demo = subprocess.Popen(
        ["bash", str(machine.root / "train/demo.sh")],
        env=machine.environment(HANG="train.pretrain"), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("train.pretrain" in call for call in machine.called()):
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    _, errors = demo.communicate(timeout=120)
    assert demo.returncode == 130 and "Interrupted." in errors and "To go on from here" in errors
    assert machine.called()[-1].startswith("-m train.pretrain")
