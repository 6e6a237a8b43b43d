import jax
import numpy as np
import pytest
from test_engine import CFG, COMPUTE, random_params

from nanochat_jax import model
from nanochat_jax.errors import UserError
from nanochat_jax.probabilities import next_token_table


@pytest.fixture(scope="module")
def params():
    return random_params(CFG)


@pytest.mark.parametrize("length", [1, 64, 65, 192])
def test_the_table_is_the_models_distribution(params, length):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, length).tolist()
    tokens_1T = np.array([tokens + [0] * (192 - length)], np.int32)
    expected_TV = np.asarray(jax.nn.softmax(model.forward(params, CFG, tokens_1T, compute=COMPUTE)))[0, :length]
    table = next_token_table(params, CFG, tokens, k=4, compute=COMPUTE)
    np.testing.assert_array_equal(table.tokens_TK, np.argsort(-expected_TV, axis=-1)[:, :4])
    np.testing.assert_allclose(table.probabilities_TK, -np.sort(-expected_TV, axis=-1)[:, :4], atol=1e-5)
    np.testing.assert_allclose(table.actual_T[:-1], expected_TV[range(length - 1), tokens[1:]], atol=1e-5)
    assert np.isnan(table.actual_T[-1])


@pytest.mark.parametrize(
    ("tokens", "k", "message"), [([], 1, "0 tokens"), ([1] * 193, 1, "193"), ([1, 97], 1, "97"), ([1], 0, "k=0")]
)
def test_impossible_tables_are_refused(params, tokens, k, message):
    with pytest.raises(UserError, match=message):
        next_token_table(params, CFG, tokens, k, compute=COMPUTE)
