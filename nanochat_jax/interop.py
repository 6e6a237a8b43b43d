"""Bridges to other programs' parameters."""

import re
from collections.abc import Mapping

import jax
import numpy as np

from nanochat_jax import model
from nanochat_jax.config import ModelConfig
from nanochat_jax.errors import UserError

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


def upstream_name(path: str) -> str:
    """nanochat's name for the parameter at a dotted path of our tree."""
    for pattern, replacement in _TO_UPSTREAM:
        if match := re.fullmatch(pattern, path):
            return match.expand(replacement)
    raise KeyError(path)


def params_from_upstream(arrays: Mapping[str, np.ndarray], cfg: ModelConfig) -> model.Params:
    """Our parameters from nanochat's, in the dtypes that the arrays have.

    Args:
        arrays: by torch name, matrices (out, in).
        cfg: the architecture that they belong to.

    Raises:
        UserError: a tensor is missing, is one too many, or has another shape than the architecture says.
    """
    expected = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg))
    left = dict(arrays)

    def take(path, like):
        dotted = ".".join(key.key for key in path)
        name = upstream_name(dotted)
        if name not in left:
            raise UserError(f"nanochat checkpoint: tensor {name!r} is missing; is it of another architecture?")
        array = left.pop(name) if _UNTRANSPOSED.search(dotted) else left.pop(name).T
        if array.shape != like.shape:
            raise UserError(f"nanochat checkpoint: {name!r} gives {array.shape}, the config asks for {like.shape}")
        return array

    params = jax.tree_util.tree_map_with_path(take, expected)
    if left:
        raise UserError(f"nanochat checkpoint: unknown tensor {sorted(left)[0]!r} ({len(left)} in all)")
    return params
