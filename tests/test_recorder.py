"""What is recorded is what the routers of a model chose, in small random models of every family."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import placer
from placer.errors import InvalidInput

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")

VOCABULARY, PAD, END = 64, 0, 1

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": END,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}

#: Each family's sizes, and how its router scores, limits to groups and adds a bias: as its paper or code says.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": ({"num_local_experts": 8}, "softmax"),
    "Qwen2Moe": ({"num_experts": 8, "shared_expert_intermediate_size": 16}, "softmax"),
    "Qwen3Moe": ({"num_experts": 8, "mlp_only_layers": [1], "head_dim": 8}, "softmax"),
    "Olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, "softmax"),
    "DeepseekV2": (
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            **LATENT,
            **GROUPS,
        },
        "softmax, groups by their best",
    ),
    "DeepseekV3": ({"n_routed_experts": 8, **LATENT, **GROUPS}, "sigmoid + bias, groups by their best two"),
    "GptOss": ({"num_local_experts": 8, "head_dim": 8, "num_experts_per_tok": 4}, "linear with bias"),
    "Glm4Moe": ({"n_routed_experts": 8, **GROUPS}, "sigmoid + bias, groups by their best two"),
}
GROUPED = {"DeepseekV2", "DeepseekV3", "Glm4Moe"}
LAYERS = {"Qwen3Moe": (0, 2)} | dict.fromkeys(GROUPED, (1, 2))


def tiny(family: str, **changed: Any) -> Any:
    """A random model of a family, with routers far from ties."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZE | FAMILIES[family][0] | changed))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for router in routers(model).values():
            for key, tensor in router.state_dict().items():
                tensor.copy_(torch.randn_like(tensor) * (1 if key == "weight" else 0.2))
    return model


def routers(model: Any) -> dict[int, Any]:
    """The router of every MoE layer."""
    blocks: dict[int, Any] = {layer: part.mlp for layer, part in enumerate(model.model.layers)}
    return {
        layer: getattr(block, "router", None) or block.gate
        for layer, block in blocks.items()
        if hasattr(block, "experts")
    }


@contextmanager
def spied(model: Any) -> Iterator[list[dict[int, list[Any]]]]:
    """For each forward and layer: ids and weights that the router chooses, and the hidden states it chooses by."""
    seen: list[dict[int, list[Any]]] = []
    undo = [model.model.register_forward_pre_hook(lambda *_: seen.append({})).remove]
    for layer, router in routers(model).items():
        block = model.model.layers[layer].mlp

        def states(block: Any, args: tuple[Any, ...], layer: int = layer) -> None:
            seen[-1][layer] = [args[0].detach().numpy()]

        def choice(router: Any, args: tuple[Any, ...], output: tuple[Any, ...], layer: int = layer) -> None:
            weights, ids = output[1:]
            seen[-1][layer][:0] = [ids.numpy().copy(), weights.detach().numpy().copy()]

        undo.append(block.register_forward_pre_hook(states).remove)
        route = getattr(block, "route_tokens_to_experts", None)
        if route is None:
            undo.append(router.register_forward_hook(choice).remove)
        else:  # in early releases of transformers 5 some families chose outside of the router

            def outside(logits: Any, route: Any = route, choice: Any = choice) -> Any:
                output = route(logits)
                choice(None, (), (logits, *output[::-1]))
                return output

            block.route_tokens_to_experts = outside
            undo.append(partial(delattr, block, "route_tokens_to_experts"))
    try:
        yield seen
    finally:
        for each in undo:
            each()


def used(seen: list[dict[int, list[Any]]], what: int = 0) -> Any:
    """Ids (or weights) that routers returned, as a trace has them, padding included."""
    return np.concatenate([np.stack([step[layer][what] for layer in sorted(step)], axis=1) for step in seen])


def prompts(rows: int = 3, length: int = 7, seed: int = 0) -> Any:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def hooks_left(model: Any) -> list[str]:
    kinds = [
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ]
    kinds += ["_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks"]
    return [f"{path}.{kind}" for path, part in model.named_modules() for kind in kinds if getattr(part, kind)]


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return tiny("Mixtral")


# -- every family ----------------------------------------------------------------------------------------------


def plain_choice(family: str, router: Any, hidden: Any, top_k: int) -> Any:
    """The experts that a router should choose, ascending, by the plainest numpy."""
    scoring = FAMILIES[family][1]
    state = {key: tensor.numpy().astype(np.float64) for key, tensor in router.state_dict().items()}
    scores = hidden.astype(np.float64) @ state["weight"].T + state.get("bias", 0)
    if scoring.startswith("softmax"):
        scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    if scoring.startswith("sigmoid"):
        scores = 1 / (1 + np.exp(-scores)) + state["e_score_correction_bias"]
    if "groups" in scoring:
        best = np.sort(scores.reshape(len(scores), 4, 2), axis=2)[:, :, -2 if "two" in scoring else -1 :]
        kept = np.argsort(best.sum(axis=2), axis=1)[:, -2:]
        allowed = (np.arange(8) // 2 == kept[:, :, None]).any(axis=1)
        scores = np.where(allowed, scores, -np.inf)
    return np.sort(np.argsort(scores, axis=1)[:, -top_k:], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_recorded_are_those_that_the_routers_return(family: str) -> None:
    model = tiny(family)
    with spied(model) as seen, placer.record(model, weights=True) as recorder, torch.no_grad():
        model(prompts())
        model(prompts(2, 5, seed=1))
    trace = recorder.trace()
    assert (trace.topk_idx == used(seen)).all()
    assert (trace.topk_weights == used(seen, 1)).all()
    assert trace.sequence is not None
    assert trace.sequence.tolist() == np.repeat(range(5), [7, 7, 7, 5, 5]).tolist()
    assert trace.step is not None
    assert trace.step.tolist() == [0] * 21 + [1] * 10
    assert trace.layer_ids == LAYERS.get(family, (0, 1, 2))
    assert (trace.num_experts, trace.top_k) == (8, model.config.num_experts_per_tok)
    assert (trace.num_groups, trace.topk_groups) == ((4, 2) if family in GROUPED else (1, 1))
    assert (trace.model, trace.phase) == (model.config.model_type, "prefill")
    assert hooks_left(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_recorded_are_those_of_the_published_rule(family: str) -> None:
    model = tiny(family)
    with spied(model) as seen, placer.record(model) as recorder, torch.no_grad():
        model(prompts(8, 8))
    recorded = np.sort(recorder.trace().topk_idx, axis=2)
    top_k = model.config.num_experts_per_tok
    simple = []
    for place, (layer, router) in enumerate(routers(model).items()):
        hidden = seen[0][layer][2].reshape(64, -1)
        assert (recorded[:, place] == plain_choice(family, router, hidden, top_k)).all()
        simple.append(
            np.sort(np.argsort(hidden @ router.weight.detach().numpy().T, axis=1)[:, -top_k:], axis=1)
        )
    assert len(np.unique(recorded)) == 8
    # Groups and biases matter in this example.
    assert (family in {*GROUPED, "GptOss"}) == (recorded != np.stack(simple, axis=1)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_with_its_sequences(family: str) -> None:
    model = tiny(family)
    with spied(model) as seen, placer.record(model) as recorder:
        model.generate(
            prompts(), attention_mask=torch.ones(3, 7), max_new_tokens=4, min_new_tokens=4, do_sample=True
        )
    trace = recorder.trace()
    assert trace.num_tokens == 3 * 7 + 3 * 3  # the last token is never fed
    assert (trace.topk_idx == used(seen)).all()
    assert trace.sequence is not None
    assert trace.sequence.tolist() == [*np.repeat(range(3), 7), *[0, 1, 2] * 3]
    assert trace.phase is None


def test_a_greedy_deepseek_v2_has_no_groups() -> None:
    model = tiny("DeepseekV2", topk_method="greedy", n_group=None, topk_group=None)
    with placer.record(model) as recorder:
        model(prompts())
    assert (recorder.trace().num_groups, recorder.trace().topk_groups) == (1, 1)


def test_the_model_is_called_as_where_it_was_loaded_from(mixtral: Any) -> None:
    mixtral.config._name_or_path = "mistralai/Mixtral-8x7B-v0.1"
    with placer.record(mixtral) as recorder:
        mixtral(prompts())
    mixtral.config._name_or_path = ""
    assert recorder.trace().model == "Mixtral-8x7B-v0.1"


def test_more_than_256_experts_need_and_get_wider_ids() -> None:
    model = tiny("Mixtral", num_local_experts=300)
    with spied(model) as seen, placer.record(model) as recorder:
        model(prompts(4, 64))
    ids = recorder.trace().topk_idx
    assert (ids == used(seen)).all()
    assert ids.max() > 255


# -- padding ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    mask=arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.integers(0, 1))
)
def test_exactly_the_tokens_that_are_masked_are_left_out(mixtral: Any, mask: Any) -> None:
    mask[0, 0] = 1
    with spied(mixtral) as seen, placer.record(mixtral) as recorder, torch.no_grad():
        mixtral(prompts(*mask.shape), attention_mask=torch.tensor(mask))
    trace = recorder.trace()
    assert (trace.topk_idx == used(seen)[mask.reshape(-1) == 1]).all()
    assert trace.sequence is not None
    assert trace.sequence.tolist() == np.nonzero(mask)[0].tolist()
    assert recorder.num_tokens == trace.num_tokens == mask.sum()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])  # GptOss: a mask for each kind of layer
def test_generation_leaves_out_padding_on_the_left(family: str, cache: str) -> None:
    model = tiny(family)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    mask[2, :1] = 0
    given = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with spied(model) as seen, placer.record(model) as recorder:
        model.generate(prompts(), cache_implementation=cache, **given)
    trace = recorder.trace()
    real = np.append(mask.numpy().reshape(-1), np.ones(9, int)) == 1
    assert (trace.topk_idx == used(seen)[real]).all()
    assert trace.sequence is not None
    assert np.bincount(trace.sequence).tolist() == [7, 10, 9]


def test_tokens_may_be_given_by_position_or_as_vectors(mixtral: Any) -> None:
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0
    vectors = mixtral.model.embed_tokens(prompts())
    with placer.record(mixtral) as recorder:
        mixtral(prompts(), mask)
        mixtral(inputs_embeds=vectors, attention_mask=mask)
        mixtral.model(prompts(), mask)
    ids = recorder.trace().topk_idx
    assert len(ids) == 3 * 18
    assert (ids[:18] == ids[18:36]).all()
    assert (ids[:18] == ids[36:]).all()


def test_rows_that_have_ended_are_left_out(mixtral: Any) -> None:
    def end_row_1_early(tokens: Any, scores: Any) -> Any:
        scores[:, [PAD, END]] = -np.inf
        if tokens.shape[1] >= 8:
            scores[1] = -np.inf
            scores[1, END] = 0
        return scores

    with placer.record(mixtral) as recorder:
        text = mixtral.generate(
            prompts(), attention_mask=torch.ones(3, 7), max_new_tokens=6, logits_processor=[end_row_1_early]
        )
    assert text[1, 8:].tolist() == [END, PAD, PAD, PAD, PAD]
    sequence = recorder.trace().sequence
    assert sequence is not None
    assert np.bincount(sequence).tolist() == [12, 9, 12]  # the end token of row 1 is the last one kept


def test_pad_tokens_that_no_end_precedes_are_text(mixtral: Any) -> None:
    feed = [[END, END], [PAD, 5], [5, PAD], [PAD, PAD]]  # the second row is fed on after its end
    with placer.record(mixtral) as recorder, torch.no_grad():
        cache = mixtral(torch.tensor([[5, END, PAD], [5, PAD, END]]), use_cache=True).past_key_values
        mixtral(torch.tensor([[PAD], [PAD]]), past_key_values=cache)
        for pair in feed:
            mixtral(torch.tensor(pair)[:, None], past_key_values=cache)
        mixtral(torch.tensor([[PAD, 6], [PAD, 6]]), past_key_values=cache)  # another turn
        mixtral(torch.tensor([[PAD], [PAD]]), past_key_values=cache)
    trace = recorder.trace()
    assert trace.sequence is not None
    assert trace.step is not None
    kept = [trace.sequence[trace.step == step].tolist() for step in range(8)]
    assert kept == [[0, 0, 0, 1, 1, 1], [0, 1], [0, 1], [1], [0], [], [0, 0, 1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(3, 5),
            r"attention_mask: found shape \(3, 5\), expected 3 rows of 0 tokens before and 7 now",
        ),
        (torch.ones(2, 7), r"attention_mask: found shape \(2, 7\), expected 3 rows"),
        (torch.ones(3, 1, 7, 4, dtype=torch.bool), "found shape"),
        (torch.ones(7), "expected a tensor of 2 or 4 dimensions"),
        ({"sliding_attention": torch.ones(3, 7)}, "found dict"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_the_model_runs(
    mixtral: Any, mask: Any, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message), placer.record(mixtral):
        mixtral.model(prompts(), attention_mask=mask)
    assert hooks_left(mixtral) == []


# -- sequences -------------------------------------------------------------------------------------------------


def test_two_loops_with_a_cache_each_keep_their_sequences_apart(mixtral: Any) -> None:
    first, second = prompts(2, 3), prompts(1, 4, seed=1)
    with placer.record(mixtral) as recorder, torch.no_grad():
        a = mixtral(first, use_cache=True).past_key_values  # made by the model
        b = transformers.DynamicCache(config=mixtral.config)
        mixtral.model(second, past_key_values=b, return_dict=False)
        for _ in range(2):
            mixtral(first[:, :1], past_key_values=a)
            mixtral(second[:, :2], past_key_values=b)
    sequence = recorder.trace().sequence
    assert sequence is not None
    assert sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2] + [0, 1, 2, 2] * 2


def test_a_cache_filled_before_begins_new_sequences_that_go_on(mixtral: Any) -> None:
    cache = mixtral(prompts(2, 3), use_cache=True).past_key_values
    with placer.record(mixtral) as recorder, torch.no_grad():
        mixtral(prompts(2, 3))
        mixtral(prompts(2, 1), past_key_values=cache)
        mixtral(prompts(2, 1), past_key_values=cache)
    sequence = recorder.trace().sequence
    assert sequence is not None
    assert sequence.tolist() == [0] * 3 + [1] * 3 + [2, 3] * 2


def test_a_cache_of_other_rows_begins_new_sequences(mixtral: Any) -> None:
    with placer.record(mixtral) as recorder, torch.no_grad():
        cache = mixtral(prompts(2, 3), use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        mixtral(prompts(4, 1), past_key_values=cache)
    sequence = recorder.trace().sequence
    assert sequence is not None
    assert sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5]


def test_decoding_alone_is_told(mixtral: Any) -> None:
    cache = mixtral(prompts(2, 3), use_cache=True).past_key_values
    with placer.record(mixtral) as recorder:
        mixtral(prompts(2, 1), past_key_values=cache)
    assert recorder.trace().phase == "decode"


# -- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, False, True, "whole"])
def test_training_is_recorded_once(checkpointing: Any) -> None:
    model = tiny("Mixtral").train()
    if checkpointing in (False, True):
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": checkpointing})
    runs: list[int] = []
    model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda *_: runs.append(1))

    def loss(tokens: Any) -> Any:
        return model(tokens, labels=tokens, use_cache=False).loss

    with spied(model) as seen, placer.record(model) as recorder:
        for _ in range(2):
            if checkpointing == "whole":
                torch.utils.checkpoint.checkpoint(loss, prompts(), use_reentrant=False).backward()
            else:
                loss(prompts()).backward()
    trace = recorder.trace()
    assert len(runs) == (2 if checkpointing is None else 4)  # it did compute again
    assert trace.num_tokens == 2 * 21
    assert (trace.topk_idx[:21] == used(seen[:1])).all()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_recording_changes_no_number() -> None:
    model = tiny("DeepseekV3")
    with torch.no_grad():
        plain = model(prompts()).logits
        with placer.record(model, weights=True):
            recorded = model(prompts()).logits
    assert torch.equal(plain, recorded)


# -- beginning and end -----------------------------------------------------------------------------------------


def test_an_error_in_the_block_removes_the_hooks_and_keeps_the_record(mixtral: Any) -> None:
    recorders = []

    def block() -> None:
        with placer.record(mixtral) as recorder:
            recorders.append(recorder)
            mixtral(prompts())
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    assert hooks_left(mixtral) == []
    assert recorders[0].trace().num_tokens == 21
    mixtral(prompts())
    assert recorders[0].num_tokens == 21


def test_a_forward_that_fails_is_left_out_whole(mixtral: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    with placer.record(mixtral) as recorder:
        mixtral(prompts())
        handle = mixtral.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half-way"):
            mixtral(prompts())
        handle.remove()
        mixtral.model.layers[0].mlp(torch.randn(1, 4, 32))  # is no part of the forward that failed
        mixtral(prompts(seed=1))
    trace = recorder.trace()
    assert trace.num_tokens == 42
    assert trace.step is not None
    assert trace.step.max() == 1
    assert hooks_left(mixtral) == []


def test_recordings_inside_each_other_see_their_own_part(mixtral: Any) -> None:
    with placer.record(mixtral) as outer:
        mixtral(prompts())
        with placer.record(mixtral, weights=True, max_tokens=5) as inner:
            mixtral(prompts(seed=1))
        mixtral(prompts(seed=2))
    assert outer.num_tokens == 63
    assert (inner.trace().topk_idx == outer.trace().topk_idx[21:26]).all()
    assert hooks_left(mixtral) == []


def test_recordings_that_overlap_end_in_any_order(mixtral: Any) -> None:
    first, second = placer.record(mixtral), placer.record(mixtral)
    a = first.__enter__()
    b = second.__enter__()
    mixtral(prompts())
    first.__exit__(None, None, None)
    mixtral(prompts())
    second.__exit__(None, None, None)
    assert (a.num_tokens, b.num_tokens) == (21, 42)
    assert hooks_left(mixtral) == []


def test_a_trace_asked_for_in_the_block_does_not_stop_the_recording(mixtral: Any) -> None:
    with placer.record(mixtral) as recorder:
        mixtral(prompts())
        early = recorder.trace()
        mixtral(prompts())
    assert (early.num_tokens, recorder.trace().num_tokens) == (21, 42)


@pytest.mark.parametrize("limit", [1, 21, 30])
def test_no_more_than_max_tokens_are_kept(mixtral: Any, limit: int) -> None:
    with placer.record(mixtral) as whole, placer.record(mixtral, weights=True, max_tokens=limit) as recorder:
        for seed in range(4):
            mixtral(prompts(seed=seed))
    trace = recorder.trace()
    assert trace.num_tokens == recorder.num_tokens == limit
    assert (trace.topk_idx == whole.trace().topk_idx[:limit]).all()
    held = sum(part.nbytes for parts in recorder._parts.values() for part in parts)
    assert held == limit * (3 * 2 * (1 + 4) + 4 + 4)  # ids, weights; sequence, step
    assert not recorder._copies


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "9"])
def test_a_limit_that_is_no_count_is_refused(mixtral: Any, limit: Any) -> None:
    with pytest.raises(InvalidInput, match=r"max_tokens: found .*, expected a whole number from 1"):
        placer.record(mixtral, max_tokens=limit).__enter__()


def test_a_block_without_tokens_is_told(mixtral: Any) -> None:
    with placer.record(mixtral) as recorder:
        pass
    with pytest.raises(
        InvalidInput, match="recorder: found no token, expected the model to run inside the block"
    ):
        recorder.trace()


# -- models ----------------------------------------------------------------------------------------------------


def test_a_model_in_a_wrapper_is_found(mixtral: Any) -> None:
    wrapped = torch.nn.ModuleDict({"student": mixtral})
    with placer.record(wrapped) as a, placer.record(mixtral.model) as b:
        mixtral(prompts())
    assert (a.trace().topk_idx == b.trace().topk_idx).all()
    assert a.trace().layer_ids == b.trace().layer_ids == (0, 1, 2)


def test_a_model_without_experts_is_refused_naming_those_that_have_them() -> None:
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZE | {"head_dim": 8})))
    with pytest.raises(
        InvalidInput, match=r"found no experts in LlamaForCausalLM, expected .*Mixtral.*GLM-4-MoE"
    ):
        placer.record(dense).__enter__()
    with pytest.raises(InvalidInput, match=r"model: found dict, expected a torch\.nn\.Module"):
        placer.record({}).__enter__()


def test_two_models_in_one_are_refused(mixtral: Any) -> None:
    pair = torch.nn.ModuleDict({"a": mixtral, "b": tiny("Olmoe")})
    with pytest.raises(InvalidInput, match=r"found stacks a\.model and b\.model, expected one"):
        placer.record(pair).__enter__()


def test_compiled_models_are_refused(mixtral: Any) -> None:
    with pytest.raises(InvalidInput, match=r"found OptimizedModule compiled by torch\.compile, expected no"):
        placer.record(torch.compile(mixtral, backend="eager")).__enter__()
    model = tiny("Mixtral")
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(InvalidInput, match=r"found model\.layers\.1 compiled by torch\.compile, expected no"):
        placer.record(model).__enter__()


HIDDEN, WEIGHTS, IDS = torch.zeros(21, 32), torch.zeros(21, 2), torch.zeros(21, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (HIDDEN,),
            r"layer 1: MixtralExperts is called with \(Tensor\), expected hidden states, ids and weights",
        ),
        ((HIDDEN, IDS, None), r"is called with \(Tensor, Tensor, NoneType\), expected"),
        (
            (HIDDEN, WEIGHTS, IDS),
            r"with ids torch\.float32 \(21, 2\) and weights \(21, 2\), expected integers",
        ),
        ((HIDDEN, IDS, HIDDEN), r"with ids torch\.int64 \(21, 2\) and weights \(21, 32\)"),
        ((HIDDEN, IDS[:4], WEIGHTS[:4]), "got 4 tokens, expected a batch of 3 x 7"),
        ((HIDDEN, IDS[:, :1], WEIGHTS[:, :1]), "with 1 experts a token, expected 2 as before"),
    ],
)
def test_experts_that_are_called_otherwise_are_refused(given: Any, message: str) -> None:
    model = tiny("Mixtral")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: block.experts(*given).sum() + hidden
    with pytest.raises(InvalidInput, match=message), placer.record(model):
        model(prompts())
    assert hooks_left(model) == []


def test_ids_are_recorded_before_expert_parallelism_renumbers_them() -> None:
    model = tiny("Mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: (args[0], args[1] % 4, args[2]))
    with spied(model) as seen, placer.record(model) as recorder, torch.no_grad():
        model(prompts())
    assert (recorder.trace().topk_idx == used(seen)).all()


def test_a_layer_whose_experts_are_not_called_is_told() -> None:
    model = tiny("Mixtral")
    model.model.layers[2].mlp.forward = lambda hidden: hidden  # as a fused kernel does
    with pytest.raises(InvalidInput, match="layer 2: its experts were not called"), placer.record(model):
        model(prompts())


def test_experts_that_run_twice_are_told() -> None:
    model = tiny("Mixtral")
    model.model.layers[2].mlp.experts = model.model.layers[1].mlp.experts
    with pytest.raises(InvalidInput, match="layer 1: MixtralExperts ran twice"), placer.record(model):
        model(prompts())


def test_experts_that_the_config_does_not_know_are_told() -> None:
    model = tiny("Mixtral")
    model.config.num_local_experts = 2
    message = r"step 0: found experts 0 to 7, expected 0 to 1 as the config says"
    with pytest.raises(InvalidInput, match=message), placer.record(model):
        model(prompts())
    assert hooks_left(model) == []


def test_a_config_that_knows_no_experts_is_told() -> None:
    stack = torch.nn.Module()
    stack.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})])
    with pytest.raises(
        InvalidInput, match="config of Module: found none of n_routed_experts, num_local_experts"
    ):
        placer.record(stack).__enter__()


def test_calls_of_parts_of_the_model_are_not_recorded(mixtral: Any) -> None:
    with placer.record(mixtral) as recorder:
        mixtral.model.layers[0].mlp(torch.randn(1, 4, 32))
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            mixtral()
    assert recorder.num_tokens == 0


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import placer\n"
        "try: placer.record(object()).__enter__()\n"
        "except placer.PlacerError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "torch: found none, expected it to record a model: pip install 'placer[torch]'\n"


def test_the_recorder_itself_loads_no_torch() -> None:
    code = "import sys, placer; placer.record; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
