"""Makes tests/fixtures/gpt2.npz: random weights of transformers' GPT2LMHeadModel and what it computes with them.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/make_gpt2_fixture.py

Nothing else needs torch: the stored numbers are what test_gpt2.py compares with.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

CONFIG = {
    "n_positions": 48,
    "vocab_size": 100,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}


def main() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the initialiser leaves biases at 0 and norms at 1, which hides mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
        tokens_BT = torch.randint(CONFIG["vocab_size"], (2, CONFIG["n_positions"]))
        output = model(tokens_BT, labels=tokens_BT)
        greedy_T = model.generate(
            tokens_BT[:1, :8], attention_mask=torch.ones(1, 8), do_sample=False, max_new_tokens=24, pad_token_id=0
        )[0]
    weights = {
        f"weights/{name}": array.numpy() for name, array in model.state_dict().items() if name != "lm_head.weight"
    }
    path = Path(__file__).parent / "fixtures" / "gpt2.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        config=json.dumps(CONFIG),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        tokens_BT=tokens_BT.numpy().astype(np.int32),
        logits=output.logits.numpy(),
        loss=output.loss.numpy(),
        greedy_T=greedy_T.numpy().astype(np.int32),
        **weights,
    )
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
