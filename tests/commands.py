"""The commands in README, docs, notebooks and docstrings, and what the tests do with each.

Every command is found by `written`, and `how` says what happens to it:

    quick, slow   it is run, with flags that make it small, on a tiny family of runs and a stand-in of the hub
    else          why it is not; it is read by the real command line, its scripts and files are looked up

`python -m pytest --collect-only tests/test_commands.py` lists them all, `-m slow` runs the slow ones.
"""

import ast
import importlib
import re
import shlex
import typing
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*")]
PAGES = [page for page in PAGES if page.suffix in (".md", ".py")]
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
    r"python -m serve.(app|api|loadtest)|curl": "tests/test_commands.py does, with servers",
    r"python -m train.launch|srun": "takes several GPUs; tests/test_hosts.py does, with two and four processes",
    r"sbatch": "takes Slurm; tests/test_tpu_pod.py runs the script",
    r"docker|.venv/bin/hf": "takes Docker, or an account on the hub; tests/test_deploy.py reads what is built",
    r"python -m .*gs://BUCKET": "takes a bucket; tests/test_corpus.py and test_files.py have a stand-in",
    r"xpk|bash train/tpu_pod.sh (?!.*--dry-run)": "takes Google Cloud; tests/test_tpu_pod.py has a stand-in",
    r"python -m train.bench_loop": "takes a run of some length; tests/test_bench_loop.py does",
    r"python -m tests.public_figures": "takes many minutes; pytest -m slow tests/test_preflight.py does",
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
    found = [(page, words) for page in PAGES for block in blocks(page) for words in commands(block)]
    for page in PAGES:  # in a line of its own, and within a sentence
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
