from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from jaxgpt.generation.decode import generate, positions, prefill, stops_of
from jaxgpt.generation.sampling import Sampling, sampling_params
from jaxgpt.generation.speculative import speculative_steps
from tests.tiny import LLAMA, PLAIN, random_params

LARGE = replace(LLAMA, D=24, T=64, V=50)
CONFIGS = {
    "learned": replace(LARGE, position="learned", norm="layernorm", mlp="gelu", bias=True),
    "windows": replace(LARGE, window=5, global_every=2),
}
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (5, 1, 12, 8)]


def like(params, share, seed=9):
    """Parameters that are nearly these: a model that often guesses right."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.float32(share * rng.standard_normal(x.shape)), params)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "noise", [0, 0.05, pytest.param(3, marks=pytest.mark.slow)]
)  # 3: the draft is nearly always wrong
def test_a_text_is_token_for_token_what_the_large_model_writes_alone(cfg, noise):
    gpt, new, ahead = cfg.build(PLAIN), 30, 3
    params = random_params(gpt, std=0.4)
    small_params = like(params, noise)
    rows = [
        Sampling(temperature=0),
        Sampling(temperature=1.3, top_k=20, seed=4),
        Sampling(temperature=0, repetition_penalty=1.4, presence_penalty=0.3),
        Sampling(temperature=0.8, top_p=0.7, frequency_penalty=0.2, seed=8),
    ]
    at, stops_BE = sampling_params(rows, 50, 128), stops_of([[7], [], [3, 4], [9]])
    prompts_BP = np.zeros((4, 12), np.int32)
    for row, prompt in enumerate(PROMPTS):
        prompts_BP[row, : len(prompt)] = prompt
    lengths_B = np.asarray([len(prompt) for prompt in PROMPTS], np.int32)
    alone = generate(gpt, params, prompts_BP, lengths_B, at, stops_BE, new)

    S = positions(12 + new, cfg) + ahead
    new_B = np.full(4, new, np.int32)
    begin = partial(prefill, gpt, prompts_BP=prompts_BP, lengths_B=lengths_B, new_B=new_B, S=S)
    state = begin(params, ahead=ahead + 1)
    cache = begin(small_params, ahead=ahead + 1).cache
    found, said, right = [], [], 0
    while (np.asarray(state.left_B) > 0).any():  # in calls of a few tokens, as texts are streamed
        state, cache, written, more = speculative_steps(
            gpt, params, gpt, small_params, state, cache, at, stops_BE, 8, ahead
        )
        found.append(np.asarray(written.tokens_Bn))
        said.append(np.asarray(written.logprobs_Bn))
        right += int(more)
    for row in range(4):
        tokens = np.concatenate([part[row][part[row] >= 0] for part in found])
        expected = np.asarray(alone.tokens_Bn[row])
        expected = expected[expected >= 0]
        assert tokens.tolist() == expected.tolist()
        logprobs = np.concatenate([p[row][t[row] >= 0] for p, t in zip(said, found, strict=True)])
        np.testing.assert_allclose(logprobs, alone.logprobs_Bn[row][: len(tokens)], atol=1e-4)
    written = int((np.asarray(alone.tokens_Bn) >= 0).sum())
    if noise == 0:
        assert right > 0.6 * written  # all but where a round or a text ends
    if noise == 3:
        assert right < 0.5 * written
