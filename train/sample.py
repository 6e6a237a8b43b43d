"""Let a trained model continue a prompt.

    python -m train.sample --checkpoint runs/demo/base --prompt "My fellow citizens"

The same seed gives the same text.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat_jax import hosts, sharding
from nanochat_jax.errors import UserError
from nanochat_jax.generate import continue_texts
from nanochat_jax.load import load_model
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import MeshConfig
from train import cli


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of a training run."""
    prompt: tuple[str, ...] = ("The",)
    """Text to continue; several are continued together."""
    max_new_tokens: int = 128
    """Tokens to write at most, within the model's context."""
    n: int = 1
    """Samples of each prompt, with seeds counting up."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_k=50))
    step: int | None = None
    """Checkpoint to use; default: the newest good one."""

    mesh: MeshConfig = field(default_factory=MeshConfig)


def main(config: Config) -> list[str]:
    """Print and return the samples, prompt included."""
    hosts.agree(config=config)
    loaded = load_model(config.checkpoint, step=config.step, mesh=sharding.make_mesh(config.mesh))
    if config.n < 1:
        raise UserError(f"n={config.n} must be at least 1")
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
    seeds = [config.sampling.seed + i for _ in config.prompt for i in range(config.n)]
    texts = continue_texts(
        loaded.params,
        loaded.cfg,
        loaded.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        sampling=[replace(config.sampling, seed=seed) for seed in seeds],
        compute=loaded.compute,
    )
    samples = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    for sample in samples:
        print(f"{sample}\n")
    return samples


if __name__ == "__main__":
    cli.run(main, Config)
