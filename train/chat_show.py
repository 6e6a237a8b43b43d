"""Look at conversations as the model sees them: token by token, what it learns to write on green.

    python -m train.chat_show --tokenizer runs/demo/tokenizer/tokenizer.model --mix task:arithmetic,chitchat --n 3

Sources: chitchat and chatterbot come with the installation; task:NAME is a task's training split; jsonl:GLOB holds
conversations of your own, one {"messages": […]} a line. SOURCE#N takes the first N, SOURCE*W takes each W times.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.chat import render, show
from nanochat_jax.data.conversations import open_mixture
from nanochat_jax.data.sft import SFTStats, pack_conversations
from train import cli


@dataclass(frozen=True)
class Config:
    tokenizer: Path = Path("runs/demo/tokenizer/tokenizer.model")
    """Tokenizer file."""
    mix: str = "task:spelling,task:counting,task:arithmetic,task:identity,task:refusals,chitchat,chatterbot"
    """Sources with commas between."""
    split: str = "train"
    """train, or val for what is held out."""
    n: int = 5
    """Conversations to print."""
    seed: int = 0
    """Of the order."""
    sequence_len: int = 512
    """Tokens the model sees at once: says how many conversations do not fit."""


def main(config: Config) -> SFTStats:
    """Print some conversations, and how all of them fit into rows."""
    tokenizer = tokenizers.load(config.tokenizer)
    mixture = open_mixture(config.mix, config.split, seed=config.seed)
    for conversation in mixture[: config.n]:
        print(show(render(conversation, tokenizer), tokenizer))
    stats = pack_conversations(mixture, tokenizer, config.sequence_len).stats
    print(
        f"{stats.conversations:,} conversations: {stats.shortened:,} shortened and {stats.dropped:,} dropped to fit "
        f"{config.sequence_len} tokens; {stats.tokens:,} tokens, {stats.supervised_tokens:,} of them supervised, in "
        f"{stats.rows:,} rows with {stats.padding_share:.1%} padding"
    )
    return stats


if __name__ == "__main__":
    cli.run(main, Config)
