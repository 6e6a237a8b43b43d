"""What the pages say: the flags, modules and files that they name, defaults, tables, README's map of files."""

import importlib
import importlib.util
import re
import typing
from collections.abc import Iterator

import jax

from nanochat_jax import model
from nanochat_jax.config import from_depth, horizon
from tests.commands import MODULE, PAGES, ROOT, config_of, text_of

OTHERS_FLAGS = {
    "--build-arg", "--gpus", "--gpus-per-node", "--logdir", "--privileged", "--repo-type", "--rm", "--torch-python",
    "--update", "--xla_force_host_platform_device_count",
}  # fmt: skip


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
        if page.name != "log.md":  # which tells of what is no more
            text = re.sub(r"(?ms)^xpk.*?[^\\]$", "", text_of(page))
            assert unknown_names(text, known | OTHERS_FLAGS) == set(), page


def test_defaults_of_the_server_are_as_stated() -> None:
    config = config_of("serve.app", [])
    rows = re.findall(
        r"(?m)^\| `--((?:backend|limits)\.[\w-]+)` \| ([\d,]+(?: MiB)?) \|", (ROOT / "docs/serving.md").read_text()
    )
    assert len(rows) > 8
    for name, stated in rows:
        group, field = name.replace("-", "_").split(".")
        number, _, unit = stated.replace(",", "").partition(" ")
        assert getattr(getattr(config, group), field) == int(number) * (2**20 if unit else 1), name


def test_the_task_that_is_shown_works() -> None:
    (shown,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "docs/changing.md").read_text())
    names: dict[str, typing.Any] = {}
    exec(compile(shown, "docs/changing.md", "exec"), names)
    task = names["task"]("")
    prompts = [{one.prompt["messages"][0]["content"] for one in task.examples(split)} for split in ("train", "test")]
    assert not prompts[0] & prompts[1] and len(prompts[1]) > 100
    one = task.examples("test")[0]
    assert task.judge(one, str(one.conversation["messages"][-1]["content"])) and not task.judge(one, "no")


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
