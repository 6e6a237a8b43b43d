"""train/tpu_pod.sh: its gcloud commands have the form that gcloud knows, and it sees a run through preemptions.

There is no gcloud here: a stand-in writes down what it is asked for and answers from a script.
"""

import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nanochat_jax import tpu

ROOT = Path(__file__).parent.parent

# By subcommand of gcloud compute tpus: its positional arguments, flags that it must be given, and all that it knows
# here. Source: reference of the Google Cloud CLI, gcloud compute tpus queued-resources and tpu-vm.
PLACE = {"--zone", "--project"}
COMMANDS = {
    ("queued-resources", "create"): (
        1,
        {"--accelerator-type", "--runtime-version"},
        {"--node-id", "--node-count", "--node-prefix", "--spot", *PLACE},
    ),
    ("queued-resources", "describe"): (1, {"--format"}, PLACE),
    ("queued-resources", "delete"): (1, {"--force", "--quiet"}, PLACE),
    ("tpu-vm", "describe"): (1, {"--format"}, PLACE),
    ("tpu-vm", "ssh"): (1, {"--worker", "--command"}, {"--batch-size", *PLACE}),
    ("tpu-vm", "scp"): (2, {"--worker"}, PLACE),
}
SWITCHES = {"--spot", "--force", "--quiet"}

# $ANSWERS holds a line for each question about the state and the run in turn; an empty one is a failure.
FAKE_GCLOUD = """#!/bin/bash
printf '%q ' gcloud "$@" >>"$CALLS"; echo >>"$CALLS"
[[ " $* " == *" create "* && -n $FAIL_CREATE ]] && exit 1
[[ " $* " == *" describe "* || "$*" == *run.exit\\ ]* ]] || exit 0
answer=$(sed -n 1p "$ANSWERS"); sed -i 1d "$ANSWERS"
[[ -n $answer ]] && echo "$answer"
"""


def pod(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "train/tpu_pod.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def check_form(line: str) -> tuple[tuple[str, str], dict[str, str], list[str]]:
    """The subcommand, flags and positional arguments of a command, all of which gcloud would take."""
    words = shlex.split(line)
    assert words[:3] == ["gcloud", "compute", "tpus"]
    subcommand = (words[3], words[4])
    positional, needed, known = COMMANDS[subcommand]
    flags = dict(word.partition("=")[::2] for word in words[5:] if word.startswith("--"))
    rest = [word for word in words[5:] if not word.startswith("--")]
    assert len(rest) == positional, line
    assert needed <= set(flags) <= needed | known, line
    assert all(bool(value) == (name not in SWITCHES) for name, value in flags.items()), line
    return subcommand, flags, rest


@pytest.mark.parametrize("slices", ["1", "3"])
@pytest.mark.parametrize("place", [[], ["--zone", "us-east5-a", "--project", "mine", "--spot", "--bucket", "gs://b"]])
@pytest.mark.parametrize(
    "command", ["create", "install", "run train.pretrain --data gs://b/d", "logs", "status", "stop", "delete", "keep x"]
)
def test_commands_have_the_form_that_gcloud_knows(command, place, slices):
    done = pod("--dry-run", "--name", "n", "--type", "v5p-128", "--slices", slices, *place, *command.split())
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in (done.stdout + done.stderr).replace("\\\n", "\n").splitlines() if line.startswith("gcloud")
    ]
    checked = [check_form(line) for line in lines]
    assert checked
    for _, flags, _ in checked:
        assert (flags.get("--zone"), flags.get("--project")) == (("us-east5-a", "mine") if place else (None, None))
    if command.split()[0] in ("install", "run", "stop"):
        nodes = {rest[-1].rstrip(":") for _, _, rest in checked}
        assert nodes == ({"n"} if slices == "1" else {"n-0", "n-1", "n-2"})
    if command == "create":
        flags = checked[0][1]
        assert flags["--runtime-version"] == "v2-alpha-tpuv5" and ("--spot" in flags) == bool(place)
        several = {"--node-count": "3", "--node-prefix": "n"}
        assert (several if slices == "3" else {"--node-id": "n"}).items() <= flags.items()


def test_a_run_keeps_its_arguments_and_its_compiled_programs():
    done = pod("--dry-run", "--bucket", "gs://b", "run", "train.pretrain", "--prompts", "It's a", "$HOME")
    (line,) = done.stdout.splitlines()
    remote = check_form(line)[1]["--command"]
    started = remote[remote.index("setsid nohup bash -c ") :]
    inner = shlex.split(started)[4]
    assert shlex.split(inner.partition(";")[0]) == [
        "env", "JAX_COMPILATION_CACHE_DIR=gs://b/xla", "python", "-m", "train.pretrain", "--prompts", "It's a", "$HOME",
    ]  # fmt: skip


class Cloud:
    """A gcloud that answers by script, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.answers = folder / "calls", folder / "answers"
        gcloud = folder / "bin" / "gcloud"
        gcloud.parent.mkdir()
        gcloud.write_text(FAKE_GCLOUD)
        gcloud.chmod(0o755)
        self.environment = {
            "PATH": f"{gcloud.parent}:{os.environ['PATH']}", "CALLS": str(self.calls), "ANSWERS": str(self.answers),
            "POLL_SECONDS": "0", "FAIL_CREATE": "",
        }  # fmt: skip

    def keep(self, *answers: str) -> subprocess.CompletedProcess:
        self.answers.write_text("".join(f"{answer}\n" for answer in answers))
        return pod("--name", "n", "--type", "v6e-8", "keep", "train.pretrain", "--steps", "5", **self.environment)

    def asked(self) -> list[str]:
        """What changed something, by its subcommand."""
        found = []
        for line in self.calls.read_text().splitlines():
            (_, subcommand), flags, _ = check_form(line)
            if subcommand == "ssh":
                command = flags["--command"]
                subcommand = "run" if "setsid" in command else "install" if "setup.sh" in command else "ask"
            if subcommand not in ("describe", "ask"):
                found.append(subcommand)
        return found


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_keep_sees_a_run_through_a_preemption(cloud):
    done = cloud.keep(
        "", "WAITING_FOR_RESOURCES", "ACTIVE",  # nothing there: asked for, waited for
        "ACTIVE", "none", "ACTIVE", "running",  # started
        "ACTIVE", "", "READY", "SUSPENDING", "SUSPENDED",  # no answer: taken away
        "", "ACTIVE", "ACTIVE", "none", "ACTIVE", "running",  # asked for anew, and started
        "ACTIVE", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cloud.asked() == ["create", "scp", "install", "run", "delete", "create", "scp", "install", "run"]
    assert "ended well" in done.stderr


def test_a_slice_that_is_gone_is_replaced_even_if_its_request_is_still_said_to_be_active(cloud):
    done = cloud.keep("ACTIVE", "running", "ACTIVE", "", "PREEMPTED", "", "ACTIVE", "ACTIVE", "none", "ACTIVE", "0")
    assert done.returncode == 0, done.stderr
    assert cloud.asked() == ["delete", "create", "scp", "install", "run"]


def test_a_run_that_was_told_to_end_goes_on_however_often(cloud):
    done = cloud.keep(*["ACTIVE", "143"] * 5, "ACTIVE", "0")
    assert done.returncode == 0, done.stderr
    assert cloud.asked() == ["run"] * 5


def test_keep_gives_up_on_a_run_that_fails_again_and_again(cloud):
    done = cloud.keep(*["ACTIVE", "1"] * 4)
    assert done.returncode == 2 and "failed 4 times, last with status 1" in done.stderr
    assert cloud.asked() == ["run"] * 3


# A worker at hand: does what ssh would do there.
FAKE_WORKER = """#!/bin/bash
for argument; do
  [[ $argument == --command=* ]] && cd "$WORKER" && exec bash -c "${argument#--command=}"
done
"""
FAKE_STAGE = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(sys.argv[1:], os.environ["JAX_COMPILATION_CACHE_DIR"], flush=True)
time.sleep(100)
"""


def test_on_a_worker_runs_start_once_and_stop_when_told(tmp_path):
    checkout, bin_folder = tmp_path / "worker" / "nanochat-jax", tmp_path / "bin"
    (checkout / ".venv/bin").mkdir(parents=True)
    bin_folder.mkdir()
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    (checkout / "train").mkdir()
    (checkout / "train/stage.py").write_text(FAKE_STAGE)
    (checkout / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (bin_folder / "gcloud").write_text(FAKE_WORKER)
    (bin_folder / "gcloud").chmod(0o755)
    environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "WORKER": str(tmp_path / "worker")}

    def status() -> str:
        return pod("status", **environment).stdout.split()[-1]

    def wait_for(ask: Callable[[], str], wanted: str) -> None:
        deadline = time.monotonic() + 100
        while ask() != wanted:
            assert time.monotonic() < deadline, f"{ask()}, not {wanted}"
            time.sleep(0.2)

    assert status() == "none"
    assert pod("--bucket", "gs://b", "run", "train.stage", "--a", "it's", **environment).returncode == 0
    assert status() == "running"
    second = pod("run", "train.sft", **environment)
    assert second.returncode == 3 and "stop it first" in second.stderr
    wait_for((checkout / "run.log").read_text, "['--a', \"it's\"] gs://b/xla\n")
    assert pod("stop", **environment).returncode == 0
    wait_for(status, "7")


def test_create_says_when_a_request_comes_to_nothing(cloud):
    cloud.answers.write_text("WAITING_FOR_RESOURCES\nFAILED\n")
    done = pod("--type", "v4-32", "create", **cloud.environment)
    assert done.returncode == 1 and "came to nothing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create"], "--type is needed"),
        (["--type", "v9-8", "create"], "--type v9-8 is not known; known are v4-N"),
        (["--slices", "two", "--type", "v4-8", "create"], "--slices two must be a number"),
        (["--bucket", "/disk", "logs"], "must begin with gs://"),
        (["--name"], "--name needs a value"),
        (["--what", "logs"], "unknown option --what"),
        (["start"], "unknown command start"),
        (["run"], "run what?"),
        ([], "what to do?"),
    ],
)
def test_bad_input_is_told(cloud, arguments, message):
    done = pod(*arguments, **cloud.environment)
    assert done.returncode == 2 and message in done.stderr


def test_without_gcloud_it_says_where_to_get_it(tmp_path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(
        ["/bin/bash", str(ROOT / "train/tpu_pod.sh"), "logs"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_help_lists_the_commands():
    done = pod("--help")
    assert done.returncode == 0 and "bash train/tpu_pod.sh [options] keep COMMAND" in done.stdout


def test_the_jobset_has_a_host_for_every_four_chips():
    jobset = yaml.safe_load((ROOT / "train/gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec, pod_spec = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod_spec["containers"]
    shape = pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts, rest = divmod(math.prod(map(int, shape.split("x"))), container["resources"]["limits"]["google.com/tpu"])
    assert (spec["parallelism"], spec["completions"], rest) == (hosts, hosts, 0)
    assert shape in tpu.CHIPS["v5p"].known and pod_spec["restartPolicy"] == "Never"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_slurm_script_starts_the_module_it_is_given(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "12",
    }
    command = ["bash", str(ROOT / "train/slurm.sh"), "train.sft", "--run.out", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[1:6] == ["--cpus-per-task=12", ".venv/bin/python", "-m", "train.sft", "--run.out"]
    assert subprocess.run(command, capture_output=True, env=os.environ | {"SLURM_SUBMIT_DIR": ""}).returncode != 0
