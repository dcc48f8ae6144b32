from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InvalidInput
from placer.model import ASSUMED, Model, known

# An independent table of the same models: expert size in MB (BF16, FP8), routed parameters in 1e9, and MB on
# the wire for one token through all layers (naive dispatch and combine, BF16).
TABLE = {
    "deepseek-v3": (88.1, 44.0, 653.9, 13.30),
    "deepseek-v2": (47.2, 23.6, 222.7, 7.25),
    "kimi-k2": (88.1, 44.0, 1014.7, 13.76),
    "qwen3-235b-a22b": (37.7, 18.9, 227.1, 12.32),
    "qwen3-30b-a3b": (9.4, 4.7, 29.0, 3.15),
    "mixtral-8x7b": (352.3, 176.2, 45.1, 1.05),
    "mixtral-8x22b": (604.0, 302.0, 135.3, 2.75),
    "olmoe-1b-7b": (12.6, 6.3, 6.4, 1.05),
    "gpt-oss-120b": (49.8, 24.9, 114.7, 1.66),
    "gpt-oss-20b": (49.8, 24.9, 19.1, 1.11),
    "glm-4.5": (47.2, 23.6, 336.0, 14.58),
    "glm-4.5-air": (34.6, 17.3, 99.7, 5.90),
    "llama-4-scout": (251.7, 125.8, 96.6, 0.98),
    "llama-4-maverick": (251.7, 125.8, 386.5, 0.49),
    "dbrx": (396.4, 198.2, 126.8, 3.93),
    "grok-1": (1208, 604, 309.2, 3.15),
    "minimax-text-01": (339.7, 169.9, 434.9, 3.93),
    "minimax-m2": (28.3, 14.2, 224.7, 6.09),
}


def test_the_table_and_our_own_model_are_all_that_is_known() -> None:
    assert known() == sorted([*TABLE, "tinymoe"])


@pytest.mark.parametrize("name", sorted(TABLE))
def test_sizes_agree_with_the_published_table(name: str) -> None:
    model = Model.named(name)
    bf16, fp8, routed, wire = TABLE[name]
    assert model.top_k is not None
    assert model.num_moe_layers is not None
    assert model.expert_bytes("bf16") == pytest.approx(bf16 * 1e6, abs=0.5e6 if bf16 > 1000 else 0.051e6)
    assert model.expert_bytes("fp8") == pytest.approx(fp8 * 1e6, abs=0.5e6 if bf16 > 1000 else 0.051e6)
    assert model.routed_parameters == pytest.approx(routed * 1e9, abs=0.051e9)
    vectors = model.top_k * model.num_moe_layers
    assert vectors * (model.dispatch_bytes + model.combine_bytes) == pytest.approx(wire * 1e6, abs=0.0051e6)


@pytest.mark.parametrize("name", [*sorted(TABLE), "tinymoe"])
def test_the_routed_experts_fit_into_the_model_and_make_up_most_of_it(name: str) -> None:
    model = Model.named(name)
    assert model.total_parameters is not None
    assert model.routed_parameters is not None
    assert 0.8 * model.total_parameters <= model.routed_parameters <= model.total_parameters
    assert model.num_layers is not None
    assert model.num_moe_layers is not None
    assert model.num_moe_layers <= model.num_layers
    assert model.source


def test_only_the_deepseek_models_limit_the_groups() -> None:
    limits = {name: (Model.named(name).num_groups, Model.named(name).topk_groups) for name in known()}
    assert {name: pair for name, pair in limits.items() if pair != (1, 1)} == {
        "deepseek-v3": (8, 4),
        "deepseek-v2": (8, 3),
    }


def test_bytes_of_deepseek_v3_by_dtype() -> None:
    model = Model.named("deepseek-v3")
    assert model.expert_bytes() == model.expert_bytes("fp8") == 3 * 7168 * 2048
    assert model.expert_bytes("fp4") == 3 * 7168 * 2048 * 4.25 / 8  # MXFP4 with its scales
    assert model.shared_bytes() == 3 * 7168 * 2048
    assert model.dispatch_bytes == model.combine_bytes == 14336
    assert model.flops_per_token_expert == 6 * 7168 * 2048


# Sizes of the published MXFP4 checkpoints, GiB (arXiv:2508.10925, table 1); all but the experts is BF16.
@pytest.mark.parametrize(("name", "published"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_mxfp4_experts_make_up_the_size_of_the_published_checkpoint(name: str, published: float) -> None:
    model = Model.named(name)
    assert model.num_experts is not None
    assert model.num_moe_layers is not None
    assert model.total_parameters is not None
    assert model.routed_parameters is not None
    experts = (model.expert_bytes() or 0.0) * model.num_experts * model.num_moe_layers
    others = 2.0 * (model.total_parameters - model.routed_parameters)
    assert (experts + others) / 2**30 == pytest.approx(published, rel=0.01)


def test_a_model_without_shared_experts_has_no_bytes_of_them() -> None:
    assert Model.named("olmoe-1b-7b").shared_bytes("fp8") == 0.0
    assert Model(name="m", hidden_size=8, expert_width=8).shared_bytes() == 0.0
    assert Model.named("deepseek-v2").shared_bytes("fp8") == 2 * 3 * 5120 * 1536


def test_fp8_dispatch_carries_a_scale_for_128_channels() -> None:
    model = Model(name="m", hidden_size=7168, dispatch_dtype="fp8")
    assert model.dispatch_bytes == 7168 + 7168 // 128 * 4
    assert model.combine_bytes == 2 * 7168


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("allenai/OLMoE-1B-7B-0924", "olmoe-1b-7b"),
        ("Mixtral-8x7B-Instruct-v0.1 (FP8)", "mixtral-8x7b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("zai-org/GLM-4.5", "glm-4.5"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
        ("Qwen3_235B_A22B", "qwen3-235b-a22b"),
        ("GLM-4.5V", "assumed"),
        ("Mixtral-8x70B", "assumed"),
        ("my-mixtral-8x7b", "assumed"),
        ("CMU FLAME-MoE-290M (run 31066, step 5473)", "assumed"),
        ("", "assumed"),
        (None, "assumed"),
    ],
)
def test_a_trace_name_leads_to_its_model(name: str | None, found: str) -> None:
    assert Model.for_trace_name(name).name == found


def test_a_variant_with_another_number_of_experts_is_not_taken_for_the_large_model() -> None:
    assert Model.for_trace_name("DeepSeek-V2-Lite", num_experts=64) is ASSUMED
    assert Model.for_trace_name("DeepSeek-V2-Chat", num_experts=160).name == "deepseek-v2"


def test_the_assumed_model_has_bf16_vectors_of_4096_and_no_expert_size() -> None:
    assert ASSUMED.hidden_size == 4096
    assert ASSUMED.dispatch_bytes == ASSUMED.combine_bytes == 8192
    assert ASSUMED.expert_bytes() is None
    assert ASSUMED.expert_bytes("fp8") is None
    assert ASSUMED.shared_bytes() is None
    assert ASSUMED.routed_parameters is None
    assert ASSUMED.flops_per_token_expert is None


def test_a_name_is_matched_whatever_its_case_but_not_by_its_beginning() -> None:
    assert Model.named("deepseek-ai/DeepSeek_V3") == Model.named("deepseek-r1") == Model.named("deepseek-v3")
    with pytest.raises(InvalidInput, match=r"unknown model 'mixtral-8x7'.*did you mean mixtral-8x7b"):
        Model.named("mixtral-8x7")
    with pytest.raises(InvalidInput, match="known: "):
        Model.named("")


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_known_name_or_an_assumption(name: str) -> None:
    assert Model.for_trace_name(name).name in {*known(), "assumed"}


@given(st.sampled_from(list(TABLE)), st.sampled_from(["", "-chat", ".1"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_continued_name_means_the_same_model(name: str, end: str, upper: bool) -> None:
    text = f"someone/{name}{end} (a remark)"
    assert Model.for_trace_name(text.upper() if upper else text).name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"expert_width": -1}, "expert_width is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"num_groups": 2, "topk_groups": 3}, "topk_groups is 3"),
        ({"expert_dtype": "int3"}, "expert_dtype is 'int3'.*bf16, fp8, fp4"),
        ({"dispatch_dtype": "fp4"}, "dispatch_dtype is 'fp4'.*bf16, fp8"),
    ],
)
def test_an_impossible_model_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Model(**({"name": "m", "hidden_size": 8} | changes))  # type: ignore[arg-type]


def test_an_unknown_dtype_has_no_size() -> None:
    with pytest.raises(InvalidInput, match="'fp3', expected one of bf16, fp8, fp4"):
        Model.named("dbrx").expert_bytes("fp3")


def test_a_model_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(Model.named("glm-4.5"))) == Model.named("glm-4.5")
