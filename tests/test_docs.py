"""Commands in README, docs and docstrings: none may rot.

Run for real, with flags appended that make them small: the blocks of README.md ("My own data") and docs/training.md
(all stages). tests/run.sh itself is what CONTRIBUTING.md is about, and runs demo.sh --quick.
Only parsed, by the real command line, and not run: every other `train.…`, `serve.…` and `tests.…` with its flags.
Only looked up: scripts and their flags, files and markers of pytest, modules of `python -m`, Python in `python -c`.
Not checked at all: programs of others, which OTHERS lists.
"""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
import typing
from pathlib import Path

import jax
import pytest
import tyro

from nanochat_jax import model
from nanochat_jax.config import from_depth, horizon

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
OTHERS = set("source export cd git pip tensorboard curl docker hf kubectl srun xpk gcloud gsutil".split())  # noqa: SIM905
MODULE = re.compile(r"(train|serve|tests)\.[a-z_]+")


def commands(text: str) -> list[list[str]]:
    """Words of each simple command of a script; comments are left out (and what follows " #" within quotes)."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"(?m)(^|[ \t])#.*$", "", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";|&\n"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):  # of the environment
            found[-1].append(word)
    return [words for words in found if words]


def blocks(page: Path) -> list[str]:
    return re.findall(r"(?ms)^```bash\n(.*?)^```", page.read_text())


def written() -> list[tuple[str, str]]:
    """(where it stands, command) of all commands."""
    found = [(page, words) for page in PAGES for block in blocks(page) for words in commands(block)]
    for page in PAGES:  # in a line of its own, and within a sentence
        own = re.findall(r"(?m)^    ((?:python|bash|srun) .*)$", page.read_text())
        found += [(page, words) for line in own for words in commands(line)]
        inline = re.findall(r"(?<!`)`((?:python -m|bash|\.venv/bin/python -m) [^`\n<…]+)`", page.read_text())
        found += [(page, words) for line in inline for words in commands(line)]
    for file in [*(ROOT / "train").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        help_text = ast.get_docstring(ast.parse(file.read_text())) or ""
        for line in re.findall(r"(?m)^    ((?:python|bash) (?:.*\\\n)*.*)$", help_text):
            found += [(file, words) for words in commands(re.sub(r" {2,}[^- ].*| …$", "", line))]  # what is said of it
    return sorted({(str(page.relative_to(ROOT)), shlex.join(words)) for page, words in found})


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
    elif program == "export" and "=bash " in arguments[0]:
        check(shlex.split(arguments[0].partition("=")[2]))
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


@pytest.mark.parametrize(("page", "command"), written(), ids=lambda text: str(text)[:60])
def test_command_means_something(page: str, command: str) -> None:
    try:
        check(shlex.split(command))
    except SystemExit:
        pytest.fail(f"{page}: the command line is refused: {command}")


def test_mistakes_are_found() -> None:
    for wrong in (
        "python -m train.sample --checkpoint runs/x --promt y", "python -m train.nothing --a b", "sudo reboot",
        "bash train/demo.sh --fast", "bash train/missing.sh", "python -m pytest -m quick", "python -m nonsense",
    ):  # fmt: skip
        with pytest.raises((SystemExit, AssertionError, ImportError, OSError)):
            check(shlex.split(wrong))
    text = "A=1 python -m a.b --c 'd#e' \\\n  --f  # it's a comment\nx | y && z &"
    assert commands(text) == [["python", "-m", "a.b", "--c", "d#e", "--f"], ["x"], ["y"], ["z"]]
    assert len(written()) > 60


SMALL = {
    "train.tokenizer": "--vocab-size 512",
    "train.prepare": "--sequence-len 128 --workers 1",
    "train.pretrain": "--model.depth 1 --steps 2 --batch-tokens 1024 --optim.warmup-steps 1 --prompts a",
    "train.evaluate": "--examples 2 --max-new-tokens 8 --slots 8",
    "train.sample": "--max-new-tokens 4",
    "train.sft": "--steps 2 --mix task:identity#40,task:arithmetic#40 --prompts a",
    "train.pairs": "--examples 30 --max-new-tokens 96",
    "train.dpo": "--steps 1 --batch-pairs 8",
    "train.rl": "--steps 1 --prompts-per-step 2 --samples 4 --max-new-tokens 8 --slots 8 --eval-samples 0"
    " --eval-examples 2",
    "serve.cli": "--prompt Hi --max-new-tokens 4",
    "train.report": "",
}


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/training.md", marks=pytest.mark.slow)])
def test_stages_as_written_run(page: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks(ROOT / page) if "train.pretrain" in block)
    notes = tmp_path / "notes"
    notes.mkdir()
    lines = (ROOT / "docs/glossary.md").read_text().split("\n\n")
    for number, line in enumerate(lines):
        (notes / f"{number}.txt").write_text(line * 5)
    for words in commands(block):
        if words[0] == "python":
            module = words[2]
            importlib.import_module(module).main(config_of(module, words[3:] + SMALL[module].split()))
    assert capsys.readouterr().out
    assert (tmp_path / "runs/my/sft/checkpoints/2").is_dir()
    assert page == "README.md" or (tmp_path / "runs/my/report.html").is_file()


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
