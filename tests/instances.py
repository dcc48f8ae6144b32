"""Small named instances whose answers can be checked by hand, and a planted one."""

from __future__ import annotations

from typing import Any

import numpy as np

from placer import Problem, Topology, Trace


def blocks_trace(num_blocks: int = 4, size: int = 4, tokens: int = 400, seed: int = 0) -> Trace:
    """Experts e with equal e % num_blocks are used together: one unit a token is possible, linear needs several."""
    rng = np.random.default_rng(seed)
    block = rng.integers(num_blocks, size=tokens)
    picks = np.argsort(rng.random((tokens, size)), axis=1)[:, : size - 1]
    ids = picks * num_blocks + block[:, None]
    other = np.argsort(rng.random((tokens, size)), axis=1)[:, : size - 1] * num_blocks + block[::-1, None]
    return Trace(
        topk_idx=np.stack([ids, other], axis=1).astype(np.int16),
        num_experts=num_blocks * size,
        sequence=np.arange(tokens) // 10,
        name="blocks",
    )


def noisy_trace(
    num_experts: int = 16, top_k: int = 4, tokens: int = 600, layers: int = 2, seed: int = 0
) -> Trace:
    """Skewed loads, soft clusters, some dropped choices; whole sequences of 20 tokens."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, top_k), np.int16)
    topic = rng.integers(4, size=tokens)
    for layer in range(layers):
        taste = rng.normal(size=(4, num_experts)) * 1.5 + rng.normal(size=num_experts) * 0.5
        score = taste[topic] + rng.gumbel(size=(tokens, num_experts))
        ids[:, layer] = np.argsort(-score, axis=1)[:, :top_k]
    ids[rng.random(ids.shape) < 0.02] = -1
    return Trace(topk_idx=ids, num_experts=num_experts, sequence=np.arange(tokens) // 20, name="noisy")


def problem(trace: Trace, shape: str, **options: Any) -> Problem:
    """A problem on H100 servers; no cap and no margin unless asked for."""
    options = {"max_load": None, "load_margin": 0.0, **options}
    return Problem.from_trace(trace, Topology.load("dgx-h100").with_shape(shape), **options)
