"""Synthetic traces with planted co-activation, at sizes for which no recorded routing is public.

A latent router: documents and tokens have vectors, experts have vectors, and a token goes to the experts it
agrees with most, up to noise. That makes experts co-activate the way trained routers do (some pairs often,
most seldom), the same way on unseen documents, but it stays a model: say "synthetic" beside any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput
from placer.files import nearest
from placer.trace import Trace

Floats = NDArray[np.float32]

_DIMENSIONS = 16  # of the latent space
_TOPICS, _TOPIC_ZIPF = 24, 0.7
_TYPES, _TYPE_ZIPF = 3000, 0.9
_NOISE = 0.7  # scale of the Gumbel noise on a logit
_CHUNK = 1 << 21  # logits held at once


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shape of a router and the strength of what is planted in it.

    Parameters
    ----------
    model
        Name of the model whose shape this is; it selects hidden size and expert bytes.
    num_experts, top_k
        Experts of a layer, and how many a token uses.
    layers, first_layer
        MoE layers of the model, and the index in it of the first.
    num_groups, topk_groups
        Group-limited gating: a token uses only its best `topk_groups` groups of consecutive experts.
    affinity
        Weight of the latent product in a logit: how strongly experts co-activate.
    skew
        Zipf exponent of the experts' popularity.
    """

    model: str
    num_experts: int
    top_k: int
    layers: int
    first_layer: int = 0
    num_groups: int = 1
    topk_groups: int = 1
    affinity: float = 2.0
    skew: float = 0.25


#: Shapes: arXiv:2409.02060 (OLMoE), arXiv:2505.09388 (Qwen3), arXiv:2412.19437 (DeepSeek-V3).
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "olmoe-like": Preset(model="olmoe-1b-7b", num_experts=64, top_k=8, layers=16),
        "qwen3-like": Preset(model="qwen3-235b-a22b", num_experts=128, top_k=8, layers=94),
        "dsv3-like": Preset(
            model="deepseek-v3",
            num_experts=256,
            top_k=8,
            layers=58,
            first_layer=3,
            num_groups=8,
            topk_groups=4,
            skew=0.1,
        ),
    }
)


def synth(
    name: str, *, layers: int | None = None, tokens: int = 20_000, seed: int = 0, sequence_length: int = 200
) -> Trace:
    """A synthetic trace in the shape of a known model.

    Documents and token types are shared by all layers; experts are drawn anew for each, and the first layers
    of a trace do not depend on how many there are.

    Parameters
    ----------
    name
        A key of `PRESETS`.
    layers
        MoE layers; all of the model's by default.
    tokens
        Tokens in all.
    seed
        Same seed, same trace.
    sequence_length
        Tokens of a document; the last one takes what remains. Documents are the sequences 0, 1, 2, ...

    Returns
    -------
    Trace
        Ids in the smallest dtype that holds them, best expert first.

    Raises
    ------
    InvalidInput
        For an unknown name or a count below 1.

    Examples
    --------
    >>> trace = synth("dsv3-like", layers=2, tokens=500)
    >>> trace.topk_idx.shape, trace.layer_ids, int(trace.sequence[-1])
    ((500, 2, 8), (3, 4), 2)
    """
    if name not in PRESETS:
        raise InvalidInput(f"synth: unknown name {name!r}; {nearest(name, PRESETS)}")
    preset = PRESETS[name]
    layers = preset.layers if layers is None else layers
    for key, value in (("layers", layers), ("tokens", tokens), ("sequence_length", sequence_length)):
        if value < 1:
            raise InvalidInput(f"synth: found {key} {value}, expected at least 1")
    if seed < 0:
        raise InvalidInput(f"synth: found seed {seed}, expected 0 or more")
    rng = np.random.default_rng(seed)
    sequence = np.arange(tokens, dtype=np.int32) // np.int32(min(sequence_length, tokens))
    latent = _latent(sequence, rng)
    ids = np.empty((tokens, layers, preset.top_k), dtype=np.uint8 if preset.num_experts <= 256 else np.uint16)
    for layer, layer_rng in enumerate(rng.spawn(layers)):
        _route(latent, preset, layer_rng, out=ids[:, layer])
    return Trace(
        topk_idx=ids,
        num_experts=preset.num_experts,
        sequence=sequence,
        model=preset.model,
        num_groups=preset.num_groups,
        topk_groups=preset.topk_groups,
        layer_ids=tuple(range(preset.first_layer, preset.first_layer + layers)),
        source=f"synthetic: placer synth {name} --layers {layers} --tokens {tokens} --seed {seed}"
        + (f" --sequence-length {sequence_length}" if sequence_length != 200 else ""),
        license="MIT",
        name=name,
    )


def _latent(sequence: NDArray[Any], rng: np.random.Generator) -> Floats:
    """``(num_tokens, dimensions)``: the mixed topics of a token's document plus its type."""
    topics = rng.standard_normal((_TOPICS, _DIMENSIONS), dtype=np.float32)
    types = rng.standard_normal((_TYPES, _DIMENSIONS), dtype=np.float32)
    documents = int(sequence[-1]) + 1
    pair = rng.choice(_TOPICS, size=(documents, 2), p=_zipf(_TOPICS, _TOPIC_ZIPF))
    share = rng.random(documents, dtype=np.float32)
    mixed = share[:, None] * topics[pair[:, 0]] + (1 - share[:, None]) * topics[pair[:, 1]]
    tokens = len(sequence)
    kind = rng.choice(_TYPES, size=tokens, p=_zipf(_TYPES, _TYPE_ZIPF))
    # Half of the tokens come from the vocabulary of a topic of their document: the common one, rotated.
    topic = np.where(rng.random(tokens) < share[sequence], pair[sequence, 0], pair[sequence, 1])
    kind = np.where(rng.random(tokens) < 0.5, (kind + topic * (_TYPES // _TOPICS)) % _TYPES, kind)
    latent: Floats = (mixed[sequence] + types[kind]) / np.float32(np.sqrt(2 * _DIMENSIONS))
    return latent


def _route(latent: Floats, preset: Preset, rng: np.random.Generator, out: NDArray[Any]) -> None:
    """Choose the experts of one layer for every token, best first."""
    num_experts, top_k = preset.num_experts, preset.top_k
    experts = rng.standard_normal((_DIMENSIONS, num_experts), dtype=np.float32) * np.float32(preset.affinity)
    popularity = np.log(_zipf(num_experts, preset.skew))[rng.permutation(num_experts)].astype(np.float32)
    step = max(1, _CHUNK // num_experts)
    for start in range(0, len(latent), step):
        part = latent[start : start + step]
        # The logarithm of an exponential variate is a Gumbel variate with its sign turned.
        noise = rng.standard_exponential((len(part), num_experts), dtype=np.float32)
        np.maximum(noise, np.float32(1e-30), out=noise)
        np.log(noise, out=noise)
        noise *= np.float32(-_NOISE)
        logits = part @ experts
        logits += popularity
        logits += noise
        if preset.num_groups > 1:
            _mask_groups(logits, preset)
        best = np.argpartition(logits, -top_k, axis=1)[:, -top_k:]
        order = np.argsort(-np.take_along_axis(logits, best, axis=1), axis=1)
        out[start : start + step] = np.take_along_axis(best, order, axis=1)


def _mask_groups(logits: Floats, preset: Preset) -> None:
    """Set the logits outside each token's best groups to -inf; a group counts its two best logits."""
    grouped = logits.reshape(len(logits), preset.num_groups, -1)
    first = grouped.argmax(axis=2)[:, :, None]
    best = np.take_along_axis(grouped, first, axis=2)
    np.put_along_axis(grouped, first, -np.inf, axis=2)
    score = best[:, :, 0] + grouped.max(axis=2)
    np.put_along_axis(grouped, first, best, axis=2)
    worst = np.argpartition(score, preset.num_groups - preset.topk_groups, axis=1)
    worst = worst[:, : preset.num_groups - preset.topk_groups]
    grouped[np.arange(len(logits))[:, None], worst] = -np.inf


def _zipf(count: int, exponent: float) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    weights /= weights.sum()
    return weights
