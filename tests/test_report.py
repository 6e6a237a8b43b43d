"""The report of a tiny run: complete, self-contained, safe with hostile text, content with missing parts."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from test_evaluate import config as evaluation
from test_evaluate import make_run

from nanochat_jax.config import OptimConfig, to_json
from nanochat_jax.errors import UserError
from nanochat_jax.eval.report import Code, Table, Text, series, smooth, to_html, to_markdown
from train import evaluate, prepare, pretrain, report, tokenizer
from train.stage import RunConfig

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> | ```` \n# title"


@pytest.fixture
def run(tmp_path_factory, tmp_path) -> Path:
    """A copy of the tiny run, evaluated."""
    made = make_run(tmp_path_factory.getbasetemp())
    if not (made / "base" / "evaluation.json").exists():
        evaluate.main(evaluation(made))
    return shutil.copytree(made, tmp_path / "tiny")


class Page(HTMLParser):
    """Tags, links and text of an HTML page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name.split(":")[-1] in ("href", "src", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def made(run: Path) -> tuple[Page, str]:
    paths = report.main(report.Config(run))
    return Page(paths["html"].read_text()), paths["md"].read_text()


def test_a_whole_run(run, capsys):
    page, markdown = made(run)
    assert page.tags.count("svg") == len(report.CURVES)
    assert all(link.startswith("#") for link in page.links), "requests to elsewhere"
    assert not re.search(r"url\((?!#)|@import", (run / "report.html").read_text())
    bits = json.loads((run / "base" / "evaluation.json").read_text())["suites"]["bpb"]["bits_per_byte"]
    for text in (page.text, markdown):
        for title in (*report.SECTIONS, "Commands"):
            assert title in text or title == "Training"  # curves are for HTML alone
        assert all(f"{value:.4f}" in text for value in bits.values())
        assert "python -m train.pretrain --data" in text
        assert "Missing" not in text
    assert "left out" not in capsys.readouterr().out
    assert not list(run.glob(".*.tmp"))


def test_ids_differ_between_the_plots(run):
    made(run)
    ids = re.findall(r'<clipPath id="([^"]+)"', (run / "report.html").read_text())
    assert len(set(ids)) == len(ids)


def test_hostile_text_stays_text(run):
    path = run / "base" / "evaluation.json"
    stored = json.loads(path.read_text())
    stored["suites"]["sample"]["samples"] = [{"prompt": HOSTILE, "text": HOSTILE}]
    stored["suites"]["bpb"]["bits_per_byte"][HOSTILE] = 1.0
    path.write_text(json.dumps(stored))
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    (run / "data" / "manifest.json").write_text(json.dumps(manifest | {"source": HOSTILE}))
    page, markdown = made(run)
    assert not {"script", "img"} & set(page.tags)
    assert not page.handlers
    assert HOSTILE + HOSTILE in page.text
    outside_fences = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside_fences
    assert "`" * 5 + "text" in markdown


def test_blocks_escape_by_hand():
    sections = {"S": [Text("a < b *c*"), Code("x</pre>", prompt="<p>"), Table([("a|b", "<i>")], ("", "n"), "numbers")]}
    page = to_html("<T> $body", sections)
    assert "<h1>&lt;T&gt; $body</h1>" in page
    assert "<pre><b>&lt;p&gt;</b>x&lt;/pre&gt;</pre>" in page
    assert "<td>a|b</td><td>&lt;i&gt;</td>" in page
    assert to_markdown("T", sections) == (
        "# T\n\n## S\n\na &lt; b \\*c\\*\n\n```text\n<p>x</pre>\n```\n\n"
        "|  | n |\n| --- | --- |\n| a\\|b | &lt;i&gt; |\n"
    )  # fmt: skip


@pytest.mark.parametrize("part", [path for path, _ in report.PARTS.values()])
def test_a_missing_part_is_left_out_and_noted(run, part, capsys):
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, markdown = made(run)
    assert f"{part} is missing" in page.text
    assert part.split("/")[1].split(".")[0] in markdown.split("## Missing")[1]
    assert f"left out: {part} is missing" in capsys.readouterr().out


def test_a_damaged_part_is_noted(run):
    (run / "base" / "evaluation.json").write_text("{")
    shutil.rmtree(run / "base" / "checkpoints" / "6" / "state")
    (run / "base" / "checkpoints" / "6" / "_CHECKPOINT_METADATA").write_text("{")
    page, _ = made(run)
    assert "base/evaluation.json cannot be read" in page.text
    assert "base/checkpoints cannot be read" in page.text


def test_nothing_of_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds nothing of a run"):
        report.main(report.Config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_an_error_and_leaves_nothing_half_done(run):
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        report.main(report.Config(run))
    assert not list(run.glob(".*.tmp"))


COMMANDS = [
    (tokenizer, tokenizer.Config(), "python -m train.tokenizer"),
    (
        prepare,
        prepare.Config(source="text:my files/*.txt", sequence_len=512),
        "python -m train.prepare --source 'text:my files/*.txt' --sequence-len 512",
    ),
    (
        pretrain,
        pretrain.Config(
            data=Path("d"),
            run=RunConfig(out=Path("o o"), resume="never"),
            model=pretrain.ModelArgs(depth=4),
            steps=7,
            optim=OptimConfig(warmup_steps=2, final_lr_fraction=0.0),
            prompts=("it's", "a b"),
        ),
        "python -m train.pretrain --data d --run.out 'o o' --run.resume never --model.depth 4 "
        "--optim.warmup-steps 2 --optim.final-lr-fraction 0.0 --steps 7 --prompts 'it'\"'\"'s' 'a b'",
    ),
    (
        evaluate,
        evaluate.Config(checkpoint=Path("c"), data=Path("d"), force=True),
        "python -m train.evaluate --checkpoint c --data d --force",
    ),
]


@pytest.mark.parametrize(("module", "config", "command"), COMMANDS, ids=lambda value: getattr(value, "__name__", ""))
def test_command_lines_give_back_the_config(module, config, command):
    stage = module.__name__.removeprefix("train.")
    written = report.command_line(stage, type(config), json.loads(json.dumps(to_json(config))))
    assert written == command
    assert tyro.cli(type(config), args=shlex.split(written)[3:]) == config


def test_a_config_of_another_version_gives_a_comment():
    written = report.command_line("tokenizer", tokenizer.Config, {"colour": "red"})
    assert written.startswith("# train.tokenizer was of another version: ")
    assert "colour" in written


def test_series_leaves_out_what_was_not_finite():
    steps, values = series([{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3}, {"step": 4, "x": 5.0}], "x")
    assert (steps.tolist(), values.tolist()) == ([1, 4], [2, 5])
    assert [len(part) for part in series([], "x")] == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 79, 80, 1000])
def test_smoothing_keeps_a_line_but_for_its_ends(count):
    line = np.arange(count, dtype=float)
    half = count // 80
    assert smooth(line)[half : count - half] == pytest.approx(line[half : count - half])
    assert smooth(np.ones(count)) == pytest.approx(np.ones(count))
