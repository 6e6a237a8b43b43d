"""The documentation's commands, as tests/commands.py finds and sorts them: each means something, most are run."""

import contextlib
import gzip
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hub_server, rehearsal
from tests.commands import MODULE, ROOT, SMALL, blocks, commands, config_of, how, module_of, own_data, written
from tests.test_hub import use
from train.launch import free_port

OTHERS = set("source cd pip tensorboard curl docker hf xpk sed ruff jupytext jupyter".split())  # noqa: SIM905


def check(words: list[str]) -> None:
    program, *arguments = words = [word.replace("$!", "1") for word in words]
    at = next((i for i, word in enumerate(words) if MODULE.fullmatch(word)), None)
    if at is not None:
        own, _, others = " ".join(words[at + 1 :]).partition(" -- ")
        arguments = words[at + 1 :][: len(shlex.split(own)) if others else None]
        if any(word.startswith("--") for word in arguments):  # else a sentence names the program
            config_of(words[at], arguments)
        assert importlib.util.find_spec(words[at]), words[at]
        if others:
            check(others.split())
    elif program == "xpk":
        for inner in commands(arguments[arguments.index("--command") + 1]):
            check(inner)
    elif program in ("bash", "sbatch") or program.endswith((".sh", "/run")):
        script, *arguments = words if program not in ("bash", "sbatch") else arguments
        text = (ROOT / script).read_text()
        for flag in (word for word in arguments if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), f"{script} knows no {flag}"
    elif program.endswith("python") and arguments[0] == "-c":
        compile(arguments[1], "docs", "exec")
    elif program.endswith("python") and arguments[:2] == ["-m", "pytest"]:
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        for word in arguments[2:]:
            assert "/" not in word or (ROOT / word.partition("::")[0]).exists(), word
        if "-m" in arguments[2:]:
            named = re.findall(r"\w+", arguments[arguments.index("-m", 2) + 1])
            assert {*named} - {"not", "and", "or"} <= {marker.partition(":")[0] for marker in markers}
    elif program.endswith("python"):
        assert arguments[0] == "-m" and importlib.util.find_spec(arguments[1]), words
    else:
        assert program.startswith("$") or program.removeprefix(".venv/bin/") in OTHERS, (
            f"{program}: check it here, or add it to OTHERS"
        )


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(*pair, id=f"{how(*pair)[:30]}: {pair[0]}: {pair[1][:60]}") for pair in written()]
)
def test_command_means_something(page: str, command: str) -> None:
    assert how(page, command) != "unknown", "say in SMALL or NOT_HERE how it is run, or why it is not"
    try:
        check(shlex.split(command))
    except SystemExit:
        pytest.fail(f"{page}: the command line is refused: {command}")


def test_mistakes_are_found() -> None:
    for wrong in (
        "python -m train.sample --checkpoint runs/x --promt y", "python -m train.nothing --a b", "sudo reboot",
        "bash train/demo.sh --fast", "bash train/missing.sh", "python -m pytest -m quick", "python -m nonsense",
        "python -m pytest tests/test_nothing.py", "xpk workload create --command 'bash train/missing.sh'",
    ):  # fmt: skip
        with pytest.raises((SystemExit, AssertionError, ImportError, OSError)):
            check(shlex.split(wrong))
    text = "S=/s N=2 python -m a.b --c 'd#e' $S \\\n  --f  # it's a comment\nx | y && z &\nexport Q='r s'\n$Q"
    assert commands(text) == [["python", "-m", "a.b", "--c", "d#e", "/s", "--f"], ["x"], ["y"], ["z"], ["r", "s"]]
    assert len(written()) > 160


def run(words: list[str]) -> None:
    """A command as it is written, but for the flags of SMALL and paths of its own."""
    words = [os.path.expandvars(os.path.expanduser(word)) for word in words]
    if words[0] == "bash" or "-c" in words:
        program = [sys.executable, *words[1:]] if "-c" in words else words
        subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)
        return
    module, at = module_of(words), words.index("-m") + 1
    arguments = words[at + 1 :] + shlex.split(SMALL[module])
    if module == "train.pretrain" and "--preset" not in words:
        arguments += ["--model.depth", "1", "--optim.warmup-steps", "1"]
    if module == "train.sft" and "--mix" not in words:
        arguments += ["--mix", "task:identity#40,task:arithmetic#40"]
    name = module.split()[0]
    config = config_of(name, arguments)
    out = getattr(getattr(config, "run", config), "out", None)
    if isinstance(out, Path) and name != "train.speedrun":
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True) if out.is_file() else None
    importlib.import_module(name).main(config)
    assert name == "train.speedrun" or out is None or Path(out).exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """Where commands find what they name: the runs that README's own commands make, texts, conversations, pairs."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("notes", "my", "code"):
        (folder / name).mkdir()
    lines = (ROOT / "docs/glossary.md").read_text().split("\n\n")
    for number, line in enumerate(lines):
        (folder / f"notes/{number}.txt").write_text(line * 5)
        (folder / f"code/{number}.py").write_text(line)
    (folder / "notes.txt").write_text("\n".join(lines))
    with gzip.open(folder / "my/texts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": line * 5}) + "\n" for line in lines)
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you."}]
    for name in ("my/chats.jsonl", "my_chats.jsonl"):
        (folder / name).write_text((json.dumps({"messages": said}) + "\n") * 40)
    (folder / "tests").symlink_to(ROOT / "tests")
    rehearsal.make_bundle(folder / "bundle")
    rehearsal.make_hub(folder / "hub")
    for number in range(30):
        shard = folder / f"hub/karpathy/climbmix-400b-shuffle/shard_{number:05}.parquet"
        rehearsal.write(shard, [{"text": f"{number} {line}" * 5} for line in lines])
    with contextlib.chdir(folder):
        for words in own_data():
            run(words)
        mine = Path("runs/my")
        pair = {"prompt": said[:1], "chosen": said[1]["content"], "rejected": "No."}
        (mine / "pairs.jsonl").write_text("".join(json.dumps(pair | {"chosen": f"{i}"}) + "\n" for i in range(40)))
        for name in ("dpo", "rl"):
            shutil.copytree(mine / "sft", mine / name)
        for name in ("demo", "other", "quick", "idea", "d12", "d24", "mine", "web", "code", "big", "small", "char"):
            shutil.copytree(mine, f"runs/{name}")
        shutil.copytree(mine / "base", "runs/gpt2")
        shutil.copy(mine / "tokenizer/tokenizer.model", "runs/gpt2")
    yield folder


@pytest.mark.parametrize("kind", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_commands_as_written_run(kind: str, world: Path, tmp_path: Path, monkeypatch, subtests) -> None:
    listed = {command: page for page, command in written() if how(page, command) == kind}
    listed = {command: page for command, page in listed.items() if shlex.split(command) not in own_data()}
    assert listed
    with hub_server.serve(world / "hub") as hub:
        use(monkeypatch, hub.endpoint, tmp_path)
        for number, (command, page) in enumerate(listed.items()):
            place = tmp_path / str(number)
            shutil.copytree(world, place, symlinks=True, ignore=shutil.ignore_patterns("hub"))
            monkeypatch.chdir(place)
            monkeypatch.setenv("HOME", str(place))
            started = time.monotonic()
            with subtests.test(page=page, command=command):
                run(shlex.split(command))
            print(f"{time.monotonic() - started:6.1f} s  {page}: {command}", file=sys.__stderr__)
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def serving(words: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    """The server that a command starts: its address, and its process's number."""
    port = free_port()
    command = [sys.executable, *words[1:], "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                assert process.poll() is None
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://localhost:{port}/healthz", timeout=10).close()
                    break
                time.sleep(0.2)
            yield f"localhost:{port}", str(process.pid)
        finally:
            process.terminate()


def test_what_is_asked_of_the_server_is_answered(world: Path, capfd) -> None:
    page = ROOT / "docs/serving.md"
    asked = [words for block in blocks(page) for words in commands(block) if words[0] == "curl"]
    (snippet,) = re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text())
    assert len(asked) == 3
    with serving(["python", "-m", "serve.app"], world) as (address, _):
        for words in asked:
            answer = subprocess.run(
                [word.replace("localhost:7860", address) for word in [*words, "-sSf"]], capture_output=True, check=True
            ).stdout.decode()
            assert '"id"' in answer and "error" not in answer
        exec(compile(snippet.replace("localhost:7860", address), str(page), "exec"), {})
    assert "usage" in capfd.readouterr().out.lower()


@pytest.mark.slow
def test_servers_start_and_stand_their_load_as_written(world: Path, subtests) -> None:
    listed = {command: page for page, command in written() if re.match(r"python -m serve.(app|api|loadtest)", command)}
    servers = [shlex.split(command) for command in listed if "loadtest" not in command]
    loads = [command for command in listed if "loadtest" in command]
    assert len(servers) > 3 and len(loads) > 2
    for words in servers:
        with subtests.test(command=shlex.join(words)), serving(words, world) as (address, pid):
            if "--limits.concurrent" not in words:
                continue
            for command in loads:
                small = f"--users 1 2 --seconds 3 --least-speedup 0 --max-growth 1 --url http://{address} --pid {pid}"
                with subtests.test(command=command):
                    config = config_of("serve.loadtest", [*shlex.split(command)[3:], *small.split()])
                    importlib.import_module("serve.loadtest").main(config)
