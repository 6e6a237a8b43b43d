"""Let a trained model continue a prompt.

python -m train.sample --checkpoint runs/demo/base --prompt "My fellow citizens"
"""

from dataclasses import dataclass, field
from pathlib import Path

from nanochat_jax.generate import Sampling, generate
from nanochat_jax.load import load_model
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


def main(config: Config) -> list[str]:
    """Print and return the samples, prompt included."""
    loaded = load_model(config.checkpoint, step=config.step)
    tok = loaded.tokenizer
    prompts = [prompt for prompt in config.prompt for _ in range(config.n)]
    rows = [[tok.bos, *tok.encode(prompt)] for prompt in prompts]
    how = config.sampling
    seeds = [how.seed + i for _ in config.prompt for i in range(config.n)]
    new = generate(
        loaded.params,
        loaded.cfg,
        rows,
        max_new_tokens=config.max_new_tokens,
        sampling=[Sampling(how.temperature, how.top_k, how.top_p, how.min_p, seed) for seed in seeds],
        stop_tokens=tuple(tok.control.values()),
        compute=loaded.compute,
    )
    samples = [prompt + tok.decode(tokens) for prompt, tokens in zip(prompts, new, strict=True)]
    for sample in samples:
        print(f"{sample}\n")
    return samples


if __name__ == "__main__":
    cli.run(main, Config)
