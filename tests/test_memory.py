"""What experts need on every GPU, against published sizes, brute force and the machine's memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace, problem

from placer import Model, Placement, Problem, Topology, Trace, solve
from placer.errors import Infeasible, InvalidInput
from placer.memory import Memory, capacities, worst_gpu_bytes

TOY = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert in BF16
SHARED = replace(TOY, num_shared_experts=2)

# Layers with experts, routed experts and shared ones of a layer, MB of one expert in BF16 and in FP8.
EXPERTS = {
    "deepseek-v3": (58, 256, 1, 88.1, 44.0),
    "deepseek-v2": (59, 160, 2, 47.2, 23.6),
    "kimi-k2": (60, 384, 1, 88.1, 44.0),
    "qwen3-235b-a22b": (94, 128, 0, 37.7, 18.9),
    "qwen3-30b-a3b": (48, 128, 0, 9.4, 4.7),
    "mixtral-8x7b": (32, 8, 0, 352.3, 176.2),
    "mixtral-8x22b": (56, 8, 0, 604.0, 302.0),
    "olmoe-1b-7b": (16, 64, 0, 12.6, 6.3),
    "gpt-oss-120b": (36, 128, 0, 49.8, 24.9),
    "gpt-oss-20b": (24, 32, 0, 49.8, 24.9),
    "glm-4.5": (89, 160, 1, 47.2, 23.6),
    "glm-4.5-air": (45, 128, 1, 34.6, 17.3),
    "llama-4-scout": (48, 16, 1, 251.7, 125.8),
    "llama-4-maverick": (24, 128, 1, 251.7, 125.8),
    "dbrx": (40, 16, 0, 396.4, 198.2),
    "grok-1": (64, 8, 0, 1208, 604),
    "minimax-text-01": (80, 32, 0, 339.7, 169.9),
    "minimax-m2": (62, 256, 0, 28.3, 14.2),
}


def contiguous(num_experts: int, layers: int, ranks: int, spare: int = 0) -> Placement:
    """Experts in order on one server, copies of the first ones behind them."""
    row = np.arange(num_experts + spare) % num_experts
    return Placement(
        physical_to_logical=np.tile(row, (layers, 1)).astype(np.int32),
        num_experts=num_experts,
        shape=(1, 1, ranks),
    )


@pytest.mark.parametrize("name", sorted(EXPERTS))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_eight_gpus_hold_an_eighth_of_the_routed_experts_and_all_shared_ones(name: str, dtype: str) -> None:
    layers, experts, shared, bf16, fp8 = EXPERTS[name]
    size = {"bf16": bf16, "fp8": fp8}[dtype] * 1e6
    held = worst_gpu_bytes(
        contiguous(experts, layers, 8),
        Model.named(name),
        capacity=math.inf,
        reserve=20e9,
        expert_dtype=dtype,
    )
    assert held == pytest.approx(
        layers * (experts / 8 + shared) * size, rel=0.008
    )  # of the table's last digit


@pytest.mark.parametrize(
    ("gpu_memory", "dtype", "slots"),
    [
        # DeepSeek-V3 on 64 GPUs: 58 layers x (slots + 1 shared) x 44.04 MB, and 20 GB for the rest.
        (80e9, "fp8", 22),
        (141e9, "fp8", 46),
        (80e9, "bf16", 10),
        (80e9, "fp4", 43),
        (22e9, "fp8", 0),
    ],
)
def test_the_slots_that_fit_are_those_of_a_pocket_calculator(
    gpu_memory: float, dtype: str, slots: int
) -> None:
    memory = Memory.of(
        Model.named("deepseek-v3"),
        layers=58,
        num_ranks=64,
        gpu_memory=gpu_memory,
        reserve=20e9,
        expert_dtype=dtype,
    )
    assert memory is not None
    assert memory.most_slots == slots


def test_every_slot_counts_copies_and_all_and_an_empty_one_does_not() -> None:
    plain, copied = contiguous(8, 3, 4), contiguous(8, 3, 4, spare=4)
    roomy: dict[str, Any] = {"capacity": 1e9, "reserve": 0.0}
    assert worst_gpu_bytes(plain, TOY, **roomy) == 3 * 2 * 6e6
    assert worst_gpu_bytes(copied, TOY, **roomy) == 3 * 3 * 6e6
    assert worst_gpu_bytes(copied, SHARED, **roomy) == 3 * (3 + 2) * 6e6
    holes = Placement(physical_to_logical=np.array([[0, -1, 1, 2]]), num_experts=3, shape=(1, 1, 2))
    assert worst_gpu_bytes(holes, TOY, **roomy) == 2 * 6e6


def test_a_refusal_names_the_gpu_what_it_needs_and_what_it_has() -> None:
    placed, size = contiguous(8, 3, 4), 3 * (2 + 2) * 6e6
    fits: dict[str, Any] = {"capacity": (1e9, 1e9, size + 1e9, 1e10), "reserve": 1e9 - 1}
    with pytest.raises(Infeasible) as caught:
        worst_gpu_bytes(placed, SHARED, **fits)
    assert str(caught.value) == (
        "memory: GPU 0 needs 1.07 GB (6 experts over 3 layers x 6.0 MB + 0.04 GB shared + 1.00 GB reserve), "
        "it has 1.00 GB"
    )
    with pytest.raises(Infeasible, match=r"memory: GPU 2 needs 1.07 GB .* it has 0.50 GB"):
        worst_gpu_bytes(placed, SHARED, capacity=(2e9, 2e9, 0.5e9, 1e9), reserve=1e9)
    assert worst_gpu_bytes(placed, SHARED, capacity=[size + 1e9], reserve=1e9) == size
    with pytest.raises(Infeasible, match="GPU 0"):
        worst_gpu_bytes(placed, SHARED, capacity=size + 1e9 - 1, reserve=1e9)


def test_nothing_is_refused_where_the_size_of_an_expert_is_unknown() -> None:
    unknown = Model(name="m", hidden_size=8, num_shared_experts=1)
    assert worst_gpu_bytes(contiguous(8, 1, 4), unknown, capacity=1.0, reserve=0.0) is None


@pytest.mark.parametrize("sizes", [(), (1.0, 2.0, 3.0), ((1.0, 2.0), (3.0, 4.0))])
def test_sizes_that_do_not_divide_the_gpus_are_refused(sizes: Any) -> None:
    with pytest.raises(
        InvalidInput, match=r"GPU memory: found . sizes, expected one, or as many as divide 4 GPUs"
    ):
        capacities(sizes, 4)


@settings(max_examples=60, deadline=None)
@given(
    rooms=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    layers=st.integers(1, 2),
    num_experts=st.integers(1, 5),
    slots=st.integers(1, 3),
)
def test_experts_are_refused_exactly_where_no_placement_fits(
    rooms: list[int], layers: int, num_experts: int, slots: int
) -> None:
    """Against every way to give each GPU a number of experts of each layer."""
    memory = Memory(
        expert_bytes=1.0,
        shared_bytes=1.0,
        layers=layers,
        capacity=np.array(rooms, np.float64),
        reserve=1.0,
    )
    ways = [
        split for split in itertools.product(range(slots + 1), repeat=len(rooms)) if sum(split) == num_experts
    ]
    fits = any(
        all(
            sum(held) + layers + 1 <= room for held, room in zip(zip(*split, strict=True), rooms, strict=True)
        )
        for split in itertools.product(ways, repeat=layers)
    )
    if fits:
        memory.require_any(num_experts, slots)
    else:
        with pytest.raises(Infeasible, match=r"memory: .* needs .* it has") as caught:
            memory.require_any(num_experts, slots)
        assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(rooms=st.lists(st.integers(0, 40), min_size=1, max_size=4), layers=st.integers(1, 3))
def test_most_slots_is_the_largest_number_that_every_gpu_can_fill(rooms: list[int], layers: int) -> None:
    memory = Memory(
        expert_bytes=2.0,
        shared_bytes=1.0,
        layers=layers,
        capacity=np.array(rooms, np.float64),
        reserve=1.0,
    )
    everywhere = np.ones(len(rooms), np.int64)
    if memory.most_slots:
        memory.require(everywhere * layers * memory.most_slots)
    with pytest.raises(Infeasible):
        memory.require(everywhere * layers * (memory.most_slots + 1))


# -- problems and results ----------------------------------------------------------------------------------------


def test_a_problem_takes_the_sizes_of_every_gpu_from_the_topology() -> None:
    trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    small = replace(Topology.load("dgx-h100").with_shape("1x2x2"), gpu_memory=6e6, gpu_memories=(12e6, 6e6))
    posed = Problem.from_trace(trace, small, model=TOY, reserve=0.0)
    assert posed.memory is not None
    assert posed.memory.capacity.tolist() == [12e6, 6e6, 12e6, 6e6]
    assert solve(posed, "linear").placement.num_ranks == 4
    with pytest.raises(Infeasible, match=r"memory: GPU 1 needs 0.01 GB .1 experts over 1 layers"):
        replace(posed, reserve=1.0)
    with pytest.raises(InvalidInput, match="found 3 sizes"):
        replace(posed, gpu_memory=(1e9, 1e9, 1e9))
    assert Problem.from_trace(trace, small, model=TOY, reserve=0.0, gpu_memory=7e6).gpu_memory == 7e6


def test_copies_may_fill_a_large_gpu_and_not_a_small_one() -> None:
    trace = noisy_trace(num_experts=4, top_k=2, layers=1)
    wide: dict[str, Any] = {"model": TOY, "slots_per_gpu": 3, "reserve": 0.0}
    assert solve(problem(trace, "1x2x1", gpu_memory=(18e6, 18e6), **wide), "linear").placement.has_copies
    with pytest.raises(Infeasible, match=r"memory: GPU 1 needs 0.02 GB .3 experts .* it has 0.01 GB"):
        solve(problem(trace, "1x2x1", gpu_memory=(18e6, 12e6), **wide), "linear")


def test_shared_experts_take_the_room_of_routed_ones() -> None:
    trace = noisy_trace(num_experts=4, top_k=2, layers=1)
    roomy: dict[str, Any] = {"gpu_memory": 4 * 6e6, "reserve": 0.0}
    problem(trace, "1x2x1", model=SHARED, **roomy)
    with pytest.raises(Infeasible, match=r"2 experts over 1 layers x 6.0 MB \+ 0.02 GB shared"):
        problem(trace, "1x2x1", model=replace(SHARED, num_shared_experts=3), **roomy)
