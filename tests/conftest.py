"""Eight virtual CPU devices, so that every multi-device test runs everywhere, and strict broadcasting."""

import logging
import os
import random
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same small programs are compiled by many tests and by the processes that tests start.
jax.config.update("jax_compilation_cache_dir", os.environ.get("NANOCHAT_TEST_CACHE", "/tmp/nanochat_jax_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def lowered_for():
    """The text of a function's program for an NVIDIA GPU that need not be there, given its name and abstract arrays."""

    def lowered_for(gpu: str, function, *arrays) -> str:
        device = AbstractDevice(gpu, 108, "gpu")
        with use_abstract_mesh(AbstractMesh((1,), ("one",), abstract_device=device)):
            return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    return lowered_for


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory):
    """A storage emulator on the loopback, which the real client talks to, here and in processes started from here."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, False, "bucket", data_dir=str(tmp_path_factory.mktemp("buckets")))
    server.start()
    os.environ["STORAGE_EMULATOR_HOST"] = "http://127.0.0.1:{1}".format(*server._api._httpd.server_address)
    yield
    server.stop()


@pytest.fixture
def bucket(bucket_server, tmp_path, monkeypatch) -> str:
    """gs://… of a folder that nobody else uses; what is copied from it goes to a cache of its own."""
    monkeypatch.setattr("nanochat_jax.files.CACHE", tmp_path / "cache")
    return f"gs://bucket/{tmp_path.parent.name}-{tmp_path.name}"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A prepared folder: 300-odd tokens of vocabulary, records of 32 + 1 tokens, made from a made-up text."""
    from nanochat_jax.data.prepare import PrepareConfig, prepare
    from nanochat_jax.tokenizer import train

    folder = tmp_path_factory.mktemp("tiny")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=rng.randint(20, 200))) + ".\n" for _ in range(150)]
    for number, document in enumerate(documents):
        (folder / f"{number:03}.txt").write_text(document)
    train(documents, 320).save(folder / "tokenizer.model")
    prepare(
        PrepareConfig(
            source=f"text:{folder}/*.txt",
            tokenizer=folder / "tokenizer.model",
            out=folder / "data",
            sequence_len=32,
            val_fraction=0.1,
            workers=1,
        )
    )
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A run of pretraining, two steps long, whose tokenizer and context of 128 suit the generated tasks."""
    from nanochat_jax.chat import content_parts
    from nanochat_jax.data.prepare import PrepareConfig, prepare
    from nanochat_jax.tasks import open_task
    from nanochat_jax.tokenizer import train
    from train import pretrain
    from train.stage import RunConfig

    folder = tmp_path_factory.mktemp("base")
    tasks = [open_task(name).examples("train")[:300] for name in ("arithmetic", "identity", "spelling")]
    texts = [
        "\n".join(part["text"] for message in example.conversation["messages"] for part in content_parts(message))
        for examples in tasks
        for example in examples
    ]
    (folder / "text.txt").write_text("\n".join(texts))
    train(texts, 512).save(folder / "tokenizer.model")
    prepare(
        PrepareConfig(
            source=f"text:{folder}/text.txt",
            tokenizer=folder / "tokenizer.model",
            out=folder / "data",
            sequence_len=128,
            val_fraction=0.1,
            workers=1,
        )
    )
    pretrain.main(
        pretrain.Config(
            data=folder / "data",
            run=RunConfig(out=folder / "base"),
            model=pretrain.ModelArgs(depth=1, head_dim=32),
            steps=2,
            batch_tokens=1024,
            lr_scale=0.5,
            prompts=(),
        )
    )
    return folder / "base"
