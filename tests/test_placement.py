from __future__ import annotations

import json
import tracemalloc
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InvalidInput
from placer.placement import REPLICA_CHOICES, Placement, format_shape

DOCUMENT: dict[str, Any] = {
    "schema": "placer/placement/1",
    "num_experts": 3,
    "layer_ids": [4, 7],
    "num_ranks": 2,
    "slots_per_rank": 2,
    "shape": [1, 2, 1],
    "physical_to_logical": [[0, 1, 2, -1], [2, 0, 1, 2]],
    "dispatch": {"rule": "table", "table": [[[0, 1, 2], [None, 1, None]], [[1, 2, 0], [1, None, 3]]]},
    "provenance": {"method": "tabu", "seed": 3},
}


def small(**changes: Any) -> Placement:
    values: dict[str, Any] = {
        "physical_to_logical": np.array([[0, 1, 2, -1], [2, 0, 1, 2]]),
        "num_experts": 3,
        "shape": (1, 2, 1),
    }
    return Placement(**{**values, **changes})


def written(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "placement.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def shown(value: object) -> str:
    """The end of a test's name: what is changed, in one short line."""
    return " ".join(str(value).split())[:60]


def equal(one: Placement, two: Placement) -> bool:
    return all(np.array_equal(getattr(one, item.name), getattr(two, item.name)) for item in fields(Placement))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)))
    ranks = int(np.prod(shape))
    num_experts = draw(st.integers(1, 8))
    per_rank = -(-num_experts // ranks) + draw(st.integers(0, 2))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    spare = ranks * per_rank - num_experts
    slots = []
    for _ in range(layers):
        extra = rng.integers(-1, num_experts, spare)
        row = rng.permutation(np.concatenate([np.arange(num_experts), extra])).reshape(ranks, per_rank)
        slots.append(np.take_along_axis(row, np.argsort(row < 0, axis=1, kind="stable"), axis=1).ravel())
    table = None
    if draw(st.booleans()):
        table = np.full((layers, shape[0] * shape[1], num_experts), -1)
        for index in np.ndindex(table.shape):
            if rng.random() < 0.7:
                table[index] = rng.choice(np.flatnonzero(slots[index[0]] == index[2]))
    provenance = st.dictionaries(
        st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4), max_size=3
    )
    return Placement(
        physical_to_logical=np.array(slots, np.int32),
        num_experts=num_experts,
        shape=shape,
        layer_ids=tuple(draw(st.permutations(range(5, 5 + layers)))),
        rule=draw(st.sampled_from(REPLICA_CHOICES)),
        table=table,
        provenance=draw(provenance),
    )


# -- the value ------------------------------------------------------------------------------------------------


def test_sizes_follow_from_slots_and_shape() -> None:
    slots = np.arange(24, dtype=np.int32).reshape(1, 24)
    placement = Placement(physical_to_logical=slots, num_experts=24, shape=(2, 3, 2))
    assert (placement.num_layers, placement.num_slots) == (1, 24)
    assert (placement.num_ranks, placement.slots_per_rank) == (12, 2)
    assert placement.layer_ids == (0,)
    assert not placement.has_copies
    assert small().has_copies


@settings(max_examples=50, deadline=None)
@given(placement=placements())
def test_logical_to_physical_lists_the_slots_of_every_expert_in_order(placement: Placement) -> None:
    slots_of = placement.logical_to_physical
    assert slots_of.dtype == np.int32
    for layer in range(placement.num_layers):
        for expert in range(placement.num_experts):
            expected = [s for s, e in enumerate(placement.physical_to_logical[layer].tolist()) if e == expert]
            row = slots_of[layer, expert].tolist()
            assert row == expected + [-1] * (slots_of.shape[2] - len(expected))
            assert placement.replica_count[layer, expert] == len(expected)
    assert slots_of.shape[2] == placement.replica_count.max()


@settings(max_examples=50, deadline=None)
@given(placement=placements())
def test_duplicates_are_experts_that_one_rank_holds_twice(placement: Placement) -> None:
    expected = []
    size = placement.slots_per_rank
    for layer, slots in enumerate(placement.physical_to_logical.tolist()):
        for rank in range(placement.num_ranks):
            held = slots[rank * size : (rank + 1) * size]
            for expert in range(placement.num_experts):
                expected += [(layer, rank, expert)] * max(0, held.count(expert) - 1)
    assert sorted(placement.duplicates()) == sorted(expected)


def test_arrays_cannot_be_changed() -> None:
    placement = small(table=np.full((2, 2, 3), -1))
    assert placement.table is not None
    for array in (
        placement.physical_to_logical,
        placement.replica_count,
        placement.logical_to_physical,
        placement.table,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(FrozenInstanceError):
        placement.num_experts = 4  # type: ignore[misc]


def test_the_arrays_given_stay_as_they_are() -> None:
    slots, table = np.array([[0, 1]], np.int32), np.full((1, 2, 2), -1, np.int32)
    placement = Placement(physical_to_logical=slots, num_experts=2, shape=(1, 2, 1), table=table)
    slots[0], table[0] = 1, 0
    assert placement.physical_to_logical.tolist() == [[0, 1]]
    assert placement.table is not None
    assert placement.table.max() == -1


def test_the_digest_tells_maps_and_shapes_apart() -> None:
    assert small().digest == small(rule="spread").digest
    assert (
        small().digest == small(physical_to_logical=np.array([[0, 1, 2, -1], [2, 0, 1, 2]], np.int8)).digest
    )
    others = (
        small(shape=(1, 1, 2)),
        small(physical_to_logical=np.array([[1, 0, 2, -1], [2, 0, 1, 2]])),
        small(physical_to_logical=np.array([[0, 1, 2, -1, 2, 0, 1, 2]])),
    )
    assert len({small().digest, *(other.digest for other in others)}) == 4


def test_a_shape_is_written_as_on_the_command_line() -> None:
    assert format_shape((1, 2, 8)) == "1x2x8"


# -- what it refuses ------------------------------------------------------------------------------------------

WRONG_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("physical_to_logical: found .*shape", {"physical_to_logical": np.array([0, 1, 2, -1])}),
    ("physical_to_logical: found .*shape", {"physical_to_logical": np.zeros((1, 2, 2), int)}),
    ("physical_to_logical: found .*shape", {"physical_to_logical": np.zeros((0, 4), int)}),
    ("physical_to_logical: found .*shape", {"physical_to_logical": np.zeros((2, 0), int)}),
    ("physical_to_logical: found .*integers", {"physical_to_logical": np.zeros((1, 4))}),
    ("physical_to_logical: found .*integers", {"physical_to_logical": np.zeros((1, 4), bool)}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, -1], [2, 0, 1]]}),
    (r"found 4 slots per layer, expected a multiple of the 3 ranks of shape 1x3x1", {"shape": (1, 3, 1)}),
    (r"\[0\]\[3\]: found 3, expected an expert 0\.\.2 or -1", {"physical_to_logical": [[0, 1, 2, 3]]}),
    (r"\[1\]\[0\]: found -2", {"physical_to_logical": [[0, 1, 2, -1], [-2, 0, 1, 2]]}),
    (
        "physical_to_logical",
        {"physical_to_logical": np.array([[2**64 - 1, 0, 1, 2]], np.uint64)},
    ),
    ("shape: found", {"shape": (1, 2)}),
    ("shape: found", {"shape": (1, 2, 0)}),
    ("shape: found", {"shape": (1, -2, -1)}),
    ("shape: found", {"shape": (1, 2, 1.5)}),
    ("num_experts: found 0", {"num_experts": 0}),
    ("num_experts: found 3.0", {"num_experts": 3.0}),
    ("layer_ids: found 1 entries, expected 2", {"layer_ids": (4,)}),
    ("layer_ids", {"layer_ids": (4, 4)}),
    ("layer_ids", {"layer_ids": (-1, 4)}),
    ("layer_ids", {"layer_ids": (1.5, 2.5)}),
    ("layer 0, rank 0: an empty slot", {"physical_to_logical": [[-1, 0, 1, 2]]}),
    ("layer 1, rank 1: an empty slot", {"physical_to_logical": [[0, 1, 2, -1], [0, 1, -1, 2]]}),
    ("layer 1: expert 2 has no slot", {"physical_to_logical": [[0, 1, 2, -1], [0, 1, 1, 0]]}),
    ("dispatch rule: found 'best', expected one of nearest", {"rule": "best"}),
    (r"dispatch table: found shape \(2, 2\)", {"table": np.zeros((2, 2), int)}),
    (r"dispatch table: found shape \(2, 1, 3\)", {"table": np.zeros((2, 1, 3), int)}),
    ("dispatch table: found a slot outside", {"table": np.full((2, 2, 3), 4)}),
    ("dispatch table: found a slot outside", {"table": np.full((2, 2, 3), -2)}),
    ("dispatch table", {"table": np.full((2, 2, 3), 2**32 - 1)}),
    ("dispatch table", {"table": np.full((2, 2, 3), -0.5)}),
    (
        r"dispatch table\[0\]\[0\]\[1\]: slot 0 holds expert 0, expected 1",
        {"table": np.zeros((2, 2, 3), int)},
    ),
    (r"slot 3 holds expert -1, expected 2", {"table": [[[-1, -1, 3]] * 2, [[-1, -1, -1]] * 2]}),
]


@pytest.mark.parametrize(("message", "changes"), WRONG_VALUES, ids=shown)
def test_wrong_values_are_refused_in_one_line(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


# -- files ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(placement=placements())
def test_a_placement_survives_its_document(placement: Placement) -> None:
    again = Placement.from_dict(json.loads(json.dumps(placement.to_dict())))
    assert equal(again, placement)
    assert again.digest == placement.digest


def test_a_placement_survives_its_file(tmp_path: Path) -> None:
    placement = Placement.from_dict(DOCUMENT)
    placement.save(tmp_path / "placement.json")
    assert equal(Placement.load(tmp_path / "placement.json"), placement)
    assert equal(Placement.load(str(tmp_path / "placement.json")), placement)
    assert [path.name for path in tmp_path.iterdir()] == ["placement.json"]


def test_the_file_has_the_keys_and_values_of_the_contract(tmp_path: Path) -> None:
    Placement.from_dict(DOCUMENT).save(tmp_path / "placement.json")
    assert json.loads((tmp_path / "placement.json").read_text()) == DOCUMENT
    small().save(tmp_path / "placement.json")
    document = json.loads((tmp_path / "placement.json").read_text())
    assert document.keys() == DOCUMENT.keys()
    assert document["dispatch"] == {"rule": "nearest", "table": None}
    assert document["layer_ids"] == [0, 1]


def test_keys_that_are_not_known_are_ignored() -> None:
    more = {**DOCUMENT, "comment": [1, {"x": None}], "dispatch": {**DOCUMENT["dispatch"], "weights": "later"}}
    assert equal(Placement.from_dict(more), Placement.from_dict(DOCUMENT))


def test_only_experts_shape_and_map_are_needed() -> None:
    needed = {key: DOCUMENT[key] for key in ("schema", "num_experts", "shape", "physical_to_logical")}
    placement = Placement.from_dict(needed)
    assert placement.layer_ids == (0, 1)
    assert (placement.rule, placement.table, placement.provenance) == ("nearest", None, {})


def test_saving_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        small().save(tmp_path / "missing" / "placement.json")


@pytest.mark.parametrize("provenance", [{"when": object()}, {"loss": float("nan")}])
def test_provenance_that_json_cannot_hold_is_refused_and_leaves_no_file(
    provenance: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="provenance"):
        small(provenance=provenance).save(tmp_path / "placement.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "not a placement file"),
        ("{", "not a placement file"),
        ("\x00\x01", "not a placement file"),
        ("[" * 100_000, "not a placement file"),
        ("[]", "found a JSON list, expected an object"),
        ("null", "found a JSON NoneType, expected an object"),
        ("{}", "schema: found None"),
        (
            '{"schema": "placer/placement/2"}',
            "schema: found 'placer/placement/2', expected 'placer/placement/1'",
        ),
        ('{"schema": "placer/placement/1"}', "key '.*' is missing"),
    ],
)
def test_files_that_are_no_placement_are_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "placement.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        Placement.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        Placement.load(tmp_path)
    (tmp_path / "placement.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InvalidInput, match="not a placement file"):
        Placement.load(tmp_path / "placement.json")


MAP = DOCUMENT["physical_to_logical"]
WRONG_DOCUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("physical_to_logical: .*rows", {"physical_to_logical": [[0, 1, 2, -1], [2, 0, 1]]}),
    ("physical_to_logical", {"physical_to_logical": []}),
    ("physical_to_logical", {"physical_to_logical": None}),
    ("physical_to_logical", {"physical_to_logical": "0123"}),
    ("physical_to_logical", {"physical_to_logical": {"0": [0, 1]}}),
    ("physical_to_logical", {"physical_to_logical": [0, 1, 2, -1]}),
    ("physical_to_logical", {"physical_to_logical": [[0.0, 1.0, 2.0, -1.0]]}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, 0.5]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [[True, False, True, False]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [[0, True, 2, -1], [2, 0, 1, 2]]}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, None]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [["0", "1", "2", "-1"]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, 2**31]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, 2**32]] * 2}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, -(2**63)], [2, 0, 1, 2]]}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, 2**64 - 1], [2, 0, 1, 2]]}),
    ("physical_to_logical", {"physical_to_logical": [[0, 1, 2, 2**70]] * 2}),
    ("num_experts", {"num_experts": 3.0}),
    ("num_experts", {"num_experts": True}),
    ("num_experts", {"num_experts": None}),
    ("num_experts", {"num_experts": "3"}),
    ("num_experts", {"num_experts": [3]}),
    ("num_experts", {"num_experts": [3, 3]}),
    ("num_experts", {"num_experts": []}),
    ("num_experts", {"num_experts": -1}),
    ("shape", {"shape": [2, 1]}),
    ("shape", {"shape": 2}),
    ("shape", {"shape": [1, 2, 1, 1]}),
    ("shape", {"shape": [1, 2, 1.0]}),
    ("shape", {"shape": [1, 2, True]}),
    ("shape", {"shape": "1x2x1"}),
    ("shape", {"shape": [0, 2, 1]}),
    ("layer_ids: found 1 entries", {"layer_ids": [4]}),
    ("layer_ids", {"layer_ids": [[4], [7]]}),
    ("layer_ids", {"layer_ids": "47"}),
    ("layer_ids", {"layer_ids": [4, 4]}),
    ("layer_ids", {"layer_ids": [4, -7]}),
    ("layer_ids", {"layer_ids": [4, 7.5]}),
    ("num_ranks: found 3, expected 2", {"num_ranks": 3}),
    ("slots_per_rank: found 1, expected 2", {"slots_per_rank": 1}),
    ("dispatch", {"dispatch": "nearest"}),
    ("dispatch", {"dispatch": []}),
    ("dispatch", {"dispatch": 0}),
    ("dispatch rule: found 'best'", {"dispatch": {"rule": "best"}}),
    ("dispatch rule", {"dispatch": {"rule": None}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": 3}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": []}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[[0, 1, 2], [0, 1]], [[1, 2, 0]] * 2]}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[[0.9, 1, 2]] * 2, [[1, 2, 0]] * 2]}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[["0", 1, 2]] * 2, [[1, 2, 0]] * 2]}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[[False, True, 2]] * 2, [[1, 2, 0]] * 2]}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[[0, 1, 2**40]] * 2, [[1, 2, 0]] * 2]}}),
    ("dispatch table", {"dispatch": {"rule": "table", "table": [[[1, 1, 2]] * 2, [[1, 2, 0]] * 2]}}),
]


@pytest.mark.parametrize(("message", "changes"), WRONG_DOCUMENTS, ids=shown)
def test_wrong_documents_are_refused_with_file_and_key(
    message: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, {**DOCUMENT, **changes})
    with pytest.raises(InvalidInput, match=message) as caught:
        Placement.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("key", ["num_experts", "shape", "physical_to_logical"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    document = {name: value for name, value in DOCUMENT.items() if name != key}
    with pytest.raises(InvalidInput, match=f"key '{key}' is missing"):
        Placement.load(written(tmp_path, document))


def test_long_content_makes_no_long_message(tmp_path: Path) -> None:
    path = written(tmp_path, {**DOCUMENT, "schema": "x" * 10_000})
    with pytest.raises(InvalidInput, match="schema") as caught:
        Placement.load(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_wrong_number_of_experts_takes_no_memory(tmp_path: Path) -> None:
    path = written(tmp_path, {**DOCUMENT, "num_experts": 5_000_000})
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput):
            Placement.load(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
