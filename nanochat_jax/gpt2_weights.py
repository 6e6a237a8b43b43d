"""GPT-2's weights, as Hugging Face stores them, in our terms."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanochat_jax import bpe, model
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.gpt2 import LAYER_NORM_EPSILON, GPT2Config
from nanochat_jax.interop import Arrays, Foreign, fill

# Ours → transformers', whose one matrix for q, k and v is split first. All is (in, out) there too.
_NAMES = (
    (r"(w[tp]e)", r"\1.weight"),
    (r"ln_f\.scale", "ln_f.weight"),
    (r"ln_f\.bias", "ln_f.bias"),
    (r"block_(\d+)\.(ln_[12])\.scale", r"h.\1.\2.weight"),
    (r"block_(\d+)\.(ln_[12])\.bias", r"h.\1.\2.bias"),
    (r"block_(\d+)\.([qkv])\.kernel", r"h.\1.attn.\2.weight"),
    (r"block_(\d+)\.([qkv])\.bias", r"h.\1.attn.\2.bias"),
    (r"block_(\d+)\.proj\.kernel", r"h.\1.attn.c_proj.weight"),
    (r"block_(\d+)\.proj\.bias", r"h.\1.attn.c_proj.bias"),
    (r"block_(\d+)\.fc\.kernel", r"h.\1.mlp.c_fc.weight"),
    (r"block_(\d+)\.fc\.bias", r"h.\1.mlp.c_fc.bias"),
    (r"block_(\d+)\.fc_proj\.kernel", r"h.\1.mlp.c_proj.weight"),
    (r"block_(\d+)\.fc_proj\.bias", r"h.\1.mlp.c_proj.bias"),
)


def params_from_gpt2(arrays: Arrays, cfg: GPT2Config, source: str = "GPT-2 checkpoint") -> model.Params:
    """Our parameters, float32, from those of transformers' GPT2LMHeadModel.

    Args:
        arrays: by name, with or without the prefix "transformer.".
        cfg: the architecture. Tokens that its vocabulary has in addition get the mean of all embeddings, which
            makes them improbable but not impossible.
        source: what messages call it.

    Raises:
        UserError: a tensor is missing, is one too many, or has another shape than the architecture says.
    """
    split: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        name = name.removeprefix("transformer.")
        if match := re.fullmatch(r"(h\.\d+\.attn)\.c_attn\.(weight|bias)", name):
            for part, third in zip("qkv", np.array_split(array, 3, axis=-1), strict=True):
                split[f"{match[1]}.{part}.{match[2]}"] = third
        elif not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):  # causal masks of old files
            split[name] = array
    untied = split.pop("lm_head.weight", None)
    if untied is not None and not np.array_equal(untied, split.get("wte.weight", untied)):
        raise UserError(f"{source}: lm_head.weight differs from wte.weight; GPT-2 ties them")

    def adapt(path: str, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array, np.float32)
        if path != "wte" or array.ndim != 2 or len(array) > cfg.vocab_size:
            return array
        added = np.tile(array.mean(axis=0, keepdims=True), (cfg.vocab_size - len(array), 1))
        padding = np.zeros((cfg.padded_vocab_size - cfg.vocab_size, array.shape[1]), np.float32)
        return np.concatenate([array, added, padding])

    return fill(cfg, split, _NAMES, adapt, source)


def read_gpt2(source: str) -> Foreign:
    """Open GPT-2 weights in safetensors, with their config.json, vocab.json and merges.txt.

    Args:
        source: a local folder, or a model's name on the Hugging Face hub ("gpt2-xl"), which is downloaded.

    Raises:
        UserError: no such folder and no network, or a file is missing, damaged, or not GPT-2's.
    """
    folder = Path(source) if Path(source).is_dir() else _download(source)
    tok = bpe.from_gpt2_files(folder / "vocab.json", folder / "merges.txt")
    cfg = _gpt2_config(folder / "config.json")
    if cfg.vocab_size > tok.vocab_size:
        raise UserError(
            f"{folder}: config.json says vocab_size={cfg.vocab_size:,}, vocab.json has fewer tokens: "
            f"{tok.vocab_size:,}, control tokens included"
        )
    cfg = replace(cfg, vocab_size=tok.vocab_size)
    path = folder / "model.safetensors"
    return Foreign(params_from_gpt2(read_safetensors(path), cfg, str(path)), cfg, tok, "float32")


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file; UserError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}; download it again") from error


def _gpt2_config(path: Path) -> GPT2Config:
    values = read_json(path)
    fixed = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise UserError(f"{path}: {key}={values[key]!r}, but GPT-2 has {value!r}")
    try:
        sizes = (values[key] for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"))
        return GPT2Config(*sizes)
    except KeyError as error:
        raise UserError(f"{path}: key {error} is missing; is it GPT-2's?") from error


def _download(name: str) -> Path:
    import huggingface_hub

    files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's client passes on whatever its transport raises
        raise UserError(
            f"{name!r} is no local folder and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the network, or give a folder with {', '.join(files)}"
        ) from error
