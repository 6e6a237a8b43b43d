"""The suites of train.evaluate: each measures a model, given what was measured before, and shows what came out."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from tqdm import tqdm

from nanochat_jax import sharding
from nanochat_jax.config import to_json
from nanochat_jax.data.batches import validation_batches
from nanochat_jax.errors import UserError
from nanochat_jax.eval import core
from nanochat_jax.eval.baselines import baselines
from nanochat_jax.eval.bpb import make_evaluator
from nanochat_jax.eval.bundle import CORE_TASKS, find_bundle, open_bundle
from nanochat_jax.eval.chat import CHATCORE, Evaluator, Sizes, chatcore
from nanochat_jax.eval.held_out import Result, open_held_out
from nanochat_jax.eval.score import Scorer
from nanochat_jax.generate import continue_texts, usable_prompts
from nanochat_jax.load import LoadedModel
from nanochat_jax.sampling import Sampling
from nanochat_jax.tasks import open_task

if TYPE_CHECKING:
    from train.evaluate import Config

PROMPTS = ("", "", "The", "My fellow citizens", "In the year")  # the empty ones leave the model free to begin
SAMPLE_TOKENS = 96
SAMPLING = Sampling(temperature=0.8, top_k=50)


@dataclass(frozen=True)
class Subject:
    """What is measured, and how."""

    config: "Config"
    mesh: jax.sharding.Mesh
    model: LoadedModel


def measure_bpb(subject: Subject, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bits per byte of held-out text: the model's and the baselines'."""
    tok, mesh, data = subject.model.tokenizer, subject.mesh, subject.config.data
    assert data is not None
    held_out = open_held_out(data, tok, subject.model.cfg.sequence_len)
    known = before.get("texts", {}).get(data, {}).get("fingerprint")
    if known == held_out.fingerprint and not subject.config.force:
        return
    started, records = time.perf_counter(), held_out.records
    rows = subject.config.rows * sharding.batch_devices(mesh)
    evaluate = make_evaluator(subject.model.cfg, tok.byte_lengths, subject.model.compute, mesh)
    batches = validation_batches(records, rows, **sharding.host_share(mesh)._asdict())
    progress = tqdm(batches, desc="bits per byte", unit="batch", total=math.ceil(len(records) / rows), disable=None)
    measured = evaluate(subject.model.params, (sharding.put_batch(mesh, batch) for batch in progress))
    if not measured.bytes:
        raise UserError(f"--data {data} holds no text to measure on")
    result = Result(
        fingerprint=held_out.fingerprint,
        bytes=measured.bytes,
        tokens=measured.tokens,
        loss_nats_per_token=measured.loss,
        bits_per_byte=measured.bpb,
        interval=measured.interval,
        baselines=baselines(held_out.train, records, tok),
        seconds=round(time.perf_counter() - started, 2),
    )
    yield {"texts": {data: to_json(result)}}


def merge_bpb(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    texts = before.get("texts", {}) | new["texts"]
    return {"texts": texts, "seconds": round(sum(text["seconds"] for text in texts.values()), 2)}


def show_bpb(result: dict[str, Any]) -> None:
    for name, text in result["texts"].items():
        size, tokens, model = text["bytes"], text["tokens"], text["bits_per_byte"]
        print(f"{name}: {size:,} held-out bytes, {tokens:,} tokens ({size / tokens:.2f} bytes a token)\n")
        print(f"{'':16}{'bits per byte':>15}{'against the model':>20}")
        for method, value in {"this model": model, **text["baselines"]}.items():
            print(f"{method:16}{value:15.4f}{value / model:19.2f}×")
        if text["interval"]:
            print("\n95 % interval of the model's, over texts like this: {:.4f} – {:.4f}".format(*text["interval"]))
        better = [method for method, value in text["baselines"].items() if value <= model]
        print(f"the model {'does not beat ' + ', '.join(better) if better else 'beats all of them'}\n")


def write_samples(subject: Subject, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How the model begins on its own, and how it continues a few prompts."""
    if before and not subject.config.force:
        return
    started, loaded = time.perf_counter(), subject.model
    prompts = usable_prompts(loaded.cfg, loaded.tokenizer, PROMPTS)
    texts = continue_texts(
        loaded.params,
        loaded.cfg,
        loaded.tokenizer,
        prompts,
        max_new_tokens=SAMPLE_TOKENS,
        sampling=[replace(SAMPLING, seed=seed) for seed in range(len(prompts))],
        compute=loaded.compute,
    )
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    seconds = round(time.perf_counter() - started, 2)
    yield {"sampling": to_json(SAMPLING), "samples": samples, "seconds": seconds}


def show_samples(result: dict[str, Any]) -> None:
    for sample in result["samples"]:
        print(f"  {sample['prompt']}│{sample['text']}\n")


def measure_chat(subject: Subject, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Accuracy in tasks, one after the other; tasks without data are named and left out."""
    config, loaded, known = subject.config, subject.model, before.get("tasks", {})
    sizes = Sizes(config.rows, config.slots, config.max_new_tokens)
    evaluator = Evaluator(loaded.params, loaded.cfg, loaded.tokenizer, loaded.compute, subject.mesh, sizes)
    left_out: dict[str, UserError] = {}
    tasks = {name: (spec, open_task(spec)) for name, spec in task_specs(config.tasks).items()}
    for name, (spec, task) in tasks.items():
        asked = {"spec": spec, "limit": config.examples, "max_new_tokens": config.max_new_tokens}
        if known.get(name, {}).get("asked") == asked and not config.force:
            continue
        try:
            examples = list(task.examples("test")[: config.examples or None])
        except UserError as error:
            left_out[name] = error
            print(f"\n{name} is left out: {error}")
            continue
        with tqdm(desc=name, unit="example", total=len(examples), disable=None) as bar:
            result = {"asked": asked, **to_json(evaluator.evaluate(task, examples, bar.update))}
        yield {"tasks": {name: result}, "compilations": evaluator.compilations}
    if len(left_out) == len(tasks):
        raise UserError(f"none of the tasks could be measured: {', '.join(left_out)}; see above")


def merge_chat(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    tasks = before.get("tasks", {}) | new["tasks"]
    return {
        "tasks": tasks,
        "chatcore": chatcore({name: result for name, result in tasks.items() if not result["asked"]["limit"]}),
        "mean_centred": sum(result["centred"] for result in tasks.values()) / len(tasks),
        "compilations": new["compilations"],
        "seconds": round(sum(result["seconds"] for result in tasks.values()), 2),
    }


def task_specs(text: str) -> dict[str, str]:
    """The spec of each task by its name; of several of one name the last."""
    specs = [spec for part in text.split(",") for spec in (CHATCORE if part == "chatcore" else [part])]
    return {spec.partition("=")[0]: spec for spec in specs}


def show_chat(result: dict[str, Any]) -> None:
    print(f"{'task':15}{'kind':13}{'accuracy':>9}{'95 % interval':>16}{'baseline':>10}{'examples':>10}{'seconds':>9}")
    for name, task in result["tasks"].items():
        low, high = task["interval"]
        print(
            f"{name:15}{task['kind']:13}{task['accuracy']:8.1%}{f'{low:.1%} – {high:.1%}':>17}"
            f"{task['baseline']:10.0%}{task['examples']:10,}{task['seconds']:9.1f}"
        )
        if task["too_long"]:
            print(f"{'':15}{task['too_long']:,} prompts fill the context and count as wrong")
    mean = f"mean of {len(result['tasks'])} tasks, guessing at 0 and perfection at 1: {result['mean_centred']:.4f}"
    print(f"\n{mean if result['chatcore'] is None else f'ChatCORE {result["chatcore"]:.4f}; {mean}'}")
    compiled = result["compilations"]
    print(f"programs compiled: {compiled['categorical']} to choose letters, {compiled['engine']} to sample answers")


def measure_core(subject: Subject, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Accuracy in the tasks of the CORE bundle, all together; those measured before are kept."""
    config, loaded = subject.config, subject.model
    started, tasks = time.perf_counter(), open_bundle(find_bundle(config.bundle))
    asked = {task.name: {"task": task.fingerprint, "limit": config.examples} for task in tasks}
    known = {} if config.force else before.get("tasks", {})
    results = {name: known[name] for name in asked if known.get(name, {}).get("asked") == asked[name]}
    if not (missing := [task for task in tasks if task.name not in results]):
        return
    max_len = core.longest_prompt(loaded.cfg)
    rendered = core.render_all(core.Rendering(missing, config.examples, loaded.tokenizer.to_bytes(), max_len))
    tokens = config.rows * loaded.cfg.sequence_len
    scorer, scoring = Scorer(loaded.params, loaded.cfg, loaded.compute, subject.mesh, tokens), time.perf_counter()
    for name, result in core.evaluate(scorer, missing, rendered).items():
        results[name] = {"asked": asked[name], **to_json(result)}
    done, results = time.perf_counter(), {name: results[name] for name in asked}  # in the bundle's order
    mean = sum(result["centred"] for result in results.values()) / len(results)
    yield {
        "tasks": results,
        "core": mean if len(results) == CORE_TASKS and not config.examples else None,
        "mean_centred": mean,
        "compilations": scorer.compilations,
        "examples_per_second": sum(map(len, rendered)) / (done - scoring),
        "seconds": round(done - started, 2),
    }


def show_core(result: dict[str, Any]) -> None:
    width = max(map(len, result["tasks"]))
    print(f"{'task':{width}}  shots  examples  accuracy    95 % interval  guessing  centred")
    for name, task in result["tasks"].items():
        low, high = task["interval"]
        print(
            f"{name:{width}}  {task['shots']:5}{task['examples']:10,}{task['accuracy']:10.1%}"
            f"{f'{low:.1%} – {high:.1%}':>17}{task['baseline']:10.1%}{task['centred']:9.4f}"
        )
        if task["shortened"]:
            print(f"{'':{width}}  {task['shortened']:,} are longer than the model reads: their end alone counts")
    mean = f"mean of {len(result['tasks'])} of CORE's {CORE_TASKS} tasks, guessing at 0: {result['mean_centred']:.4f}"
    print(f"\n{mean if result['core'] is None else f'CORE {result["core"]:.4f}'}")
    rate = f"{result['examples_per_second']:,.1f} examples/s, compilation included"
    print(f"programs compiled: {result['compilations']}; {rate}")


def replace_whole(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return new


class Suite(NamedTuple):
    """Measure, given the last result for this checkpoint, and yield what is new; merge that with the last; show it."""

    measure: Callable[[Subject, dict[str, Any]], Iterator[dict[str, Any]]]
    merge: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


SUITES = {
    "core": Suite(measure_core, replace_whole, show_core),
    "bpb": Suite(measure_bpb, merge_bpb, show_bpb),
    "sample": Suite(write_samples, replace_whole, show_samples),
    "chat": Suite(measure_chat, merge_chat, show_chat),
}
