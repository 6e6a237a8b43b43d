"""The folder that a Docker image or a Space is built in: what it holds fits together, and its entry point serves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from test_app import free_port
from test_cli_chat import runs  # noqa: F401

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.errors import UserError
from serve import deploy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory) -> Path:  # noqa: F811
    return deploy.main(deploy.Config(runs / "demo" / "rl", tmp_path_factory.mktemp("deploy") / "new" / "image"))


@pytest.fixture(scope="module")
def steps(folder) -> list[tuple[str, str]]:
    """The Dockerfile's instructions."""
    text = re.sub(r"^#.*\n", "", (folder / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [(name, rest) for line in text.splitlines() if line for name, _, rest in [line.partition(" ")]]


def test_what_is_installed_is_what_is_tested(folder, steps):
    for name in (
        "requirements.txt",
        "constraints.txt",
        "train/setup.sh",
        "serve/app.py",
        "nanochat_jax/safety_policy.toml",
    ):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    [base] = [rest for name, rest in steps if name == "FROM"]
    versions = re.search(r"^versions=\((.*)\)$", (ROOT / "train/setup.sh").read_text(), re.MULTILINE)
    assert versions and base.removeprefix("python:").partition("-")[0] == versions[1].split()[0]
    assert ("RUN", "bash train/setup.sh") in steps
    before_setup = steps[: steps.index(("RUN", "bash train/setup.sh"))]
    for name in ("requirements.txt", "constraints.txt", "train/setup.sh"):
        assert any(step == "COPY" and name in rest.split() for step, rest in before_setup)
    for step, rest in steps:
        if step == "COPY":
            assert all((folder / source).exists() for source in rest.split()[1:-1])
    found = subprocess.run(
        ["bash", folder / "train/setup.sh", "--dry-run"],
        capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable, "JAX_PLATFORM_EXTRA": "cpu"},
    )  # fmt: skip
    assert found.returncode == 0 and "jax for cpu" in found.stdout, found.stderr


def test_ports_agree_and_the_space_is_built_by_the_dockerfile(folder, steps):
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (header["sdk"], header["title"]) == ("docker", "nanochat") and {"emoji", "colorFrom", "colorTo"} <= set(
        header
    )
    command = json.loads(dict(steps)["ENTRYPOINT"])
    [exposed] = [rest for name, rest in steps if name == "EXPOSE"]
    assert str(header["app_port"]) == exposed == command[command.index("--port") + 1]
    assert f":{exposed}/healthz" in dict(steps)["HEALTHCHECK"]


def test_the_model_goes_without_its_optimizer(folder):
    checkpoint = Checkpoints(folder / "runs/demo/rl/checkpoints").peek()
    assert checkpoint and {name.partition("/")[0] for name in checkpoint.arrays} == {"params"}
    assert not [*folder.rglob("__pycache__"), *folder.parent.glob(".*")]


def test_the_entry_point_serves_page_and_api_and_ends_when_told(folder, steps, tmp_path):
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    port = str(free_port())
    command = [port if part == "7860" else part for part in json.loads(dict(steps)["ENTRYPOINT"])]
    environment = os.environ | {"SPACE_ID": "ann/nanochat", "NANOCHAT_API_KEY": "secret", "PYTHONPATH": ""}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout and "chat at" in server.stdout.readline()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            page = client.get("/")
            assert page.status_code == 200 and "https://huggingface.co" in page.headers["content-security-policy"]
            assert client.get("/healthz").json()["status"] == "ok" and client.get("/v1/models").status_code == 401
            body = {"model": "demo/rl", "messages": [{"role": "user", "content": "hello"}]}
            answer = client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer secret"})
            assert answer.json()["choices"][0]["message"]["content"] == "yk"
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert server.wait(timeout=30) == 0 and time.monotonic() - began < 10  # then Docker would kill it
    finally:
        server.kill()
        shutil.rmtree(folder / ".venv")


def test_nothing_is_overwritten_and_nothing_half_written_left(runs, folder, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="exists"):
        deploy.main(deploy.Config(runs / "demo" / "rl", folder))
    with pytest.raises(UserError, match="no checkpoint"):
        deploy.main(deploy.Config(runs, tmp_path / "new"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deploy.shutil, "copytree", full)
    with pytest.raises(UserError, match="No space left"):
        deploy.main(deploy.Config(runs / "demo" / "rl", tmp_path / "new"))
    assert not list(tmp_path.iterdir())
