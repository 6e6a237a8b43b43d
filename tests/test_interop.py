"""Bridges: nanochat's checkpoints in and out, GPT-2 in; whatever is wrong with a file is named."""

import json
import os
import pickle
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
from safetensors.numpy import save_file

from nanochat_jax import bpe, gpt2_weights, interop, model, tokenizer
from nanochat_jax.char import CharTokenizer
from nanochat_jax.config import ModelConfig, to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.gpt2 import GPT2Config
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model
from nanochat_jax.tokenizer import CONTROL_TOKENS
from train import convert

CFG = ModelConfig(sequence_len=32, vocab_size=265, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
BF16 = Compute("bfloat16", "xla")
FLOAT32 = Compute("float32", "xla")


def assert_same(ours, theirs):
    """Bitwise, dtypes included."""

    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(same, ours, theirs)


def random_params(cfg, compute=FLOAT32, seed=0):
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg, compute))
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype) for leaf in leaves])


@pytest.fixture
def tok():
    """As nanochat's: 256 bytes and nine special tokens."""
    special = {name: 256 + i for i, name in enumerate(CONTROL_TOKENS[:9])}
    return bpe.from_ranks(r"\p{L}+|\P{L}", {bytes([byte]): byte for byte in range(256)}, special)


# nanochat


@pytest.mark.parametrize("compute", [FLOAT32, BF16], ids=["float32", "bfloat16"])
def test_round_trip_of_parameters_is_bitwise(compute):
    params = random_params(CFG, compute)
    theirs = interop.params_to_upstream(params)
    assert theirs["transformer.h.0.mlp.c_fc.weight"].shape == (128, 32), "torch's layout is (out, in)"
    assert theirs["value_embeds.2.weight"].dtype == jnp.dtype(compute.dtype)
    assert_same(interop.params_from_upstream(theirs, CFG), params)


def change(arrays, name, array):
    return {key: value for key, value in {**arrays, name: array}.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("smear_gate.weight", None, r"missing tensors smear_gate\.weight; is it of another, or an older"),
        ("value_embeds.1.weight", np.zeros((320, 16)), r"tensors value_embeds\.1\.weight not known"),
        ("transformer.h.1.attn.c_k.weight", np.zeros((32, 32)), r"c_k\.weight' gives \(32, 32\), .* \(32, 16\)"),
        ("transformer.wte.weight", np.zeros((384, 32)), r"wte\.weight' gives \(384, 32\), .* \(320, 32\)"),
        ("resid_lambdas", np.zeros(()), "resid_lambdas"),
    ],
)
def test_wrong_tensors_are_named(name, array, message):
    arrays = change(interop.params_to_upstream(random_params(CFG)), name, array)
    with pytest.raises(UserError, match=message):
        interop.params_from_upstream(arrays, CFG)


def test_older_architecture_is_refused_by_its_missing_tensors():
    new = ("smear", "backout", "x0", "resid", "value_embeds", "ve_gate")
    arrays = interop.params_to_upstream(random_params(CFG))
    old = {name: x for name, x in arrays.items() if not any(part in name for part in new)}
    with pytest.raises(UserError, match=r"missing tensors backout_lambda, resid_lambdas, smear_gate\.weight, .* more;"):
        interop.params_from_upstream(old, CFG)


@pytest.mark.torch
class TestTorch:
    """What needs torch to be installed: nanochat's files themselves."""

    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.fixture
    def theirs(self, torch, tok, tmp_path):
        """A folder as nanochat writes it, from torch.compile, with bfloat16 tables; and the parameters in it."""
        folder, params = tmp_path / "theirs", random_params(CFG, BF16)
        folder.mkdir()

        def tensor(array):
            wide = torch.tensor(np.asarray(array, np.float32))
            return wide.bfloat16() if array.dtype == jnp.bfloat16 else wide

        arrays = interop.params_to_upstream(params)
        torch.save({f"_orig_mod.{k}": tensor(x) for k, x in arrays.items()}, folder / "model_000700.pt")
        torch.save({}, folder / "model_000100.pt")
        meta = {"step": 700, "val_bpb": 0.9, "model_config": to_json(CFG), "user_config": {}}
        (folder / "meta_000700.json").write_text(json.dumps(meta))
        encoding = tiktoken.Encoding(
            "rustbpe",
            pat_str=r"\p{L}+|\P{L}",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={name: 256 + i for i, name in enumerate(CONTROL_TOKENS[:9])},
        )
        (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
        return folder, params

    def test_theirs_to_ours_to_theirs(self, torch, theirs, tmp_path):
        folder, params = theirs
        convert.main(convert.Config(str(folder), tmp_path / "ours"))
        loaded = load_model(tmp_path / "ours")
        assert_same(loaded.params, params)
        assert (loaded.cfg, loaded.step) == (CFG, 700)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"

        convert.main(convert.Config(str(tmp_path / "ours"), tmp_path / "back", to="nanochat"))
        before, after = (torch.load(f / "model_000700.pt", weights_only=True) for f in (folder, tmp_path / "back"))
        before = {name.removeprefix("_orig_mod."): x for name, x in before.items()}
        assert before.keys() == after.keys()
        assert all(before[name].dtype == after[name].dtype for name in before)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert pickle.loads((tmp_path / "back" / "tokenizer.pkl").read_bytes()).encode_ordinary("a") == [97]
        assert json.loads((tmp_path / "back" / "meta_000700.json").read_text())["model_config"] == to_json(CFG)
        assert_same(interop.read_upstream(tmp_path / "back").params, params)

    def test_tokenizer_in_nanochats_usual_place(self, theirs, tmp_path):
        folder = tmp_path / "base_checkpoints" / "d3"
        folder.parent.mkdir()
        theirs[0].rename(folder)
        (tmp_path / "tokenizer").mkdir()
        (folder / "tokenizer.pkl").rename(tmp_path / "tokenizer" / "tokenizer.pkl")
        assert interop.read_upstream(folder).tokenizer.vocab_size == CFG.vocab_size

    def test_our_tokenizer_goes_along_in_our_form(self, tmp_path):
        tok = CharTokenizer.train(["abc"])
        interop.write_upstream(tmp_path, random_params(CFG), CFG, tok, 3)
        assert {path.name for path in tmp_path.iterdir()} == {"model_000003.pt", "meta_000003.json", "tokenizer.model"}

    def test_truncated_model(self, theirs):
        path = theirs[0] / "model_000700.pt"
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(UserError, match=r"model_000700\.pt is damaged"):
            interop.read_upstream(theirs[0])

    def test_malicious_model_runs_nothing(self, torch, theirs, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"a": Bomb()}, theirs[0] / "model_000700.pt")
        with pytest.raises(UserError, match="was not loaded"):
            interop.read_upstream(theirs[0])
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [[1, 2], {"step": 3}])
    def test_no_state_dict(self, torch, theirs, content):
        torch.save(content, theirs[0] / "model_000700.pt")
        with pytest.raises(UserError, match="state dict"):
            interop.read_upstream(theirs[0])

    def test_wrong_vocabulary(self, theirs):
        path = theirs[0] / "meta_000700.json"
        path.write_text(path.read_text().replace('"vocab_size": 265', '"vocab_size": 264'))
        with pytest.raises(UserError, match=r"tokenizer\.pkl has 265 tokens, .* says vocab_size=264"):
            interop.read_upstream(theirs[0])

    @pytest.mark.parametrize("name", ["meta_000700.json", "tokenizer.pkl"])
    def test_missing_file(self, theirs, name):
        (theirs[0] / name).unlink()
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            interop.read_upstream(theirs[0])

    def test_disk_full(self, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(UserError, match=r"cannot write .*model_000700\.pt"):
                interop.write_upstream(tmp_path, random_params(CFG), CFG, CharTokenizer("a"), 700)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(tmp_path.iterdir())


def test_folder_without_checkpoint_or_step(tmp_path):
    with pytest.raises(UserError, match=r"holds no model_<step>\.pt"):
        interop.read_upstream(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no 'model_config'"),
        ('{"model_config": {"n_layers": 3}}', "unknown key 'n_layers'"),
        ('{"model_config": {"n_layer": 0}}', "n_layer=0"),
    ],
)
def test_damaged_meta(tmp_path, content, message):
    (tmp_path / "model_000001.pt").touch()
    (tmp_path / "meta_000001.json").write_text(content)
    with pytest.raises(UserError, match=message):
        interop.read_upstream(tmp_path)


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        interop.write_upstream(tmp_path, random_params(CFG), CFG, CharTokenizer("a"), 1)


# GPT-2


@pytest.fixture(scope="module")
def weights():
    """Random weights of transformers, as its files hold them."""
    with np.load(Path(__file__).parent / "fixtures" / "gpt2.npz") as stored:
        return {name.removeprefix("weights/"): x for name, x in stored.items() if name.startswith("weights/")}


@pytest.fixture
def gpt2_folder(tmp_path):
    """A model as downloaded from the hub: 256 bytes, one merge and <|endoftext|>."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    characters = list(bpe._byte_of_character())
    vocab = {token: i for i, token in enumerate([*characters, "th", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    values = {"n_positions": 16, "vocab_size": 258, "n_layer": 2, "n_head": 2, "n_embd": 8}
    write_json(folder / "config.json", values | {"activation_function": "gelu_new", "model_type": "gpt2"})
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (258, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for i in range(2):
        shapes |= {f"h.{i}.attn.c_attn.weight": (8, 24), f"h.{i}.attn.c_attn.bias": (24,)}
        shapes |= {f"h.{i}.attn.c_proj.weight": (8, 8), f"h.{i}.attn.c_proj.bias": (8,)}
        shapes |= {f"h.{i}.mlp.c_fc.weight": (8, 32), f"h.{i}.mlp.c_fc.bias": (32,)}
        shapes |= {f"h.{i}.mlp.c_proj.weight": (32, 8), f"h.{i}.mlp.c_proj.bias": (8,)}
        shapes |= {f"h.{i}.ln_{n}.{part}": (8,) for n in (1, 2) for part in ("weight", "bias")}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))  # old files keep their causal masks
    save_file(arrays, folder / "model.safetensors")
    return folder


def test_convert_gpt2(gpt2_folder, tmp_path):
    convert.main(convert.Config(str(gpt2_folder), tmp_path / "run"))
    loaded = load_model(tmp_path / "run")
    assert loaded.cfg == GPT2Config(sequence_len=16, vocab_size=268, n_layer=2, n_head=2, n_embd=8)
    assert loaded.tokenizer.vocab_size == 268, "258 of GPT-2, of which one is <|bos|>, and ten control tokens"
    assert tokenizer.load(tmp_path / "run" / "tokenizer.model").sha256 == loaded.tokenizer.sha256
    logits = model.forward(loaded.params, loaded.cfg, np.array([loaded.tokenizer.encode("the th")]), compute=FLOAT32)
    assert logits.shape == (1, 4, 268)
    with pytest.raises(UserError, match="holds another run already"):
        convert.main(convert.Config("gpt2", tmp_path / "run"))
    with pytest.raises(UserError, match="did you mean --to nanochat"):
        convert.main(convert.Config(str(tmp_path / "run"), tmp_path / "other"))
    with pytest.raises(UserError, match="no such architecture"):
        convert.main(convert.Config(str(tmp_path / "run"), tmp_path / "other", to="nanochat"))


def test_a_conversion_is_repeated_and_completed_by_the_same_command(gpt2_folder, tmp_path, monkeypatch, capsys):
    config = convert.Config(str(gpt2_folder), tmp_path / "run")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert.Checkpoints, "save", interrupted)
        convert.main(config)
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path / "run")
    convert.main(config)
    tokenizer_path = tmp_path / "run" / "tokenizer.model"
    before = load_model(tmp_path / "run").stored.fingerprint, tokenizer_path.read_bytes()
    tokenizer_path.unlink()
    convert.main(config)
    assert (load_model(tmp_path / "run").stored.fingerprint, tokenizer_path.read_bytes()) == before
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.delattr(convert, "read_gpt2")
        convert.main(config)
    assert "is there already" in capsys.readouterr().out
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="holds another run already"):
        convert.main(config)


def test_added_tokens_are_improbable(weights):
    """The control tokens that GPT-2 never saw: logits as the mean of all, and the others' stay what they were."""
    plain, more = (GPT2Config(48, size, 3, 4, 32) for size in (100, 110))
    tokens_BT = np.arange(40)[None]
    before = model.forward(gpt2_weights.params_from_gpt2(weights, plain), plain, tokens_BT, compute=FLOAT32)
    after = model.forward(gpt2_weights.params_from_gpt2(weights, more), more, tokens_BT, compute=FLOAT32)
    np.testing.assert_allclose(after[..., :100], before, rtol=0, atol=1e-5)
    mean = np.asarray(before).mean(-1, keepdims=True)
    np.testing.assert_allclose(after[..., 100:], np.repeat(mean, 10, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("transformer.h.1.ln_2.bias", None, r"missing tensors h\.1\.ln_2\.bias"),
        ("transformer.h.0.attn.c_attn.weight", None, r"missing tensors h\.0\.attn\.k\.weight, h\.0\.attn\.q"),
        ("transformer.h.3.ln_1.bias", np.zeros(32), r"tensors h\.3\.ln_1\.bias not known"),
        ("transformer.wpe.weight", np.zeros((47, 32)), r"wpe\.weight' gives \(47, 32\)"),
        ("transformer.wte.weight", np.zeros((101, 32)), r"wte\.weight' gives \(101, 32\)"),
        ("lm_head.weight", np.zeros((100, 32)), "GPT-2 ties them"),
    ],
)
def test_wrong_gpt2_tensors_are_named(weights, name, array, message):
    with pytest.raises(UserError, match=message):
        gpt2_weights.params_from_gpt2(change(weights, name, array), GPT2Config(48, 100, 3, 4, 32))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_function", "gelu", "activation_function='gelu', but GPT-2 has 'gelu_new'"),
        ("n_layer", None, "key 'n_layer' is missing"),
        ("vocab_size", 1000, "says vocab_size=1,000"),
        ("n_head", 3, "n_head=3"),
    ],
)
def test_wrong_gpt2_config(gpt2_folder, key, value, message):
    values = json.loads((gpt2_folder / "config.json").read_text())
    (gpt2_folder / "config.json").write_text(json.dumps(change(values, key, value)))
    with pytest.raises(UserError, match=message):
        gpt2_weights.read_gpt2(str(gpt2_folder))


def test_damaged_safetensors(gpt2_folder):
    path = gpt2_folder / "model.safetensors"
    whole = path.read_bytes()
    for data in (b"", whole[:50], whole[:-10], b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            gpt2_weights.read_gpt2(str(gpt2_folder))
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        gpt2_weights.read_gpt2(str(gpt2_folder))


def test_no_such_folder_and_no_network(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'gpt2-xl' is no local folder .*ConnectionError.*network"):
        gpt2_weights.read_gpt2("gpt2-xl")
