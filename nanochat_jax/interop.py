"""A bridge to nanochat's checkpoints, in both directions.

Nothing that is read here runs code: torch files are opened with weights_only, pickled tokenizers by bpe.py's restricted
reader, all else is JSON. Torch is needed for whole checkpoints, and imported only there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import bpe, model
from nanochat_jax.config import Architecture, ModelConfig, from_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json, replacing, write_bytes
from nanochat_jax.layers import Compute
from nanochat_jax.tokenizer import Tokenizer

Arrays = Mapping[str, np.ndarray]

# Ours, as a dotted path → nanochat's, as torch names it. Matrices are transposed, tables and vectors are not.
_TO_UPSTREAM = (
    (r"wte", "transformer.wte.weight"),
    (r"lm_head", "lm_head.weight"),
    (r"smear_gate", "smear_gate.weight"),
    (r"block_(\d+)\.attn\.value_embed", r"value_embeds.\1.weight"),
    (r"block_(\d+)\.attn\.ve_gate", r"transformer.h.\1.attn.ve_gate.weight"),
    (r"block_(\d+)\.attn\.proj", r"transformer.h.\1.attn.c_proj.weight"),
    (r"block_(\d+)\.attn\.([qkv])", r"transformer.h.\1.attn.c_\2.weight"),
    (r"block_(\d+)\.mlp\.(fc|proj)", r"transformer.h.\1.mlp.c_\2.weight"),
    (r"(resid_lambdas|x0_lambdas|smear_lambda|backout_lambda)", r"\1"),
)
_UNTRANSPOSED = re.compile(r"wte|value_embed|_lambda")


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, in our terms."""

    params: model.Params
    cfg: Architecture
    tokenizer: Tokenizer
    compute_dtype: str  # that the stored dtypes are those of
    step: int = 0  # of its training, as far as known


def _translate(path: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, path):
            return match.expand(replacement)
    raise KeyError(path)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(key.key for key in path)


def fill(
    cfg: Architecture,
    arrays: Arrays,
    table: tuple[tuple[str, str], ...],
    adapt: Callable[[str, np.ndarray], np.ndarray],
    source: str,
) -> model.Params:
    """A parameter tree of an architecture from arrays by foreign name, each accounted for."""
    expected = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg, Compute()))
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    names = {_dotted(path): _translate(_dotted(path), table) for path, _ in leaves}
    missing, unknown = sorted(set(names.values()) - arrays.keys()), sorted(arrays.keys() - set(names.values()))
    if missing:
        raise UserError(f"{source}: missing {_some(missing)}; is it of another, or an older, architecture?")
    if unknown:
        raise UserError(f"{source}: {_some(unknown)} not known to this architecture; does the config fit?")

    def take(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        dotted = _dotted(path)
        array = adapt(dotted, arrays[names[dotted]])
        if array.shape != like.shape:
            raise UserError(f"{source}: {names[dotted]!r} gives {array.shape}, the config asks for {like.shape}")
        return array

    return jax.tree_util.tree_map_with_path(take, expected)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"tensors {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def params_from_upstream(arrays: Arrays, cfg: ModelConfig, source: str = "nanochat checkpoint") -> model.Params:
    """Our parameters from nanochat's, in the dtypes that the arrays have.

    Args:
        arrays: by torch name, matrices (out, in).
        cfg: the architecture that they belong to.
        source: what messages call it.

    Raises:
        UserError: a tensor is missing, is one too many, or has another shape than the architecture says.
    """

    def adapt(path: str, array: np.ndarray) -> np.ndarray:
        return array if _UNTRANSPOSED.search(path) else array.T

    return fill(cfg, arrays, _TO_UPSTREAM, adapt, source)


def params_to_upstream(params: model.Params) -> dict[str, np.ndarray]:
    """nanochat's names and layout for our parameters, in their dtypes."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dotted, array = _dotted(path), np.asarray(leaf)
        arrays[_translate(dotted, _TO_UPSTREAM)] = array if _UNTRANSPOSED.search(dotted) else array.T
    return arrays


def read_upstream(folder: Path, *, step: int | None = None, tokenizer: Path | None = None) -> Foreign:
    """Open a checkpoint folder of nanochat: model_*.pt, meta_*.json, tokenizer.pkl. Needs torch.

    Args:
        folder: where they lie.
        step: which checkpoint; default: the newest.
        tokenizer: the pickled tokenizer; default: in the folder, or where nanochat keeps it beside its checkpoints.

    Raises:
        UserError: a file is missing, damaged, or not of this architecture.
    """
    steps = [int(m[1]) for path in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", path.name))]
    if not steps:
        raise UserError(f"{folder} holds no model_<step>.pt of nanochat")
    step = max(steps) if step is None else step
    model_path, meta_path = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    meta = read_json(meta_path)
    if not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{meta_path} is damaged: no 'model_config' in it")
    cfg = from_json(ModelConfig, meta["model_config"], str(meta_path))
    params = params_from_upstream(_read_torch(model_path), cfg, str(model_path))
    places = [folder / "tokenizer.pkl", folder.parent.parent / "tokenizer" / "tokenizer.pkl"]
    found = tokenizer or next((path for path in places if path.exists()), places[0])
    tok = bpe.from_pickle(found)
    if tok.vocab_size != cfg.vocab_size:
        raise UserError(f"{found} has {tok.vocab_size:,} tokens, {meta_path} says vocab_size={cfg.vocab_size:,}")
    dtype = "bfloat16" if params["wte"].dtype == jnp.bfloat16 else "float32"
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg, Compute(dtype)))
    params = jax.tree.map(lambda array, like: array.astype(like.dtype), params, shapes)  # others widen, if they do
    return Foreign(params, cfg, tok, dtype, step)


def write_upstream(folder: Path, params: model.Params, cfg: ModelConfig, tok: Tokenizer, step: int) -> None:
    """Write a checkpoint that nanochat loads. Needs torch.

    A tokenizer that did not come from nanochat has no form there: it is written as tokenizer.model, in ours.
    """
    torch = _import_torch()

    def tensor(array: np.ndarray) -> Any:
        array = np.array(array, order="C")  # a copy: torch wants memory that it may write to
        if array.dtype == jnp.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    tensors = {name: tensor(array) for name, array in params_to_upstream(params).items()}
    with replacing(folder / f"model_{step:06d}.pt") as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(str(error)) from error
    if isinstance(tok, bpe.TiktokenTokenizer):
        write_bytes(folder / "tokenizer.pkl", tok.to_pickle())
    else:
        tok.save(folder / "tokenizer.model")
    write_json(folder / f"meta_{step:06d}.json", {"step": step, "model_config": cfg})


def _import_torch() -> Any:
    try:
        import torch  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UserError("nanochat's checkpoints are torch files: `pip install torch` to convert them") from error
    return torch


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _import_torch()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle, runtime, value errors: torch promises none in particular
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or holds more than tensors, and was not loaded: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise UserError(f"{path} is not a state dict (a dict of tensors by name)")

    def array(tensor: Any) -> np.ndarray:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:  # unknown to torch's numpy bridge
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return {str(name).removeprefix("_orig_mod."): array(x) for name, x in tensors.items()}  # prefix: torch.compile
