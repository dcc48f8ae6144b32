from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.background import (
    LEVELS,
    Background,
    data_parallel_bytes,
    growth,
    pipeline_bytes,
    tensor_parallel_bytes,
)
from placer.errors import InvalidInput

SIZES = st.floats(0, 1e9)
DEGREES = st.integers(1, 64)


def test_an_all_reduce_over_eight_gpus_moves_103_megabytes() -> None:
    # 4096 tokens of hidden size 7168 in BF16 are 58.7 MB, times 2 * 7/8.
    assert tensor_parallel_bytes(4096, 7168, 8) == pytest.approx(102.8e6, rel=1e-3)


def test_a_pipeline_boundary_moves_the_activations_once() -> None:
    assert pipeline_bytes(4096, 7168, 1) == pytest.approx(58.7e6, rel=1e-3)
    assert pipeline_bytes(4096, 7168, 8) == pytest.approx(58.7e6 / 8, rel=1e-3)


def test_deepseek_v3_synchronises_its_experts_with_two_thirds_of_a_gigabyte_each_way() -> None:
    # 58 layers of 256 experts over EP64 * PP16 GPUs; two of 2048 GPUs hold the same experts.
    experts = 58 * 256 * 3 * 7168 * 2048 / (64 * 16)
    assert experts == pytest.approx(639e6, rel=1e-3)
    gradients = data_parallel_bytes(experts, 2, parameter_bytes=0)
    parameters = data_parallel_bytes(experts, 2, gradient_bytes=0)
    assert gradients == pytest.approx(0.64e9, rel=5e-3)
    assert parameters == pytest.approx(0.64e9, rel=5e-3)
    assert data_parallel_bytes(experts, 2) == gradients + parameters
    assert data_parallel_bytes(experts, 2, gradient_bytes=4, parameter_bytes=0) == 2 * gradients


@given(tokens=SIZES, hidden_size=st.integers(1, 20000), degree=DEGREES)
@settings(max_examples=50, deadline=None)
def test_a_gpu_alone_moves_nothing_and_a_larger_group_more(
    tokens: float, hidden_size: int, degree: int
) -> None:
    assert tensor_parallel_bytes(tokens, hidden_size, 1) == data_parallel_bytes(tokens, 1) == 0
    fewer, more = (tensor_parallel_bytes(tokens, hidden_size, size) for size in (degree, degree + 1))
    assert fewer <= more <= 2 * pipeline_bytes(tokens, hidden_size, 1)
    assert data_parallel_bytes(tokens, degree) <= data_parallel_bytes(tokens, degree + 1) <= 4 * tokens


@given(tokens=SIZES, hidden_size=st.integers(1, 20000), degree=DEGREES)
@settings(max_examples=50, deadline=None)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(
    tokens: float, hidden_size: int, degree: int
) -> None:
    both = data_parallel_bytes(tokens * hidden_size, degree)
    assert tensor_parallel_bytes(tokens, hidden_size, degree) == pytest.approx(both)


@pytest.mark.parametrize(
    ("utilisation", "factor"),
    [(0, 1), (0.2, 1.125), (0.5, 1.5), (0.8, 3), (0.9, 5.5), (0.95, 10.5), (7, 10.5)],
)
def test_growth_is_that_of_a_queue_with_constant_service(utilisation: float, factor: float) -> None:
    assert growth(utilisation) == pytest.approx(factor)


@given(one=st.floats(0, 2), other=st.floats(0, 2))
@settings(max_examples=50, deadline=None)
def test_growth_never_falls_as_links_fill(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 1 <= growth(low) <= growth(high) <= growth(float("inf"))


def test_background_is_nothing_and_does_not_queue_unless_told() -> None:
    assert Background() == Background(gpu=0, server=0, rack=0, queueing=False, window=None)


def test_background_is_read_from_text() -> None:
    assert Background.parse("gpu=100MB,server=20MB") == Background(gpu=100e6, server=20e6)
    assert Background.parse(" rack = 1 KiB ") == Background(rack=1024)
    assert Background.parse("gpu=5", queueing=True, window=1e-3) == Background(
        gpu=5, queueing=True, window=1e-3
    )


@given(st.dictionaries(st.sampled_from(LEVELS), st.floats(0, 1e15), min_size=1))
@settings(max_examples=50, deadline=None)
def test_background_written_as_text_is_read_back(sizes: dict[str, Any]) -> None:
    text = ",".join(f"{level}={size!r}" for level, size in sizes.items())
    assert Background.parse(text) == Background(**sizes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Background.parse(""), "found '', expected level=size"),
        (lambda: Background.parse("gpu=1MB,"), "expected level=size"),
        (lambda: Background.parse("100MB"), "found '100MB'"),
        (lambda: Background.parse("sever=1MB"), "did you mean server"),
        (lambda: Background.parse("gpu=1MB,gpu=2MB"), "found gpu twice"),
        (lambda: Background.parse("gpu=-1MB"), "background: gpu '-1MB': expected a size"),
        (lambda: Background.parse("rack=1GB/s"), "background: rack '1GB/s': expected a size"),
        (lambda: Background(server=-1.0), "background: server: found -1.0"),
        (lambda: Background(rack=float("nan")), "background: rack: found nan"),
        (lambda: Background(window=0.0), "window: found 0.0, expected seconds > 0"),
        (lambda: growth(-0.1), "found utilisation -0.1"),
        (lambda: growth(float("nan")), "found utilisation nan"),
        (lambda: tensor_parallel_bytes(4096, 7168, 0), "degree: found 0"),
        (lambda: pipeline_bytes(4096, 7168, 0), "degree: found 0"),
        (lambda: pipeline_bytes(-1, 7168, 1), "tokens: found -1"),
        (lambda: data_parallel_bytes(1e9, 0), "degree: found 0"),
        (lambda: data_parallel_bytes(float("inf"), 2), "parameters: found inf"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
