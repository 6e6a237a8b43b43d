"""Commands in README, docs, notebooks and docstrings: none may rot.

Every command is found by `written`, and `how` says what happens to it:

    quick, slow   run here, with flags that make it small, on a tiny family of runs and a stand-in of the hub
    else          why it is not run here; it is read by the real command line, its scripts and files are looked up

`pytest --collect-only tests/test_docs.py` lists them all, `pytest -m slow tests/test_docs.py` runs the slow ones.
"""

import ast
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
import typing
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import tyro

from nanochat_jax import model
from nanochat_jax.config import from_depth, horizon
from tests import hub_server, rehearsal
from tests.test_hub import use
from train.launch import free_port

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*")]
OTHERS = set("source cd pip tensorboard curl docker hf xpk sed ruff jupytext jupyter".split())  # noqa: SIM905
OTHERS_FLAGS = {
    "--build-arg", "--gpus", "--gpus-per-task", "--logdir", "--privileged", "--repo-type", "--rm", "--torch-python",
    "--update", "--xla_force_host_platform_device_count",
}  # fmt: skip
MODULE = re.compile(r"(train|serve|tests)\.[a-z_]+")

SMALL = {  # appended to what is written; later flags win
    "serve.check_safety": "",
    "serve.cli": "--prompt Hi --max-new-tokens 4",
    "serve.deploy": "",
    "train.bench core": "--bundle bundle --examples 4 --alone 2 --rows 1 --model.depth 1 --sequence-len 128",
    "train.bench decode": "--model.depth 1 --batches 1 2 --prompt 8 --new-tokens 4 --sequence-len 64 --vocab-size 512"
    " --device.calls 1 --device.repeats 1",
    "train.bench train": "--model.depth 1 --batch 8 --sequence-len 32 --vocab-size 512 --device.calls 1"
    " --device.repeats 1",
    "train.bench scaling": "--model.depth 1 --batch 1 --sequence-len 32 --vocab-size 512 --devices 1 2"
    " --accumulate 1 --device.calls 1 --device.repeats 1",
    "train.bench deepest": "--sequence-len 32 --vocab-size 512 --model.head-dim 64 --memory-gib 0.01"
    " --device.calls 1 --device.repeats 1",
    "train.chat_show": "--n 1",
    "train.dpo": "--steps 1 --batch-pairs 8",
    "train.evaluate": "--examples 4 --max-new-tokens 8 --slots 8 --bundle bundle",
    "train.pairs": "--examples 30 --max-new-tokens 96",
    "train.preflight": "--model.depth 2 --model.head-dim 64 --sequence-len 256 --vocab-size 512 --ratio 50"
    " --batch-tokens 32768 --decode-rows 0 --optimization-level 19 --mesh.fsdp 1 --micro-batch 1 --layers",
    "train.prepare": "--sequence-len 256 --workers 1",
    "train.pretrain": "--steps 2 --batch-tokens 2048 --prompts a",
    "train.report": "",
    "train.rl": "--steps 1 --prompts-per-step 2 --samples 4 --max-new-tokens 8 --slots 8 --eval-samples 0"
    " --eval-examples 2",
    "train.sample": "--max-new-tokens 4",
    "train.sft": "--steps 2 --prompts a",
    "train.speedrun": "",
    "train.sweep": "--depths 1 --ratios 0.5 --batch-tokens 2048 --optim.warmup-steps 1",
    "train.tokenizer": "--vocab-size 512",
}
QUICK = ("serve.check_safety", "serve.deploy", "train.chat_show", "train.report", "train.sample", "train.speedrun")
NOT_HERE = {  # by what a command begins with
    "source|cd": "the shell's own",
    r"bash (train/setup|train/demo|tests/run).sh|bash train/speedrun.sh$": "tests/run.sh and .ci/run do",
    "sed": "tests/test_notebooks.py does",
    r"python -m (ruff|mypy|mkdocs|pytest)|.venv/bin/(ruff|jupytext|python -m pytest)": "tests/run.sh does",
    r"python -m train.speedrun --summary": "tests/rehearsal.py does, at the end of train/speedrun.sh",
    r"python -m serve.(app|api|loadtest)|curl": "the tests of servers below do",
    r"python -m train.launch|srun": "takes several GPUs; tests/test_hosts.py does, with two and four processes",
    r"sbatch": "takes Slurm; tests/test_tpu_pod.py runs the script",
    r"docker|.venv/bin/hf": "takes Docker, or an account on the hub; tests/test_deploy.py reads what is built",
    r"python -m .*gs://BUCKET": "takes a bucket; tests/test_corpus.py and test_files.py have a stand-in",
    r"xpk|bash train/tpu_pod.sh (?!.*--dry-run)": "takes Google Cloud; tests/test_tpu_pod.py has a stand-in",
    r"python -m train.bench_loop": "takes a run of some length; tests/test_bench_loop.py does",
    r"python -m tests.compare_torch": "takes PyTorch: pytest -m torch",
    r"python -m train.convert": "takes published weights, or PyTorch; tests/test_gpt2.py and test_interop.py do",
    r"python -m train.pretrain --preset gpt2": "takes GPT-2's weights; tests/test_gpt2.py does",
    r".venv/bin/jupyter|.venv/bin/python -m pip": "JupyterLab is not among the requirements",
}


def commands(text: str) -> list[list[str]]:
    """Words of each simple command of a script; comments are left out (and what follows " #" within quotes)."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"(?m)(^|[ \t])#.*$", "", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    found: list[list[str]] = [[]]
    known: dict[str, str] = {}
    for word in lexer:
        if set(word) <= set(";|&\n"):
            found.append([])
        elif assigned := re.fullmatch(r"([A-Z_]+)=(.*)", word) if found[-1] in ([], ["export"]) else None:
            known[assigned[1]] = assigned[2]
        else:
            found[-1] += shlex.split(known[word[1:]]) if word[1:] in known and word[0] == "$" else [word]
    return [words for words in found if words and words != ["export"]]


def text_of(page: Path) -> str:
    """A page's, or the comments of a notebook's source."""
    return re.sub(r"(?m)^# ?|^[^#\n].*", "", page.read_text()) if page.suffix == ".py" else page.read_text()


def blocks(page: Path) -> list[str]:
    return re.findall(r"(?ms)^```bash\n(.*?)^```", text_of(page))


def written() -> list[tuple[str, str]]:
    """(where it stands, command) of all commands."""
    pages = [page for page in PAGES if page.suffix in (".md", ".py")]
    found = [(page, words) for page in pages for block in blocks(page) for words in commands(block)]
    for page in pages:  # in a line of its own, and within a sentence
        own = re.findall(r"(?m)^    ((?:python|bash|srun) .*)$", text_of(page)) if page.suffix == ".md" else []
        found += [(page, words) for line in own for words in commands(line)]
        inline = re.findall(r"(?<!`)`((?:python -m|bash|sbatch|\.venv/bin/python -m) [^`<…]+)`", text_of(page))
        found += [(page, words) for line in inline for words in commands(line.replace("\n", " "))]
    for file in [*(ROOT / "train").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        help_text = ast.get_docstring(ast.parse(file.read_text())) or ""
        for line in re.findall(r"(?m)^    ((?:python|bash) (?:.*\\\n)*.*)$", help_text):
            found += [(file, words) for words in commands(re.sub(r" {2,}[^- ].*| …$", "", line))]  # what is said of it
    return sorted({(str(page.relative_to(ROOT)), shlex.join(words)) for page, words in found})


def module_of(words: list[str]) -> str:
    """train.bench decode and the like; "" for what is no module of ours."""
    at = next((i for i, word in enumerate(words) if MODULE.fullmatch(word)), None)
    if at is None:
        return ""
    return " ".join(words[at : at + 2 if words[at] == "train.bench" else at + 1])


def how(page: str, command: str) -> str:
    """quick, slow, or why it is not run here."""
    words = shlex.split(command)
    if module_of(words) and not any(word.startswith("--") for word in words) and module_of(words) in SMALL:
        return "names a program"
    for beginning, reason in NOT_HERE.items():
        if re.match(beginning, command):
            return reason
    if words[0] == "bash" or words[1:2] == ["-c"]:
        return "slow" if "--plan" in words else "quick"
    if module_of(words) not in SMALL:
        return "unknown"
    quick = (module_of(words) in QUICK and page.startswith("docs/")) or words in own_data()
    return "quick" if quick else "slow"


def own_data() -> list[list[str]]:
    """README's commands for data of one's own, which the tests' runs are made with."""
    return commands(next(block for block in blocks(ROOT / "README.md") if "train.pretrain" in block))


def config_of(module: str, arguments: list[str]) -> typing.Any:
    """What a command line means, by the stage's own class; SystemExit if it means nothing."""
    hints = typing.get_type_hints(importlib.import_module(module).main, include_extras=True)
    return tyro.cli(next(iter(hints.values())), args=arguments)


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
        for name in ("demo", "other", "quick", "d12", "d24", "mine", "web", "code", "big", "small", "char"):
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


def flags(hint: typing.Any, prefix: str = "") -> Iterator[str]:
    """Of a config, and of what it holds."""
    if isinstance(hint, type) and hint.__module__.partition(".")[0] in ("nanochat_jax", "serve", "train"):
        for name, inner in typing.get_type_hints(hint, include_extras=True).items():
            name = prefix + name.replace("_", "-")
            yield from (f"--{name}", "--" + re.sub(r"([\w-]+)$", r"no-\1", name), *flags(inner, f"{name}."))
    for part in typing.get_args(hint):
        yield from flags(part, prefix)


def unknown_names(text: str, known: set[str]) -> set[str]:
    """Flags, modules and files that a text names, and that do not exist."""
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))
    modules = {match[0] for match in re.finditer(rf"(?<![\w./-]){MODULE.pattern}\b(?![/*(])", text)}
    files = set(re.findall(r"`([\w/.-]+\.(?:py|sh|toml))`", text))
    return (
        {flag for flag in named if flag not in known}
        | {name for name in modules if not importlib.util.find_spec(name)}
        | {file for file in files if not any(ROOT.glob(f"**/{file}"))}
    )


def test_what_sentences_name_exists() -> None:
    known = set()
    for file in [*(ROOT / "train").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        main = getattr(importlib.import_module(f"{file.parent.name}.{file.stem}"), "main", None)
        for hint in typing.get_type_hints(main, include_extras=True).values() if main else ():
            known |= set(flags(hint))
    for file in ROOT.glob("*/*.sh"):
        known |= set(re.findall(r"--[a-z][\w-]*", file.read_text()))
    assert not unknown_names("`--run.out`, `--backend.no-safety`, train.pretrain in `model.py`", known)
    wrong = {"--run.oot", "train.pretrian", "modle.py"}
    assert unknown_names("`--run.oot`, train.pretrian in `modle.py`", known) == wrong
    for page in PAGES:
        if page.suffix in (".md", ".py") and page.name != "log.md":  # which tells of what is no more
            text = re.sub(r"(?ms)^xpk.*?[^\\]$", "", text_of(page))
            assert unknown_names(text, known | OTHERS_FLAGS) == set(), page


def test_the_map_of_files_is_exact() -> None:
    (shown,) = re.findall(r"(?ms)^```\n(nanochat_jax/ .*?)^```", (ROOT / "README.md").read_text())
    for folder, text in re.findall(r"(?ms)^(\w+)/(.*?)(?=^\w|\Z)", shown):
        there = {path.name for path in (ROOT / folder).iterdir() if path.is_file() and path.name != "__init__.py"}
        named = set(re.findall(r"\b\w+\.(?:py|sh|yaml)\b|\bDockerfile\b", text))
        assert folder in ("notebooks", "tests", "docs") or named == {name for name in there if ".toml" not in name}
        assert all((ROOT / folder / name).is_dir() for name in re.findall(r"(?m)^  (\w+)/", text))
    folders = {path.parent.name for path in ROOT.glob("*/*") if path.suffix in (".py", ".ipynb")} - {".ci"}
    assert folders | {"docs"} == set(re.findall(r"(?m)^(\w+)/", shown))


def test_table_of_depths() -> None:
    rows = re.findall(r"(?m)^\| (\d+) \| ([\d,]+) \| ([\d,]+) M \| (.*) B \| ([\d,]+) \| ([\d,]+) \| (.*) \|$",
                      (ROOT / "docs/training.md").read_text())  # fmt: skip
    assert len(rows) == 6
    for depth, *stated in rows:
        cfg = from_depth(int(depth))
        length = horizon(cfg)
        shapes = jax.eval_shape(lambda key, cfg=cfg: model.init_params(key, cfg), jax.random.key(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        tokens = length.steps * length.batch_tokens
        found = (
            f"{cfg.n_embd:,}", f"{parameters / 1e6:,.0f}", f"{tokens / 1e9:.2f}", f"{length.batch_tokens:,}",
            f"{length.steps:,}", f"{tokens * cfg.flops_per_token():.1e}".replace("e+", "e"),
        )  # fmt: skip
        assert found == tuple(stated)
