"""The report of a tiny run: complete, self-contained, safe with hostile text, content with missing parts and stages."""

import dataclasses
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

from nanochat_jax.config import OptimConfig, to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.eval import core
from nanochat_jax.eval.chat import CHATCORE, Result, Verdict, wilson
from nanochat_jax.eval.plots import Curves, Points, series, smooth
from nanochat_jax.eval.report import Answer, Code, Exchange, Table, Text, side_by_side, to_html, to_markdown
from train import dpo, evaluate, prepare, pretrain, report, results, rl, runs, sft, tokenizer
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


def made(run: Path, **options) -> tuple[Page, str]:
    paths = report.main(report.Config(run, **options))
    return Page(paths["html"].read_text()), paths["md"].read_text()


LOGGED = {  # by stage: what it logs of each step, and what of the last
    "sft": ({"loss": 1.0, "grad_norm": 1.0, "tokens_per_second": 9.0, "mfu": 0.5}, {"val_loss": 1.0, "val_bpb": 1.0}),
    "dpo": (
        {"loss": 0.6, "margin": 0.1, "accuracy": 0.5, "chosen_nats": 2.0},
        {"val_margin": 0.2, "val_accuracy": 0.7},
    ),
    "rl": (
        {
            "loss": 0.0,
            "nats": 0.2,
            "reward": 0.5,
            "mixed": 0.4,
            "answer_tokens": 8.0,
            "sampled_tokens_per_second": 50.0,
        },
        {
            name + bound: value
            for name in ("val_accuracy", "val_pass_at_1", "val_pass_at_4")
            for bound, value in (("", 0.5), ("_low", 0.4), ("_high", 0.6))
        },
    ),
}
PLOTS = {"base": 6, "sft": 6, "dpo": 5, "rl": 7}  # as there are of what is logged here
PAIR = {"prompt": "How much is 6*7?", "rejected": "43", "task": "arithmetic"}
CALL = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}, {"type": "text", "text": "So 42."}]


def result(right: int, said: str = "said") -> Result:
    samples = (Verdict("asked", said, True, False), Verdict("asked too", said, False, False))
    interval = wilson(right, 10)
    return Result("generative", 10, right, 0, right / 10, interval, 0.0, right / 10, 1.5, samples)


def evaluated(folder: Path, tasks: dict[str, Result], step: int = 6, chatcore: float | None = None) -> None:
    chat = {
        "tasks": {name: {"asked": {}, **to_json(task)} for name, task in tasks.items()},
        "chatcore": chatcore,
        "mean_centred": sum(task.centred for task in tasks.values()) / len(tasks),
        "compilations": {"categorical": 2, "engine": 3},
        "seconds": 30.0,
    }
    settings = to_json(evaluate.Config(folder, examples=10))
    write_json(folder / "evaluation.json", {"config": settings, "step": step, "suites": {"chat": chat}})


@pytest.fixture
def chatty(run) -> Path:
    """The tiny run with all stages, 6 steps of 20 seconds each; the more of them, the more answers are right."""
    start, out = run / "base", RunConfig(out=run / "sft")
    configs = {
        "sft": sft.Config(start, out, steps=6),
        "dpo": dpo.Config(start, out, "jsonl:p"),
        "rl": rl.Config(start, out),
    }
    for right, (name, config) in enumerate(configs.items(), 7):
        shutil.copytree(run / "base" / "checkpoints", run / name / "checkpoints")
        write_json(run / name / "config.json", config)
        every, last = LOGGED[name]
        records = [{"step": step, **every, "seconds_per_step": 20.0} for step in range(1, 7)] + [{"step": 6, **last}]
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        evaluated(run / name, {"spelling": result(right, f"{name} says"), "arithmetic": result(5, f"{name} says")})
    (run / "pairs.jsonl").write_text(f"{json.dumps(PAIR | {'chosen': CALL})}\n" * 3)
    (run / "pairs.config.json").write_text('{"checkpoint": "s", "out": "p", "tasks": "spelling"}')
    return run


def test_a_whole_run(run, capsys):
    page, markdown = made(run)
    assert page.tags.count("svg") == PLOTS["base"]
    assert all(link.startswith("#") for link in page.links), "requests to elsewhere"
    assert not re.search(r"url\((?!#)|@import", (run / "report.html").read_text())
    [text] = json.loads((run / "base" / "evaluation.json").read_text())["suites"]["bpb"]["texts"].values()
    bits = {"this model": text["bits_per_byte"], **text["baselines"]}
    for text in (page.text, markdown):
        for title in (
            "Results",
            "Pretraining",
            "Time",
            "Model and horizon",
            "Configuration",
            "Environment",
            "Commands",
        ):
            assert title in text
        assert all(f"{value:.4f}" in text for value in bits.values())
        assert "python -m train.pretrain --data" in text
        for absent in ("Missing", "Tasks", "Conversations", "Beside other runs", "sft", "Preference"):
            assert absent not in text, "of what was not run there is nothing, and no complaint either"
    printed = capsys.readouterr().out
    assert f"{bits['gzip -9']:.4f}" in printed
    assert "note:" not in printed
    assert not list(run.glob(".*.tmp"))


def test_all_stages(chatty, capsys):
    page, markdown = made(chatty)
    assert page.tags.count("svg") == sum(PLOTS.values())
    for text in (page.text, markdown):
        assert "Missing" not in text
        assert "python -m train.pairs --checkpoint s --out p --tasks spelling" in text
        for program in report.PROGRAMS.values():
            assert f"python -m train.{program.module} " in text
        assert text.count("python -m train.evaluate --checkpoint") == 4
        assert "⟨6*7⟩ = 42\nSo 42." in text
        assert "rl says" in text
        assert "sft says" not in text, "the conversations are those of the last stage"
    for program in report.PROGRAMS.values():
        assert program.title in page.text
    cells = [result(right) for right in (7, 8, 9)]
    row = [f"{10 * c.right:.1f} % of 10 ({100 * c.interval[0]:.1f}–{100 * c.interval[1]:.1f})" for c in cells]
    assert f"| spelling | 0% | {' | '.join(row)} |" in markdown
    assert "| mean, guessing at 0 |  | 0.6000 | 0.6500 | 0.7000 |" in markdown
    assert "| programs compiled |  | 5 | 5 | 5 |" in markdown
    assert "| arithmetic | 3 |" in markdown, "pairs"
    printed = capsys.readouterr().out
    assert re.search(r"spelling +0% +" + " +".join(map(re.escape, row)), printed)
    assert "against the model" in printed


def test_the_table_has_chatcore_where_it_was_measured(chatty):
    evaluated(chatty / "rl", {name: result(4) for name in CHATCORE}, chatcore=0.4)
    table = results.task_table(runs.gather(chatty))
    assert table is not None
    rows = {name: cells for name, *cells in table.rows}
    assert rows["ChatCORE"] == ["", "", "", "0.4000"]
    assert rows["spelling"][-1] == rows["mmlu"][1] == ""
    assert rows["mmlu"][-1].startswith("40.0 % of 10 (")


def core_result(right: int) -> dict[str, object]:
    share = right / 20
    return to_json(core.Result("schema", 0, 20, right, 0, share, wilson(right, 20), 0.5, 2 * share - 1)) | {"asked": {}}


def test_core_before_and_after(chatty):
    for stage, right in (("base", 12), ("rl", 14)):
        path = chatty / stage / "evaluation.json"
        evaluation = json.loads(path.read_text())
        measured = {"tasks": {"copa": core_result(right), HOSTILE: core_result(10)}, "compilations": 7}
        evaluation["suites"]["core"] = measured | {
            "core": None if stage == "base" else 0.2, "mean_centred": 0.1, "examples_per_second": 50.0, "seconds": 2.0,
        }  # fmt: skip
        write_json(path, evaluation)
    page, markdown = made(chatty)
    section = markdown.split("## CORE")[1].split("##")[0]
    assert "| copa | 50% | 60.0 % of 20 (38.7–78.1) | 70.0 % of 20 (48.1–85.5) |" in section
    assert "| programs compiled |  | 7 | 7 |" in section and "| CORE |  |  | 0.1000 |" in section
    assert "| mean of 2 CORE tasks after base | 0.1000 |" in markdown and "| CORE after rl | 0.1000 |" in markdown
    assert not {"script", "img"} & set(page.tags)
    path.write_text(path.read_text().replace('"shots"', '"shorts"', 1))
    assert "rl/evaluation.json cannot be read: copa: unknown key 'shorts'" in made(chatty)[0].text


def test_learning_rates_are_those_of_the_recipe(chatty):
    stage = runs.gather(chatty).stages["base"]
    recipe, rates = stage.recipe, [record["rate"] for record in results.learning_rates(stage)]
    peak = recipe["optim"]["matrix_lr"] * recipe["horizon"]["lr_scale"]
    # Six steps: a warm-up of 40 that never ends.
    assert rates == pytest.approx([peak * (step + 1) / 40 for step in range(6)])
    other = dataclasses.replace(stage, checkpoint=None)
    assert results.learning_rates(other) == []


def test_an_image_for_a_readme(chatty, tmp_path):
    report.main(report.Config(chatty, image=tmp_path / "docs" / "loss.png"))
    assert (tmp_path / "docs" / "loss.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(chatty / "base")
    with pytest.raises(UserError, match=r"--image .*loss.png: .* no metrics of pretraining"):
        report.main(report.Config(chatty, image=tmp_path / "loss.png"))


def test_time_and_cost(chatty):
    run = runs.gather(chatty)
    rows = {name: cells for name, *cells in results.times(run, dollars_per_hour=36.0).rows}
    assert rows["sft"] == rows["rl"] == ["6", "20", "2.0", "0.5", "1.50"]
    base, learnt = run.stages["base"], json.loads((chatty / "tokenizer" / "tokenizer.report.json").read_text())
    seconds = 450 + base.training_seconds + base.evaluation_seconds + learnt["training_seconds"]
    assert float(rows["in all"][-1]) == pytest.approx(seconds / 100, abs=0.01)
    assert results.headline(run, 36.0)["dollars"] == rows["in all"][-1]
    assert "dollars" not in results.headline(run, None)
    assert len(results.times(run, None).header) == 5
    with pytest.raises(UserError, match=r"--dollars-per-hour -1 must be positive"):
        report.Config(chatty, dollars_per_hour=-1)


def test_an_unfinished_stage_says_how_far_it_came(chatty):
    path = chatty / "sft" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    rows = {name: cells for name, *cells in results.times(runs.gather(chatty), None).rows}
    assert (rows["sft"][0], rows["dpo"][0]) == ("3 of 6", "6")


def test_beside_another_run(chatty, run, tmp_path, capsys):
    other = shutil.copytree(chatty, tmp_path / "other <i>")
    shutil.rmtree(other / "rl")
    evaluated(other / "sft", {"spelling": result(1)}, step=3)
    page, markdown = made(chatty, compare=(other,))
    section = markdown.split("## Beside other runs")[1].split("##")[0]
    columns = re.findall(r"^\| (.+?) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    rows = {name: cells for name, *cells in columns}
    assert rows["bits per byte of held-out text"][0] == rows["bits per byte of held-out text"][1] != ""
    assert [cell[:4] for cell in rows["spelling after sft"]] == ["70.0", "10.0"]
    assert [cell[:4] for cell in rows["spelling after rl"]] == ["90.0", ""]
    assert {"parameters", "tokens of pretraining", "minutes of training and evaluation"} <= set(rows)
    assert "other <i>" in page.text
    assert page.tags.count("svg") == sum(PLOTS.values()) + 1, "bits per byte of both in one plot"
    assert "i" not in page.tags
    note = f"{other}: sft/evaluation.json is of step 3, and there is a checkpoint of step 6"
    assert note in page.text
    printed = capsys.readouterr().out
    assert f"note: {note}" in printed
    assert re.search(r"spelling after sft +70\.0 .* +10\.0 ", printed)
    assert f"--compare '{other}'" in page.text
    with pytest.raises(UserError, match="holds nothing of a run"):
        report.main(report.Config(run, compare=(tmp_path / "nowhere",)))


def test_ids_differ_between_the_plots(chatty):
    made(chatty)
    ids = re.findall(r'<clipPath id="([^"]+)"', (chatty / "report.html").read_text())
    assert len(set(ids)) == len(ids) == sum(PLOTS.values())
    alike = [Curves("t", stage, [{"step": 1, "x": 1.0}], {"x": ""}, {}).html() for stage in ("sft", "rl")]
    first, second = (set(re.findall(r'<(?:clipPath|path) id="([^"]+)"', drawn)) for drawn in alike)
    assert first and not first & second


def test_hostile_text_stays_text(chatty):
    run = chatty
    evaluated(run / "rl", {HOSTILE: result(3, HOSTILE)})
    pair = json.dumps({"prompt": HOSTILE, "chosen": HOSTILE, "rejected": f"{HOSTILE} no", "task": HOSTILE})
    (run / "pairs.jsonl").write_text(pair)
    write_json(run / "rl" / "config.json", {HOSTILE: HOSTILE})
    path = run / "base" / "evaluation.json"
    stored = json.loads(path.read_text())
    stored["suites"]["sample"]["samples"] = [{"prompt": HOSTILE, "text": HOSTILE}]
    text = next(iter(stored["suites"]["bpb"]["texts"].values()))
    text["baselines"] |= {HOSTILE: 1.0, r"$\frac{$": 2.0}
    stored["suites"]["bpb"]["texts"][HOSTILE] = text
    path.write_text(json.dumps(stored))
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    (run / "data" / "manifest.json").write_text(json.dumps(manifest | {"source": HOSTILE}))
    page, markdown = made(run)
    assert not {"script", "img"} & set(page.tags)
    assert not page.handlers
    assert HOSTILE + HOSTILE in page.text
    assert f"right {HOSTILE}" in page.text
    assert f"rejected {HOSTILE} no" in page.text
    outside_fences = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside_fences
    assert "`" * 5 + "text" in markdown


def test_surrogates_are_no_obstacle(chatty):
    evaluated(chatty / "rl", {"spelling": result(3, "half \ud83d of a pair")})
    assert "half ? of a pair" in made(chatty)[0].text


def test_blocks_escape_by_hand():
    exchange = Exchange("t", "<q>", (Answer("<a>", "right", True), Answer("``` b", "wrong", False)))
    table = Table([("a|b", "<i>")], ("", "<n>"), "numbers")
    sections = {"S": [Text("a < b *c*"), Code("x</pre>", prompt="<p>"), table, exchange]}
    page = to_html("<T> $body", sections)
    assert "<h1>&lt;T&gt; $body</h1>" in page
    assert "<pre><b>&lt;p&gt;</b>x&lt;/pre&gt;</pre>" in page
    assert "<th></th><th>&lt;n&gt;</th>" in page
    assert "<td>a|b</td><td>&lt;i&gt;</td>" in page
    assert '<p>&lt;q&gt;</p><p class="good"><b>right</b> &lt;a&gt;</p><p class="bad"><b>wrong</b> ``` b</p>' in page
    assert to_markdown("T", sections) == (
        "# T\n\n## S\n\na &lt; b \\*c\\*\n\n```text\n<p>x</pre>\n```\n\n"
        "|  | &lt;n&gt; |\n| --- | --- |\n| a\\|b | &lt;i&gt; |\n\n"
        "````text\nt: <q>\nright: <a>\nwrong: ``` b\n````\n"
    )  # fmt: skip


def test_tables_side_by_side_in_a_terminal():
    table = side_by_side({"one": {"a": "1", "b": "20"}, "two": {"c": "x", "a": "300"}})
    assert table.plain().splitlines() == ["   one  two", "a    1  300", "b   20     ", "c         x"]


def test_points_and_lines_of_one_label_share_a_colour():
    lines = {"a": ([1, 100], [3, 1]), "all": ([1, 100], [2, 1])}
    drawn = Points("t", "s", ("x", "y"), {"a": ([1, 100], [3, 1]), "b": ([1, 10], [2, 1.5])}, lines).html()
    assert drawn.count("stroke-dasharray") >= 2 and "var(--first)" in drawn and "var(--second)" in drawn
    assert re.findall(r">(a|b|all)</text>", drawn) == ["a", "b", "all"], "each is named once"


def test_points_between_two_powers_of_ten_have_an_axis_with_numbers():
    drawn = Points("t", "s", ("x", "y"), {"a": ([1.5e6, 9e6], [2, 1])}, {}).html()
    assert "2e+06" in drawn and "5e+06" in drawn


def test_every_curve_is_drawn_and_even_a_single_point_seen():
    runs = {f"run {i}": f"run {i}" for i in range(7)}
    drawn = Curves("t", "s", [{"step": 60, name: 2.0} for name in runs], runs, {}).html()
    assert all(name in drawn for name in runs) and drawn.count("<use") > len(runs)
    assert "run 6" in Points("t", "s", ("x", "y"), {name: ([1, 10], [2, 1]) for name in runs}, {}).html()


def test_intervals_are_drawn_where_they_were_logged():
    bare = [{"step": step, "x": 0.5} for step in range(3)]
    bounded = [record | {"x_low": 0.4, "x_high": 0.7} for record in bare]
    drawn = ["LineCollection" in Curves("t", "s", records, {"x": ""}, {}).html() for records in (bare, bounded)]
    assert drawn == [False, True]


@pytest.mark.parametrize("part", ["config.json", "metrics.jsonl", "checkpoints", "evaluation.json"])
def test_a_missing_part_is_left_out_and_noted(chatty, part, capsys):
    for stage in runs.STAGES:
        path = chatty / stage / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in ("tokenizer/tokenizer.report.json", "tokenizer/tokenizer.config.json", "data/manifest.json"):
        (chatty / path).unlink()
    page, markdown = made(chatty)
    printed = capsys.readouterr().out
    for name in (
        *(f"{stage}/{part}" for stage in runs.STAGES),
        "tokenizer/tokenizer.report.json",
        "data/manifest.json",
    ):
        assert f"{name} is missing" in page.text
        assert name.split("/")[1].split(".")[0] in markdown.split("## Missing")[1]
        assert f"note: {name} is missing" in printed


def test_a_stage_alone_makes_a_page(chatty):
    for folder in ("base", "dpo", "rl", "data", "tokenizer"):
        shutil.rmtree(chatty / folder)
    (chatty / "pairs.jsonl").unlink()
    page, markdown = made(chatty)
    assert page.tags.count("svg") == PLOTS["sft"]
    assert "Missing" not in page.text
    assert "| mean of 2 tasks after sft | 0.6000 |" in markdown


def test_what_is_damaged_or_of_another_version_is_noted(chatty):
    run = chatty
    (run / "base" / "evaluation.json").write_text("{")
    shutil.rmtree(run / "base" / "checkpoints" / "6" / "state")
    (run / "base" / "checkpoints" / "6" / "_CHECKPOINT_METADATA").write_text("{")
    (run / "pairs.jsonl").write_text(json.dumps(PAIR | {"chosen": "43"}))
    path = run / "sft" / "evaluation.json"
    path.write_text(path.read_text().replace('"asked"', '"colour"', 1))
    page, _ = made(run)
    assert "base/evaluation.json cannot be read" in page.text
    assert "base/checkpoints cannot be read" in page.text
    assert "sft/evaluation.json cannot be read: spelling: unknown key 'colour'" in page.text
    assert "pairs.jsonl cannot be read" in page.text
    assert "Preference pairs" not in page.text


def test_data_alone_make_a_page(run):
    shutil.rmtree(run / "base")
    shutil.rmtree(run / "tokenizer")
    _, markdown = made(run)
    assert "\n## Data\n" in markdown
    assert not re.search("Results|Time|Missing", markdown)


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
            data="d",
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
        evaluate.Config(checkpoint=Path("c"), data="d", force=True),
        "python -m train.evaluate --checkpoint c --data d --force",
    ),
    (
        sft,
        sft.Config(Path("b"), RunConfig(out=Path("o")), mix="task:spelling#5,chitchat*0.1", warm=False, prompts=()),
        "python -m train.sft --checkpoint b --run.out o --mix 'task:spelling#5,chitchat*0.1' --no-warm --prompts",
    ),
    (
        report,
        report.Config(Path("r"), compare=(Path("a b"), Path("c")), dollars_per_hour=1.5),
        "python -m train.report --run r --compare 'a b' c --dollars-per-hour 1.5",
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
