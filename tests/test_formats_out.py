"""Files for serving stacks, against files spelled out as the stacks write or read them, and back."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import formats
from placer.dispatch import complete_table, take_table
from placer.errors import InvalidInput
from placer.formats import (
    Target,
    _maps,
    dispatch_table,
    eplb,
    omni_infer,
    sglang,
    tensorrt_llm,
    vllm_ascend,
    vllm_expert_to_rank,
    vllm_initial_expert_map,
    vllm_initial_mapping,
)
from placer.placement import Placement

STACKS = (
    sglang,
    tensorrt_llm,
    vllm_ascend,
    vllm_initial_expert_map,
    vllm_initial_mapping,
    omni_infer,
    eplb,
)
NO_EMPTY = tuple(stack for stack in STACKS if stack is not omni_infer)
TARGET = Target(num_hidden_layers=8)


def placement(rows: Any, shape: tuple[int, int, int], **more: Any) -> Placement:
    held = np.array(rows)
    return Placement(physical_to_logical=held, num_experts=int(held.max()) + 1, shape=shape, **more)


@st.composite
def full(draw: st.DrawFn, *, table: bool = False) -> Placement:
    """No slot empty, no expert twice on a rank; perhaps with copies, layers with gaps between them and a table."""
    racks, servers, gpus = draw(st.tuples(*[st.integers(1, 2)] * 3))
    ranks, layers = racks * servers * gpus, draw(st.integers(1, 3))
    experts = draw(st.integers(ranks, 3 * ranks))
    width = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.empty((layers, ranks, width), int)
    for row in rows:
        home = rng.permutation(experts)
        for rank in range(ranks):
            own = home[rank::ranks]
            others = rng.permutation(np.setdiff1d(np.arange(experts), own))
            row[rank] = rng.permutation(np.concatenate([own, others])[:width])
    made = placement(
        rows.reshape(layers, -1),
        (racks, servers, gpus),
        layer_ids=tuple(sorted(draw(st.sets(st.integers(0, 7), min_size=layers, max_size=layers)))),
    )
    if not table:
        return made
    copies = made.logical_to_physical
    turn = rng.integers(0, 2**31, (layers, racks * servers, experts)) % made.replica_count[:, None]
    slots = np.take_along_axis(copies[:, None], turn[..., None], axis=3)[..., 0]
    return replace(made, rule="table", table=slots)


def written(stack: Any, made: Placement, folder: Path, target: Target = TARGET) -> Path:
    path = folder / "file"
    path.write_bytes(stack.write(made, target))
    return path


def file_of(folder: Path, content: bytes | str) -> Path:
    path = folder / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# -- all of them ------------------------------------------------------------------------------------------------


def test_every_writer_says_how_to_load_its_file_in_one_line() -> None:
    made = placement([[0, 1]], (1, 2, 1), table=np.array([[[0, 1], [0, 1]]]), rule="table")
    for name in formats.writers():
        stack = formats.writer(name)
        assert "\n" not in stack.load_with(made, "map.json")
        assert "map.json" in stack.load_with(made, "map.json")
        assert all(note and "\n" not in note for note in stack.notes(made, TARGET))
        assert len(formats.title(name)) <= 90


@pytest.mark.parametrize("stack", NO_EMPTY)
def test_an_empty_slot_is_refused_by_layer_and_rank(stack: Any) -> None:
    made = placement([[0, 1, 2, 3], [0, 1, 3, 2]], (1, 1, 2), layer_ids=(3, 5))
    holed = replace(made, physical_to_logical=np.array([[0, 1, 2, 3, 0, 1], [0, 1, -1, 2, 3, 0]]))
    with pytest.raises(InvalidInput, match=r"layer 5, rank 0: found 1 of 3 slots empty .*--redundant 2") as e:
        stack.write(holed, TARGET)
    assert "\n" not in str(e.value)
    assert ("--fill" in str(e.value)) == (stack is not vllm_ascend)


@pytest.mark.parametrize("stack", STACKS)
def test_a_dispatch_table_is_refused_where_it_says_something(stack: Any) -> None:
    made = placement([[0, 1, 0, 2]], (1, 2, 1), rule="table", table=np.array([[[0, 1, 3], [2, 1, 3]]]))
    with pytest.raises(InvalidInput, match=r"dispatch table: .*--map-only"):
        stack.write(made, TARGET)
    stack.write(replace(made, table=None), TARGET)
    said = " ".join(stack.notes(replace(made, table=None), TARGET))
    assert "made for the dispatch rule 'table'" in said
    alone = placement([[0, 1]], (1, 2, 1), rule="table", table=np.array([[[0, -1], [-1, 1]]]))
    stack.write(alone, TARGET)


@pytest.mark.parametrize(
    ("stack", "own"),
    [
        (sglang, {"nearest", "spread"}),
        (tensorrt_llm, {"spread"}),
        (vllm_ascend, {"spread"}),
        (vllm_initial_expert_map, {"spread"}),
        (vllm_initial_mapping, {"spread"}),
        (omni_infer, {"nearest"}),
    ],
)
def test_a_rule_that_the_stack_does_not_have_is_said(stack: Any, own: set[str]) -> None:
    for rule in ("nearest", "spread", "cover"):
        made = placement([[0, 1, 0, 2]], (1, 2, 1), rule=rule)
        said = [note for note in stack.notes(made, TARGET) if repr(rule) in note]
        assert bool(said) == (rule not in own)
        on_one_rank = placement([[0, 0, 1, 2]], (1, 2, 1), rule=rule)
        assert not [note for note in stack.notes(on_one_rank, TARGET) if "rule" in note]


def test_stacks_that_count_moe_layers_say_which_those_are() -> None:
    made = placement([[0, 1]] * 2, (1, 2, 1), layer_ids=(3, 4))
    for stack in (vllm_ascend, vllm_initial_expert_map, vllm_initial_mapping, omni_infer):
        assert any(": layers 3..4 of the model" in note for note in stack.notes(made, TARGET))


@pytest.mark.parametrize("stack", [vllm_ascend, vllm_initial_expert_map, vllm_initial_mapping, omni_infer])
def test_files_that_go_by_position_hold_the_layers_in_the_order_of_the_model(stack: Any) -> None:
    made = placement([[0, 1], [1, 0]], (1, 2, 1), layer_ids=(3, 4))
    turned = placement([[1, 0], [0, 1]], (1, 2, 1), layer_ids=(4, 3))
    assert stack.write(turned, TARGET) == stack.write(made, TARGET)
    assert stack.notes(turned, TARGET) == stack.notes(made, TARGET)


@settings(max_examples=40, deadline=None)
@given(made=full())
def test_what_a_stack_loads_reads_back_as_the_same_placement(folder: Path, made: Placement) -> None:
    pytest.importorskip("yaml")
    for stack in (sglang, tensorrt_llm, vllm_ascend, eplb):
        ids = {} if stack is tensorrt_llm else {"layer_ids": made.layer_ids}
        back = stack.read_placement(written(stack, made, folder), shape=made.shape, **ids)
        assert back.digest == made.digest
        assert back.layer_ids == made.layer_ids


# -- SGLang -----------------------------------------------------------------------------------------------------

SGLANG = '{"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]}'


def test_sglang_gets_a_row_for_every_hidden_layer() -> None:
    made = placement([[0, 2, 0, 1, 0, 3]], (1, 1, 3), layer_ids=(1,))
    assert sglang.write(made, Target(num_hidden_layers=2)).decode() == SGLANG + "\n"
    more = json.loads(sglang.write(made, Target(num_hidden_layers=3)))
    assert list(more) == ["physical_to_logical_map"]
    assert more["physical_to_logical_map"][2] == [0, 1, 2, 3, 0, 1]


def test_sglang_is_read_whole_or_by_layer(tmp_path: Path) -> None:
    path = file_of(tmp_path, SGLANG)
    whole = sglang.read_placement(path, shape=(1, 1, 3))
    assert whole.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]
    assert (whole.layer_ids, whole.num_experts, whole.slots_per_rank) == ((0, 1), 4, 2)
    one = sglang.read_placement(path, shape=(1, 1, 3), layer_ids=[1])
    assert (one.layer_ids, one.physical_to_logical.tolist()) == ((1,), [[0, 2, 0, 1, 0, 3]])


def test_sglang_needs_to_know_the_number_of_hidden_layers() -> None:
    made = placement([[0, 1]], (1, 2, 1), layer_ids=(3,))
    with pytest.raises(InvalidInput, match="expected --num-hidden-layers N"):
        sglang.write(made, Target())
    with pytest.raises(InvalidInput, match="found 3, expected at least 4: the placement has layer 3"):
        sglang.write(made, Target(num_hidden_layers=3))


def test_sglang_names_its_options() -> None:
    made = placement([[0, 1, 0, 2]], (1, 2, 1), layer_ids=(2,))
    options = "--init-expert-location 'a map.json' --ep-size 2 --ep-num-redundant-experts 1"
    assert sglang.load_with(made, "a map.json") == f"{options} --ep-dispatch-algorithm static"
    assert sglang.load_with(replace(made, rule="spread"), "a map.json").endswith(" dynamic")
    assert "dispatch" not in sglang.load_with(placement([[0, 1]], (1, 2, 1)), "map.json")
    with pytest.raises(InvalidInput, match=r"map\.pt: SGLang .* ends in \.json, such as map\.json"):
        sglang.load_with(made, "map.pt")
    assert sglang.notes(made, Target(num_hidden_layers=3))[0].endswith("starts with: layers 0..1")
    assert sglang.notes(replace(made, layer_ids=(0,)), Target(num_hidden_layers=1)) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a JSON file"),
        (SGLANG[:-9], "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        (b"\xff\xfe\x00", "not a text file"),
        ("[[0, 1, 2]]", "the key physical_to_logical_map alone"),
        ('{"logical_count": [[3, 4]]}', "the key physical_to_logical_map alone"),
        (SGLANG[:-1] + ', "ep_size": 3}', "the key physical_to_logical_map alone"),
        ('{"physical_to_logical_map": {"0": 1}}', "the key physical_to_logical_map alone"),
        ('{"physical_to_logical_map": []}', "expected a list of experts for each layer"),
        ('{"physical_to_logical_map": [[]]}', "expected a list of experts for each layer"),
        ('{"physical_to_logical_map": [0, 1, 2]}', "expected a list of experts for each layer"),
        ('{"physical_to_logical_map": [[0, 1, 2], [0, 1]]}', "unequal length"),
        ('{"physical_to_logical_map": [[0, 1, NaN]]}', "found float in list 0"),
        ('{"physical_to_logical_map": [[0, 1, null]]}', "found NoneType in list 0"),
        ('{"physical_to_logical_map": [[0, 1, true]]}', "found bool in list 0"),
        ('{"physical_to_logical_map": [[0, 1, [2]]]}', "found list in list 0"),
        ('{"physical_to_logical_map": [[0, 1, -2]]}', "found -2"),
        ('{"physical_to_logical_map": [[0, 2, 0]]}', "expert 1 has no slot"),
        ('{"physical_to_logical_map": [[0, 1, 99]]}', "expected 1 to 3"),
        ('{"physical_to_logical_map": [[0, 1, 1%s]]}' % ("0" * 400), "integers below"),
        ('{"physical_to_logical_map": [[0, 1, 2, 3]]}', "expected a multiple of the 3 ranks"),
    ],
)
def test_damaged_files_of_sglang_are_refused_in_one_line(
    tmp_path: Path, content: bytes | str, said: str
) -> None:
    path = file_of(tmp_path, content)
    with pytest.raises(InvalidInput, match=said) as error:
        sglang.read_placement(path, shape=(1, 1, 3))
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_and_a_missing_layer_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere: cannot be read: No such file"):
        sglang.read_placement(tmp_path / "nowhere", shape=(1, 1, 3))
    with pytest.raises(InvalidInput, match=r"found 2 layers, expected layers 1\.\.2"):
        sglang.read_placement(file_of(tmp_path, SGLANG), shape=(1, 1, 3), layer_ids=[1, 2])


# -- TensorRT-LLM -----------------------------------------------------------------------------------------------

TENSORRT_LLM = """\
initial_global_assignments:
  3: [0, 1, 2, 3, 0, 1]
  4: [3, 2, 1, 0, 3, 2]
num_slots: 6
layer_updates_per_iter: 0
"""


def test_tensorrt_llm_gets_the_models_own_layer_numbers() -> None:
    made = placement([[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 0, 1]], (1, 1, 3), layer_ids=(4, 3))
    assert tensorrt_llm.write(made, Target()).decode() == TENSORRT_LLM


def test_tensorrt_llm_gets_integers_and_only_the_keys_it_knows() -> None:
    yaml = pytest.importorskip("yaml")
    made = placement([[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 0, 1]], (1, 1, 3), layer_ids=(4, 60))
    document = yaml.safe_load(tensorrt_llm.write(made, Target()))
    assert document == {
        "initial_global_assignments": {4: [3, 2, 1, 0, 3, 2], 60: [0, 1, 2, 3, 0, 1]},
        "num_slots": 6,
        "layer_updates_per_iter": 0,
    }
    settings = yaml.safe_load("{" + tensorrt_llm.load_with(made, "it's.yaml").partition(" and ")[0] + "}")
    assert settings == {"moe_config": {"load_balancer": "it's.yaml"}, "moe_expert_parallel_size": 3}


def test_tensorrt_llm_is_read_as_its_own_tools_write_it(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    blocks = "layer_updates_per_iter: 0\nnum_slots: 4\ninitial_global_assignments:\n" + "".join(
        f"  {layer}:\n" + "".join(f"  - {expert}\n" for expert in row)
        for layer, row in ((4, (2, 0, 1, 0)), (3, (0, 1, 2, 1)))
    )
    back = tensorrt_llm.read_placement(file_of(tmp_path, blocks), shape=(1, 2, 1))
    assert (back.layer_ids, back.physical_to_logical.tolist()) == ((3, 4), [[0, 1, 2, 1], [2, 0, 1, 0]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "expected initial_global_assignments"),
        ("a: [", "not a YAML file"),
        ("[" * 5000, "not a YAML file"),
        ("a: !!int ''", "not a YAML file"),
        ("a: !!python/object/apply:os.system [echo bad]", "not a YAML file"),
        ("initial_global_assignments: [[0, 1]]", "expected initial_global_assignments"),
        ("initial_global_assignments: {'3': [0, 1]}", "expected initial_global_assignments"),
        ("initial_global_assignments: {3: 1}", "expected a list of experts for each layer"),
        ("initial_global_assignments: {3: &a [*a, *a]}", "found list in list 0"),
        ("initial_global_assignments: {3: [0, .nan]}", "found float in list 0"),
        ("initial_global_assignments: {-3: [0, 1]}", "layer_ids"),
        ("initial_global_assignments: {3: [0, 1]}\nnum_slots: 4", "num_slots: found 4, expected 2"),
    ],
)
def test_damaged_files_of_tensorrt_llm_are_refused_in_one_line(
    tmp_path: Path, content: str, said: str
) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(InvalidInput, match=said) as error:
        tensorrt_llm.read_placement(file_of(tmp_path, content), shape=(1, 2, 1))
    assert len(str(error.value).splitlines()) == 1


def test_lists_that_share_one_anchor_many_times_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("yaml")
    monkeypatch.setattr(_maps, "LARGEST", 10_000)
    row = "&r [" + "0, " * 100 + "0]"
    rows = "".join(f"  {layer}: *r\n" for layer in range(1, 100))
    path = file_of(tmp_path, f"initial_global_assignments:\n  0: {row}\n{rows}")
    with pytest.raises(InvalidInput, match="found 10100 slots, expected at most 10000"):
        tensorrt_llm.read_placement(path, shape=(1, 1, 1))


def test_writing_needs_no_yaml_and_reading_says_what_it_needs(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from placer.formats import Target, tensorrt_llm\n"
        "from placer.placement import Placement\n"
        "import numpy as np\n"
        "made = Placement(physical_to_logical=np.array([[0, 1]]), num_experts=2, shape=(1, 1, 2))\n"
        "open(sys.argv[1], 'wb').write(tensorrt_llm.write(made, Target()))\n"
        "try: tensorrt_llm.read_placement(sys.argv[1], shape=(1, 1, 2))\n"
        "except ValueError as error: print(error)\n"
    )
    path = tmp_path / "map.yaml"
    out = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    ).stdout
    assert "pip install 'placer[yaml]'" in out
    assert path.read_text().startswith("initial_global_assignments:\n  0: [0, 1]\n")


# -- vLLM Ascend ------------------------------------------------------------------------------------------------

VLLM_ASCEND = (
    '{"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": ['
    '{"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, '
    '{"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}'
)


def test_vllm_ascend_gets_devices_by_moe_layer(tmp_path: Path) -> None:
    made = placement([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]], (1, 1, 2), layer_ids=(3,), rule="spread")
    assert vllm_ascend.write(made, Target()).decode() == VLLM_ASCEND + "\n"
    back = vllm_ascend.read_placement(file_of(tmp_path, VLLM_ASCEND), shape=(1, 1, 2), layer_ids=[3])
    assert (back.digest, back.layer_ids) == (made.digest, (3,))
    option = vllm_ascend.load_with(made, "map.json").partition("--additional-config ")[2]
    assert json.loads(option.strip("'")) == {
        "eplb_config": {"expert_map_path": "map.json", "num_redundant_experts": 2}
    }


@pytest.mark.parametrize("stack", [vllm_ascend, omni_infer])
def test_an_expert_twice_on_a_rank_is_refused(stack: Any) -> None:
    made = placement([[0, 1, 2, 3, 1, 0], [0, 1, 2, 3, 1, 3]], (1, 1, 2), layer_ids=(3, 7))
    with pytest.raises(InvalidInput, match="layer 7, rank 1: holds expert 3 twice"):
        stack.write(made, TARGET)


def test_devices_of_vllm_ascend_are_read_by_their_numbers(tmp_path: Path) -> None:
    document = json.loads(VLLM_ASCEND)
    document["layer_list"][0]["device_list"].reverse()
    back = vllm_ascend.read_placement(file_of(tmp_path, json.dumps(document)), shape=(1, 1, 2))
    assert back.physical_to_logical.tolist() == [[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (VLLM_ASCEND, "[]", "expected layer_list"),
        (VLLM_ASCEND, '{"layer_list": [{"layer_id": 0}]}', "expected layer_list"),
        (VLLM_ASCEND, '{"layer_list": 5}', "expected layer_list"),
        (VLLM_ASCEND, '{"layer_list": []}', "expected a list of experts for each layer"),
        ('"layer_id": 0', '"layer_id": 1', "expected layer_list"),
        ('"layer_id": 0', '"layer_id": []', "expected layer_list"),
        ('"device_id": 1', '"device_id": 0', "expected layer_list"),
        ('"device_id": 1', '"device_id": Infinity', "expected layer_list"),
        ("[7, 2, 0, 3, 5]", "7", "expected layer_list"),
        (
            "[7, 2, 0, 3, 5]",
            "[7, 2, 0, 3]",
            "found 2 devices in layer 0, expected 2, with equally many experts",
        ),
        ("[7, 2, 0, 3, 5]", '"72035"', "found str in list 0"),
        ("[7, 2, 0, 3, 5]", "[7, 2, 0, 3, NaN]", "found float in list 0"),
        ('"moe_layer_count": 1', '"moe_layer_count": 58', "found 1 layers, expected 58"),
    ],
)
def test_damaged_files_of_vllm_ascend_are_refused_in_one_line(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in VLLM_ASCEND
    with pytest.raises(InvalidInput, match=said) as error:
        vllm_ascend.read_placement(file_of(tmp_path, VLLM_ASCEND.replace(old, new)), shape=(1, 1, 2))
    assert len(str(error.value).splitlines()) == 1


def test_a_map_for_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="found 2 devices in layer 0, expected 5"):
        vllm_ascend.read_placement(file_of(tmp_path, VLLM_ASCEND), shape=(1, 1, 5))


# -- vLLM's proposals -------------------------------------------------------------------------------------------


def config_of(text: str) -> Any:
    return json.loads(text.partition("--eplb-config ")[2].strip("'"))


def test_vllm_initial_expert_map_is_a_list_for_each_moe_layer() -> None:
    made = placement([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]], (1, 1, 3), layer_ids=(3, 4))
    content = vllm_initial_expert_map.write(made, Target())
    assert content == b"[[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]\n"
    assert config_of(vllm_initial_expert_map.load_with(made, "map.json")) == {
        "initial_expert_map_path": "map.json",
        "num_redundant_experts": 2,
    }


def test_vllm_initial_mapping_is_one_record() -> None:
    made = placement([[0, 1, 2, 0], [1, 2, 0, 1]], (1, 1, 2), layer_ids=(3, 4))
    assert vllm_initial_mapping.write(made, Target()).decode() == (
        '{"record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 1, "num_slots": 4, '
        '"initial_global_assignments": {"0": [0, 1, 2, 0], "1": [1, 2, 0, 1]}}\n'
    )
    assert config_of(vllm_initial_mapping.load_with(made, "map.jsonl"))["disable_online_rebalancing"] is True


def test_vllm_expert_to_rank_is_one_map_for_all_layers() -> None:
    made = placement([[0, 2, 3, 1], [2, 0, 1, 3]], (1, 1, 2))  # the order within a rank is no matter
    assert vllm_expert_to_rank.write(made, Target()) == b'{"expert_to_ep_rank": [0, 1, 0, 1]}\n'
    assert len(vllm_expert_to_rank.notes(made, Target())) == 1
    holed = placement([[0, 2, 1, -1]], (1, 1, 2))
    assert vllm_expert_to_rank.write(holed, Target()) == b'{"expert_to_ep_rank": [0, 1, 0]}\n'
    assert "ranks hold 1 to 2 experts" in vllm_expert_to_rank.notes(holed, Target())[1]


def test_vllm_expert_to_rank_refuses_copies_and_layers_that_differ() -> None:
    copied = placement([[0, 1], [1, 0]], (1, 1, 2), layer_ids=(3, 4))
    with pytest.raises(InvalidInput, match="layer 4: expert 0 is on rank 1, but on rank 0 in layer 3"):
        vllm_expert_to_rank.write(copied, Target())
    copied = placement([[0, 1, 2, 1]], (1, 1, 2), layer_ids=(3,))
    with pytest.raises(InvalidInput, match="layer 3: expert 1 has copies"):
        vllm_expert_to_rank.write(copied, Target())


# -- omni-infer -------------------------------------------------------------------------------------------------


def cube(made: Placement) -> Any:
    return np.load(io.BytesIO(omni_infer.write(made, Target())), allow_pickle=False)


def test_omni_infer_gets_a_cube_of_zeros_and_ones() -> None:
    found = cube(placement([[2, 0, 1, 2], [1, 0, 2, -1]], (1, 1, 2), layer_ids=(3, 4)))
    assert found.dtype == np.int32
    assert found.tolist() == [[[1, 0, 1], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]]


def test_omni_infer_gets_exactly_the_bytes_that_numpy_saves() -> None:
    content = omni_infer.write(placement([[1, 0]], (1, 1, 2)), Target())
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (2, 1, 2), }"
    head, body = content[:-16], content[-16:]
    assert head.startswith(b"\x93NUMPY\x01\x00")
    assert header in head
    assert body == bytes([0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])


def test_a_device_fuller_than_the_fullest_layers_average_is_refused() -> None:
    made = placement([[0, 1, 2, 3, -1, -1]], (1, 1, 2), layer_ids=(5,))
    with pytest.raises(InvalidInput, match="layer 5, rank 0: found 3 experts, expected at most 2"):
        omni_infer.write(made, Target())
    # Three on two devices make room for one on each.
    made = placement([[0, 1, 2, -1]], (1, 1, 2), layer_ids=(5,))
    with pytest.raises(InvalidInput, match="layer 5, rank 0: found 2 experts, expected at most 1"):
        omni_infer.write(made, Target())
    # A layer that is full elsewhere makes the room.
    assert cube(placement([[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 0, 1]], (1, 1, 2))).sum() == 10


@settings(max_examples=30, deadline=None)
@given(made=full())
def test_the_cube_says_what_each_rank_holds(made: Placement) -> None:
    found = cube(made)
    assert found.shape == (made.num_ranks, made.num_layers, made.num_experts)
    for layer, row in enumerate(made.physical_to_logical.reshape(made.num_layers, made.num_ranks, -1)):
        for rank, held in enumerate(row):
            assert np.flatnonzero(found[rank, layer]).tolist() == sorted(held.tolist())


# -- EPLB -------------------------------------------------------------------------------------------------------


def test_eplb_gets_the_three_tensors_of_its_readme(tmp_path: Path) -> None:
    made = placement([[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]], (1, 2, 4), layer_ids=(3,))
    path = written(eplb, made, tmp_path)
    with np.load(path, allow_pickle=False) as found:
        assert {found[key].dtype for key in found} == {np.dtype(np.int64)}
        assert found["phy2log"].tolist() == made.physical_to_logical.tolist()
        assert found["logcnt"].tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]]
        assert found["log2phy"].tolist() == [
            [
                [12, -1],
                [13, 15],
                [11, -1],
                [6, -1],
                [5, 7],
                [0, 2],
                [1, -1],
                [3, -1],
                [4, -1],
                [9, -1],
                [8, 10],
                [14, -1],
            ]
        ]
        assert found["layer_ids"].tolist() == [3]
    names = {"np": np}
    exec(eplb.load_with(made, str(path)), names)
    assert names["logcnt"].shape == (1, 12)  # type: ignore[attr-defined]


def test_eplb_reads_what_others_saved(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    np.savez_compressed(path, phy2log=np.array([[0, 1, 0, 2]], np.int32), other=np.array(["x"]))
    back = eplb.read_placement(path, shape=(1, 1, 2))
    assert (back.layer_ids, back.physical_to_logical.tolist()) == ((0,), [[0, 1, 0, 2]])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"other": np.arange(3)}, "expected an array phy2log of integers"),
        ({"phy2log": np.zeros((1, 2))}, "expected an array phy2log of integers"),
        ({"phy2log": np.zeros((0, 2), int)}, "expected an array phy2log of integers"),
        ({"phy2log": np.array([[0, np.nan]])}, "expected an array phy2log of integers"),
        ({"phy2log": np.array([[0, -2]])}, "found -2"),
        ({"phy2log": np.array([[0, 7]])}, "num_experts: found 8, expected 1 to 2"),
        ({"phy2log": np.array([[0, 1 << 62]])}, "integers below"),
        ({"phy2log": np.array([[0, 1]]), "layer_ids": np.array(0.5)}, "layer_ids"),
        ({"phy2log": np.array([[0, 1]]), "layer_ids": np.arange(9)}, "layer_ids: found 9 entries"),
    ],
)
def test_damaged_tensors_of_eplb_are_refused_in_one_line(
    tmp_path: Path, arrays: dict[str, Any], said: str
) -> None:
    path = tmp_path / "maps.npz"
    np.savez(path, **arrays)
    with pytest.raises(InvalidInput, match=said) as error:
        eplb.read_placement(path, shape=(1, 1, 2))
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_objects_bombs_and_torn_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.npz"
    np.savez(path, phy2log=np.array([[0, None]], object))
    with pytest.raises(InvalidInput, match="never unpickled"):
        eplb.read_placement(path, shape=(1, 1, 2))
    whole = eplb.write(placement([[0, 1]], (1, 1, 2)), Target())
    for content in (b"", b"PK", whole[:-30], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InvalidInput):
            eplb.read_placement(path, shape=(1, 1, 2))
    monkeypatch.setattr(eplb, "LARGEST", 1 << 20)
    np.savez_compressed(path, phy2log=np.zeros((1, 1 << 20), np.int8))
    assert path.stat().st_size < 1 << 13
    with pytest.raises(
        InvalidInput, match="phy2log: found an array of 1048704 bytes, expected at most 1048576"
    ):
        eplb.read_placement(path, shape=(1, 1, 2))
    with pytest.raises(InvalidInput, match="cannot be read"):
        eplb.read_placement(tmp_path, shape=(1, 1, 2))


# -- the dispatch table -----------------------------------------------------------------------------------------


def test_the_dispatch_table_is_whole_and_says_what_it_is_of(tmp_path: Path) -> None:
    made = placement(
        [[0, 1, -1, 0, 2, -1]],
        (1, 2, 1),
        layer_ids=(4,),
        rule="table",
        table=np.array([[[0, -1, -1], [3, -1, -1]]]),
    )
    with np.load(written(dispatch_table, made, tmp_path), allow_pickle=False) as found:
        assert {key: found[key].tolist() for key in found} == {
            "table": [[[0, 1, 4], [3, 1, 4]]],
            "physical_to_logical": [[0, 1, -1, 0, 2, -1]],
            "shape": [1, 2, 1],
            "slots_per_rank": 3,
            "layer_ids": [4],
        }
        assert found["table"].dtype == found["physical_to_logical"].dtype == np.int32


def test_placements_without_a_whole_table_have_none_to_write() -> None:
    made = placement([[0, 1, 0, 2]], (1, 2, 1))
    with pytest.raises(InvalidInput, match="the placement holds none"):
        dispatch_table.write(made, Target())
    with pytest.raises(InvalidInput, match="no slot for expert 0, which has copies"):
        dispatch_table.write(replace(made, table=np.array([[[0, -1, -1], [-1, -1, -1]]])), Target())


@settings(max_examples=40, deadline=None)
@given(made=full(table=True))
def test_a_dispatch_table_reads_back_as_the_same_placement(folder: Path, made: Placement) -> None:
    back = dispatch_table.read_placement(written(dispatch_table, made, folder))
    assert (back.digest, back.layer_ids, back.rule) == (made.digest, made.layer_ids, "table")
    assert np.array_equal(back.table, made.table)


def test_one_look_up_of_the_file_gives_the_slots_of_take_table(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    held = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [3, 1, 0, 2]]).reshape(1, 16)
    slots = np.stack([rng.choice(np.flatnonzero(held[0] == expert), 2) for expert in range(4)], axis=1)
    made = placement(held, (1, 2, 2), rule="table", table=slots[None])
    path = written(dispatch_table, made, tmp_path)
    back = dispatch_table.read_placement(path)
    topk, table = rng.permuted(np.tile(np.arange(4), (50, 1)), axis=1)[:, :2], complete_table(back)[0]
    for rank in range(4):
        expected = take_table(topk, np.full(50, rank), table, server_ranks=2)
        assert np.array_equal(held[0][expected], topk)
        names = {"np": np, "layer": 0, "rank": rank, "topk_idx": topk}
        exec(dispatch_table.load_with(made, str(path)), names)
        assert np.array_equal(names["slots"], expected)  # type: ignore[arg-type]
        moved = torch.tensor(topk), torch.full((50,), rank), torch.tensor(table)
        assert np.array_equal(take_table(*moved, server_ranks=2).numpy(), expected)
        row = torch.from_numpy(np.load(path)["table"])[0, rank // 2]
        assert np.array_equal(row[torch.tensor(topk)].numpy(), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": None}, "no array table"),
        ({"shape": None}, "no array shape"),
        ({"table": np.zeros((1, 2))}, "table: found float64"),
        ({"table": np.zeros((1, 2, 3))}, "table: found float64"),
        (
            {"table": np.array([[[0, 1, 3], [2, 1, 2]]])},
            r"table\[0\]\[1\]\[2\]: slot 2 holds expert 0, expected 2",
        ),
        ({"table": np.array([[[0, 1, 3], [2, 1, 9]]])}, "found a slot outside"),
        ({"table": np.zeros((1, 2, 0), int)}, "num_experts"),
        ({"table": np.zeros((1, 3, 3), int)}, "dispatch table: found shape"),
        ({"shape": np.array(3)}, "shape: found"),
        ({"shape": np.array([1, 3, 1])}, "expected a multiple of the 3 ranks"),
        ({"slots_per_rank": np.array(3)}, "slots_per_rank: found 3, expected 2"),
        ({"slots_per_rank": np.array("2")}, "slots_per_rank: found 2, expected 2"),
        ({"slots_per_rank": np.array([2])}, "slots_per_rank"),
        ({"physical_to_logical": np.array([[0, 1, 0, np.nan]])}, "physical_to_logical"),
        ({"layer_ids": np.array(["a"])}, "layer_ids"),
    ],
)
def test_damaged_dispatch_tables_are_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    made = placement([[0, 1, 0, 2]], (1, 2, 1), rule="table", table=np.array([[[0, 1, 3], [2, 1, 3]]]))
    with np.load(written(dispatch_table, made, tmp_path)) as found:
        arrays = {**found, **change}
    path = tmp_path / "table.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(InvalidInput, match=said) as error:
        dispatch_table.read_placement(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
