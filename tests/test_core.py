"""CORE: prompts worked out by hand, scores that equal the plain forward pass on any device count, damage named."""

import dataclasses
import http.server
import json
import random
import threading
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from test_engine import random_params

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.config import ModelConfig
from nanochat_jax.errors import UserError
from nanochat_jax.eval import bundle, core, prompts, score
from nanochat_jax.eval.bundle import CoreTask, find_bundle, open_bundle, read_items
from nanochat_jax.eval.prompts import Choices, choices, is_right, solved_examples
from nanochat_jax.eval.score import SHAPES, Scorer, Shape, plan
from nanochat_jax.gpt2 import GPT2Config
from nanochat_jax.layers import Compute
from train import evaluate

COMPUTE, MESH_1 = Compute(), sharding.make_mesh(devices=jax.devices()[:1])
WORDS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]


def task(kind: str, *, shots: int = 0, delimiter: str = " ", name: str = "t", baseline: float = 0.5) -> CoreTask:
    return CoreTask(name, kind, Path("t.jsonl"), shots, delimiter, baseline)


CHOICE = {"query": "Two and two:", "choices": ["three", "four"], "gold": 1}
OPTIONS = {
    "context_options": ["Ann told Bob that Ann", "Ann told Bob that Bob"],
    "continuation": "was late.",
    "gold": 0,
}
GIVEN = {"context": " 1 2 3 \n", "continuation": "4 5"}


def test_prompts_by_hand():
    shown = [CHOICE | {"gold": 0}, CHOICE]
    before = "Two and two:\nA: three\n\nTwo and two:\nA: four\n\n"
    assert prompts.prompts(task("multiple_choice", delimiter="\nA: "), CHOICE, shown) == [
        before + "Two and two:\nA: three", before + "Two and two:\nA: four",
    ]  # fmt: skip
    assert prompts.prompts(task("schema"), OPTIONS, [OPTIONS | {"gold": 1}]) == [
        "Ann told Bob that Bob was late.\n\nAnn told Bob that Ann was late.",
        "Ann told Bob that Bob was late.\n\nAnn told Bob that Bob was late.",
    ]
    given, whole = prompts.prompts(task("language_modeling"), GIVEN, [GIVEN])
    assert (given, whole) == ("1 2 3 4 5\n\n1 2 3", "1 2 3 4 5\n\n1 2 3 4 5")
    given, whole = prompts.prompts(task("language_modeling", delimiter="\nAnswer: "), GIVEN, [])
    assert (given, whole) == ("1 2 3\nAnswer:", "1 2 3\nAnswer: 4 5")


def test_examples_are_drawn_as_upstream_draws_them():
    items = [{"n": n} for n in range(20)]
    for index in (0, 7, 19):
        drawn = [item["n"] for item in solved_examples(items, index, 10)]
        others = [n for n in range(20) if n != index]
        assert drawn == random.Random(1234 + index).sample(others, 10)
        assert len(set(drawn)) == 10 and index not in drawn
    assert [item["n"] for item in solved_examples(items, 0, 5)] == [15, 4, 1, 3, 19]


def spans(found: Choices) -> list[tuple[list[int], list[int]]]:
    """Of each sequence what is not scored, and what is."""
    rows = [[*found.shared.tolist(), *tail.tolist()] for tail in found.tails]
    return [(row[: len(row) - n], row[len(row) - n :]) for row, n in zip(rows, found.scored, strict=True)]


def test_what_is_scored_by_hand():
    choice, schema, given = task("multiple_choice"), task("schema"), task("language_modeling")
    found = choices(choice, CHOICE, [[0, 5, 6, 7], [0, 5, 8, 7, 9]], 99)
    assert spans(found) == [([0, 5], [6, 7]), ([0, 5], [8, 7, 9])]
    assert found.shared.tolist() == [0] and found.gold == 1, "a token before the scored ones is each tail's own"
    assert spans(choices(choice, CHOICE, [[0, 5], [0, 5, 6]], 99)) == [([0], [5]), ([0], [5, 6])], "one is left"
    assert spans(choices(schema, OPTIONS, [[0, 5, 6, 8, 9], [0, 7, 8, 9]], 99)) == [
        ([0, 5, 6], [8, 9]), ([0, 7], [8, 9]),
    ]  # fmt: skip
    assert spans(choices(schema, OPTIONS, [[0, 5], [0, 5]], 99)) == [([0], [5]), ([0], [5])]
    assert spans(choices(given, GIVEN, [[0, 5, 6], [0, 5, 6, 7, 8]], 99)) == [([0, 5, 6], [7, 8])]
    merged = choices(given, GIVEN, [[0, 5, 6], [0, 5, 9, 8]], 99)
    assert spans(merged) == [([0, 5], [9, 8])], "a token across the boundary is the model's to find"


def test_of_too_long_prompts_the_tail_is_kept():
    rows = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6]]
    found = choices(task("multiple_choice"), CHOICE, rows, 4)
    assert spans(found) == [([2, 3], [4, 5]), ([1, 2, 3], [6])] and found.is_shortened
    assert len(found.shared) == 0
    found = choices(task("multiple_choice"), CHOICE, rows, 2)
    assert spans(found) == [([4], [5]), ([3], [6])], "what is left of the scored part is scored"
    assert not choices(task("multiple_choice"), CHOICE, rows, 6).is_shortened
    with pytest.raises(UserError, match="no text"):
        choices(task("multiple_choice"), CHOICE, [[0], [0, 5]], 9)


def test_right_by_hand():
    item = Choices(np.array([0]), (np.array([1, 2]), np.array([1, 2, 3])), (1, 2), 1, False)
    choice = task("multiple_choice")
    assert is_right(choice, item, [1.1, 2.0], [True, False]), "the mean counts, not the sum"
    assert not is_right(choice, item, [1.0, 2.0], [False, True]), "the first of equals"
    assert is_right(task("language_modeling"), item, [9.0], [True])
    assert not is_right(task("language_modeling"), item, [0.1], [False])


def random_items(rng: random.Random, count: int, vocab: int, longest: int = 400) -> list[Choices]:
    items = []
    for _ in range(count):
        shared = [rng.randrange(vocab) for _ in range(rng.choice([3, 30, longest]))]
        rows = [
            shared + [rng.randrange(vocab) for _ in range(rng.randint(1, 40))] for _ in range(rng.choice([1, 2, 5]))
        ]
        kind = "multiple_choice" if len(rows) > 1 else "language_modeling"
        rows = rows if len(rows) > 1 else [shared, *rows]
        items.append(choices(task(kind), {"gold": 0}, rows, 10_000))
    return items


def test_an_item_goes_where_it_costs_least():
    def item(shared: int, tails: int, length: int, scored: int = 4) -> Choices:
        return Choices(np.zeros(shared, np.int32), (np.zeros(length, np.int32),) * tails, (scored,) * tails, 0, False)

    def shapes(*items: Choices) -> dict[tuple[int, ...], int]:
        return {tuple(shape): len(rows) for shape, rows in plan(items).items()}

    assert shapes(item(20, 4, 10)) == {(0, 1, 128, 64): 4}, "sharing 20 tokens is not worth a program"
    assert shapes(item(230, 4, 40)) == {(256, 4, 64, 64): 1}
    assert shapes(item(230, 11, 40)) == {(256, 4, 64, 64): 3}
    assert shapes(item(300, 4, 10)) == {(256, 4, 64, 64): 1}, "what the prefix does not hold goes into the branches"
    assert shapes(item(300, 4, 30)) == {(512, 4, 64, 64): 1}
    assert shapes(item(240, 1, 10)) == {(0, 1, 256, 128): 1}
    assert shapes(item(0, 2, 200, scored=150), item(5000, 1, 3)) == {(0, 1, 5120, 256): 3}
    many = plan(random_items(random.Random(0), 500, 50, 6000))
    assert len(many) <= 12 and sum(map(len, many.values())) > 500
    assert [shape.tokens for shape in many] == sorted((shape.tokens for shape in many), reverse=True)


ARCHITECTURES = {
    "nanochat": ModelConfig(64, vocab_size=50, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"),
    "gpt2": GPT2Config(sequence_len=512, vocab_size=50, n_layer=2, n_head=2, n_embd=32),
}  # fmt: skip
SMALL = (Shape(0, 1, 64, 32), Shape(0, 1, 448, 48), Shape(256, 4, 48, 48), Shape(400, 4, 48, 48))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_plain_forward_pass(architecture):
    cfg = ARCHITECTURES[architecture]
    params, items = random_params(cfg), random_items(random.Random(1), 24, cfg.vocab_size)
    rows = plan(items, SMALL)
    assert len(rows) == 4
    scorer = Scorer(params, cfg, COMPUTE, MESH_1, tokens=1024)
    counted: list[int] = []
    found = scorer.score(items, rows, counted.append)
    assert scorer.compilations == 4
    assert sum(counted) == sum(shape.tokens * len(members) for shape, members in rows.items())
    forward = jax.jit(lambda tokens_BT: model.forward(params, cfg, tokens_BT, compute=COMPUTE))
    for item, scores in zip(items, found, strict=True):
        for (before, scored), result in zip(spans(item), scores, strict=True):
            tokens, first = [*before, *scored], len(before)
            padded_BT = np.array([tokens + [0] * (448 - len(tokens))], np.int32)
            logits_TV = np.asarray(forward(padded_BT), np.float64)[0, first - 1 : len(tokens) - 1]
            log_sums_T = np.log(np.exp(logits_TV).sum(-1))
            nats = (log_sums_T - logits_TV[np.arange(len(scored)), scored]).sum()
            assert result.nats == pytest.approx(nats, rel=2e-5)
            assert result.hit == (logits_TV.argmax(-1) == scored).all()


def test_scores_depend_neither_on_devices_nor_on_batches_nor_on_order():
    cfg = ARCHITECTURES["nanochat"]
    params, items = random_params(cfg), random_items(random.Random(2), 20, cfg.vocab_size)
    expected = Scorer(params, cfg, COMPUTE, MESH_1, 1024).score(items, plan(items, SMALL))
    mesh = sharding.make_mesh()
    placed = jax.device_put(params, sharding.replicated(mesh))
    assert Scorer(placed, cfg, COMPUTE, mesh, 1024).score(items, plan(items, SMALL)) == expected
    assert Scorer(params, cfg, COMPUTE, MESH_1, 1024).score(items[::-1], plan(items[::-1], SMALL)) == expected[::-1]
    smaller = Scorer(params, cfg, COMPUTE, MESH_1, 1).score(items, plan(items, SMALL))
    for a, b in zip(expected, smaller, strict=True):
        assert [score.hit for score in a] == [score.hit for score in b]
        assert [score.nats for score in a] == pytest.approx([score.nats for score in b], rel=1e-5)


TASKS = {
    "choose": ("multiple_choice", 2, {"continuation_delimiter": "\nA: "}),
    "resolve": ("schema", 0, {}),
    "go_on": ("language_modeling", 3, {}),
}


def make_bundle(folder: Path, items: int = 12) -> Path:
    """A bundle of three tasks of the three kinds."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    entries = []
    (folder / "eval_data" / "some").mkdir(parents=True)
    for name, (kind, shots, more) in TASKS.items():
        lines = []
        for n in range(items):
            continuation = words(2)
            lines.append(
                {
                    "multiple_choice": {"query": words(4), "choices": [words(2), words(3)], "gold": n % 2},
                    "schema": {"context_options": [words(3), words(4)], "continuation": continuation, "gold": n % 2},
                    "language_modeling": {"context": words(5) + " ", "continuation": continuation, "other": 1},
                }[kind]
            )
        (folder / "eval_data" / "some" / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        entry = {"label": name, "dataset_uri": f"some/{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        entries.append(entry | more)
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    table = "Eval Task,Task Category,Random baseline\nchoose,x,50\nresolve,x,50.0\ngo_on,x,0\nother,x,25\n"
    (folder / "eval_meta_data.csv").write_text(table)
    return folder


@pytest.fixture
def files(tmp_path) -> Path:
    return make_bundle(tmp_path / "files")


def test_a_bundle_read(files, tmp_path):
    choose, resolve, go_on = open_bundle(files)
    assert (choose.kind, choose.shots, choose.delimiter, choose.baseline) == ("multiple_choice", 2, "\nA: ", 0.5)
    assert (resolve.kind, resolve.delimiter) == ("schema", " ") and go_on.baseline == 0.0
    lines = [json.loads(line) for line in choose.path.read_text().splitlines()]
    random.Random(1337).shuffle(lines)
    assert read_items(choose) == lines
    assert read_items(choose, 3) == lines[:3]
    assert set(read_items(go_on)[0]) == {"context", "continuation"}
    assert find_bundle(files) == files
    (tmp_path / "outer").mkdir()
    files.rename(tmp_path / "outer" / "eval_bundle")
    assert find_bundle(tmp_path / "outer") == tmp_path / "outer" / "eval_bundle"


CHOOSE, GO_ON = "eval_data/some/choose.jsonl", "eval_data/some/go_on.jsonl"
DAMAGE = {
    "no list": ("core.yaml", None, "cannot read .*core.yaml.*--bundle"),
    "list": ("core.yaml", "icl_tasks: [{label: x}]", r"core\.yaml is damaged: KeyError 'icl_task_type'"),
    "kind": ("core.yaml", "icl_tasks: [{label: choose, icl_task_type: essay}]", "of kind 'essay', not multiple_choice"),
    "no tasks": ("core.yaml", "icl_tasks: []", "it lists no tasks, or two of one name"),
    "guessing is always right": (
        "eval_meta_data.csv",
        "Eval Task,Random baseline\nchoose,100\n",
        "2 solved examples and a baseline of 100%",
    ),
    "no baselines": ("eval_meta_data.csv", None, "cannot read .*eval_meta_data.csv"),
    "baseline": ("eval_meta_data.csv", "Eval Task,Random baseline\nresolve,50\n", "no baseline for task choose"),
    "baselines": ("eval_meta_data.csv", "a,b\n1,2\n", "eval_meta_data.csv is damaged"),
    "no items": (GO_ON, None, "lacks .*go_on.jsonl, the items of task go_on"),
    "not JSON": (CHOOSE, '{"query": "a"\n', r"choose\.jsonl, line 1: not an item of a multiple_choice task"),
    "no field": (CHOOSE, '\n{"query": "a", "gold": 0}\n', "line 2: .*no field 'choices'"),
    "gold": (CHOOSE, '{"query": "a", "choices": ["b"], "gold": 1}', "gold=1 is none of the choices"),
    "text": (GO_ON, '{"context": [], "continuation": "b"}', "'context' holds list, not text"),
    "list of lists": (GO_ON, "[1]", "an object was expected, not list"),
    "too few": (CHOOSE, '{"query": "a", "choices": ["b"], "gold": 0}\n' * 2, "at least 3 items: there are 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(files, damage):
    name, content, message = DAMAGE[damage]
    if content is None:
        (files / name).unlink()
    else:
        (files / name).write_text(content)
    with pytest.raises(UserError, match=message):
        for one in open_bundle(files):
            read_items(one)


def test_download(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bundle, "URL", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(UserError, match=r"(?s)cannot download the CORE tasks.*curl -O http.*--bundle"):
        find_bundle()
    served = tmp_path / "served"
    served.mkdir()
    with zipfile.ZipFile(served / "eval_bundle.zip", "w") as archive:
        for path in files.rglob("*"):
            archive.write(path, Path("eval_bundle") / path.relative_to(files))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(bundle, "URL", f"http://127.0.0.1:{server.server_port}/missing.zip")
        with pytest.raises(UserError, match="404"):
            find_bundle()
        monkeypatch.setattr(bundle, "URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
        assert len(open_bundle(find_bundle())) == 3
        server.shutdown()
    assert find_bundle() == tmp_path / "cache" / "eval_bundle", "kept: the server is gone"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["eval_bundle"]


def test_rendering_in_processes_gives_the_same(files, tiny_data, monkeypatch):
    tok = tokenizer.load(tiny_data / "tokenizer.model")
    rendering = core.Rendering(open_bundle(files), 0, tok.to_bytes(), 1000)
    alone = core.render_all(rendering)
    monkeypatch.setattr(core, "FEW_ITEMS", 0)
    monkeypatch.setattr(core, "ITEMS_PER_JOB", 5)
    for group, others in zip(alone, core.render_all(rendering, workers=2), strict=True):
        assert [spans(item) for item in group] == [spans(item) for item in others]
        assert len(group) == 12


def test_what_the_tokenizer_cannot_write_is_named(files):
    from nanochat_jax.char import CharTokenizer

    rendering = core.Rendering(open_bundle(files), 0, CharTokenizer("abc").to_bytes(), 1000)
    with pytest.raises(
        UserError, match=r"task choose \(.*choose.jsonl\), item 0 in CORE's order: character .* of the text"
    ):
        core.render_all(rendering)


def test_main_measures_stores_and_prints(files, tiny_base, tmp_path, capsys):
    checkpoint = tmp_path / "base"
    checkpoint.symlink_to(tiny_base)
    config = evaluate.Config(checkpoint, suite="core", bundle=files, rows=1)
    try:
        first = evaluate.main(config)["suites"]["core"]
        printed = capsys.readouterr().out
        assert list(first["tasks"]) == list(TASKS)
        assert first["core"] is None and "mean of 3 of CORE's 22 tasks" in printed
        assert 1 <= first["compilations"] <= 12 and f"programs compiled: {first['compilations']}" in printed
        for name, result in first["tasks"].items():
            assert result["examples"] == 12
            assert result["accuracy"] == pytest.approx(result["right"] / 12)
            baseline = result["baseline"]
            assert result["centred"] == pytest.approx((result["accuracy"] - baseline) / (1 - baseline))
            assert f"{name:8} " in printed
        again = evaluate.main(config)["suites"]["core"]
        assert again == first and "measured before" in capsys.readouterr().out
        capped = evaluate.main(dataclasses.replace(config, examples=4))["suites"]["core"]
        assert [result["examples"] for result in capped["tasks"].values()] == [4, 4, 4]
        with pytest.raises(UserError, match="task go_on shows 3 solved examples"):
            evaluate.main(dataclasses.replace(config, examples=3))
    finally:
        (tiny_base / "evaluation.json").unlink(missing_ok=True)


def test_what_a_model_reads_at_most():
    assert core.longest_prompt(ARCHITECTURES["gpt2"]) == 512
    assert core.longest_prompt(ARCHITECTURES["nanochat"]) == 640


def test_shapes_are_at_most_a_dozen():
    assert len(SHAPES) == len(set(SHAPES)) == 11
    assert score.ROUNDING % 64 == 0
