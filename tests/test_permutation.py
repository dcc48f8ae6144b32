"""Checkpoints in the order of a placement: the same model, and the way back."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_bytes import safetensors
from terminal import Outcome, placer

from placer import Placement
from placer.checkpoint import Checkpoint
from placer.errors import InvalidInput
from placer.families import FAMILIES
from placer.permutation import Permutation
from placer.permuted import RECORD, permute

E = 8
ORDER = [3, 2, 0, 1, 6, 7, 5, 4]  # keeps four groups of two whole
OTHER = [5, 4, 7, 6, 1, 0, 2, 3]
INDEX = "model.safetensors.index.json"


def placement(*rows: list[int], layers: tuple[int, ...] = (), shape: Any = (1, 1, 4)) -> Placement:
    num_experts = max(map(max, rows)) + 1
    return Placement(
        physical_to_logical=np.array(rows), num_experts=num_experts, shape=shape, layer_ids=layers
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- checkpoints spelled out --------------------------------------------------------------------------------


def mixtral(layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    at = f"model.layers.{layer}.block_sparse_moe"
    names = {
        f"{at}.experts.{e}.{w}.weight": ("BF16", (4, 6) if w == "w2" else (6, 4))
        for e in range(E)
        for w in ("w1", "w2", "w3")
    }
    return {**names, f"{at}.gate.weight": ("BF16", (E, 4))}


def deepseek(layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    at, names = f"model.layers.{layer}.mlp", {}
    if layer == 0:
        return {f"{at}.{x}_proj.weight": ("F8_E4M3", (6, 4)) for x in ("gate", "up", "down")}
    for of in ("shared_experts", *(f"experts.{e}" for e in range(E))):
        for x in ("gate", "up", "down"):
            names[f"{at}.{of}.{x}_proj.weight"] = ("F8_E4M3", (6, 4))
            names[f"{at}.{of}.{x}_proj.weight_scale_inv"] = ("F32", (1, 1))
    return {
        **names,
        f"{at}.gate.weight": ("BF16", (E, 4)),
        f"{at}.gate.e_score_correction_bias": ("F32", (E,)),
    }


def gpt_oss(layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    at, names = f"model.layers.{layer}.mlp", {}
    for x in ("gate_up_proj", "down_proj"):
        names[f"{at}.experts.{x}_blocks"] = ("U8", (E, 6, 2, 16))
        names[f"{at}.experts.{x}_scales"] = ("U8", (E, 6, 2))
        names[f"{at}.experts.{x}_bias"] = ("BF16", (E, 6))
    return {**names, f"{at}.router.weight": ("BF16", (E, 4)), f"{at}.router.bias": ("BF16", (E,))}


LITERAL: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, Any], tuple[int, ...]]] = {
    "mixtral": (mixtral, {"num_local_experts": E}, (0, 1, 2)),
    "deepseek_v3": (deepseek, {"n_routed_experts": E, "n_group": 4, "topk_group": 2}, (1, 2)),
    "gpt_oss": (gpt_oss, {"num_local_experts": E}, (0, 1, 2)),
}
SIZE = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def write(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int = 3) -> Path:
    """A checkpoint whose tensors are dealt over shards like cards, so that experts are apart from their routers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes(b"{}\r\n\xff")
    (folder / "extra").mkdir()
    (folder / "extra" / "README").write_text("hello")
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in names}, {"format": "pt"}))
        weight_map |= dict.fromkeys(names, file)
    size = sum(len(content) for _, _, content in tensors.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    )
    return folder


def literal(folder: Path, model: str = "mixtral", **config: Any) -> tuple[Path, Tensors]:
    make, more, _ = LITERAL[model]
    rng = np.random.default_rng(0)
    names = {"model.embed_tokens.weight": ("BF16", (16, 4)), "lm_head.weight": ("BF16", (16, 4))}
    for layer in range(3):
        names |= {f"model.layers.{layer}.self_attn.q_proj.weight": ("BF16", (4, 4)), **make(layer)}
    tensors = {
        name: (dtype, shape, rng.bytes(SIZE[dtype] * int(np.prod(shape))))
        for name, (dtype, shape) in names.items()
    }
    return write(folder, tensors, {"model_type": model, **more, **config}), tensors


def read(folder: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint, by the plainest code."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = content[start + begin : start + end]
    return found


def expected(name: str, tensors: Tensors, orders: dict[int, list[int]]) -> bytes:
    """What a tensor must hold afterwards, from its name alone."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    order = orders.get(int(layer[1])) if layer else None
    if order is None or ".shared_" in name or ".self_attn." in name:
        return tensors[name][2]
    own = re.search(r"\.experts\.(\d+)\.", name)
    if own:
        return tensors[name.replace(own[0], f".experts.{order[int(own[1])]}.")][2]
    content = tensors[name][2]
    row = len(content) // E
    return b"".join(content[old * row : (old + 1) * row] for old in order)


@pytest.mark.parametrize("model", LITERAL)
def test_experts_scales_and_router_rows_move_together(model: str, tmp_path: Path) -> None:
    folder, tensors = literal(tmp_path / "in", model)
    layers = LITERAL[model][2]
    orders = dict(zip(layers, (ORDER, OTHER, ORDER), strict=False))
    before = tree(folder)
    done = permute(folder, placement(*orders.values(), layers=layers), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name in tensors:
        assert found[name] == expected(name, tensors, orders), name
    after = tree(tmp_path / "out")
    assert tree(folder) == before
    assert after.keys() == before.keys() | {RECORD}
    assert all(after[name] == before[name] for name in before if not name.endswith(".safetensors"))
    assert done.moved == len(layers) * E
    assert done.left == ()

    permute(tmp_path / "out", None, tmp_path / "back", inverse=True)
    assert tree(tmp_path / "back") == before


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    folder, tensors = literal(tmp_path / "in")
    for path in [folder / INDEX, *folder.glob("*.safetensors")]:
        path.unlink()
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    permute(folder, placement(ORDER), tmp_path / "out")
    assert read(tmp_path / "out") == {name: expected(name, tensors, {0: ORDER}) for name in tensors}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.permutations(range(E)), min_size=3, max_size=3), st.sets(st.integers(0, 2), min_size=1))
def test_any_permutation_of_any_layers_is_undone(
    tmp_path_factory: pytest.TempPathFactory, orders: list[list[int]], layers: set[int]
) -> None:
    tmp_path = tmp_path_factory.mktemp("c")
    folder, tensors = literal(tmp_path / "in", "gpt_oss")
    chosen = tuple(sorted(layers, reverse=True))
    made = placement(*(orders[layer] for layer in chosen), layers=chosen)
    done = permute(folder, made, tmp_path / "out")
    assert read(tmp_path / "out") == {
        name: expected(name, tensors, {layer: orders[layer] for layer in chosen}) for name in tensors
    }
    assert done.left == tuple(sorted({0, 1, 2} - layers))
    assert permute(tmp_path / "out", None, tmp_path / "back", inverse=True).restored
    assert tree(tmp_path / "back") == tree(folder)


@pytest.mark.parametrize("model", LITERAL)
def test_two_permutations_are_undone_one_by_one_or_both_at_once(model: str, tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in", model)
    one = placement(ORDER, layers=(1,))
    two = placement(OTHER, ORDER, layers=(2, 1))
    permute(folder, one, tmp_path / "1")
    permute(tmp_path / "1", two, tmp_path / "2")
    assert permute(tmp_path / "2", None, tmp_path / "0", inverse=True).restored
    assert tree(tmp_path / "0") == tree(folder)

    done = permute(tmp_path / "2", two, tmp_path / "1again", inverse=True)
    assert done.restored is None
    assert done.notes[1:] == ()  # beside that of layers left alone
    assert read(tmp_path / "1again") == read(tmp_path / "1")
    done = permute(tmp_path / "1again", one, tmp_path / "0again", inverse=True)
    assert done.restored
    assert not any("applied last" in note for note in done.notes)  # for all is as it was
    assert tree(tmp_path / "0again") == tree(folder)


def test_only_the_placement_that_was_applied_last_is_undone(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    one, two = placement(ORDER), placement(OTHER)
    permute(folder, one, tmp_path / "1")
    permute(tmp_path / "1", two, tmp_path / "2")
    outcome = placer("permute", tmp_path / "2", saved(tmp_path, one), "--inverse", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for word in (RECORD, one.digest[:12], two.digest[:12], "--inverse alone undoes everything"):
        assert word in outcome.err
    assert not (tmp_path / "out").exists()
    assert permute(tmp_path / "2", one, tmp_path / "3").notes == permute(folder, one, tmp_path / "4").notes


def test_what_was_applied_before_an_undone_placement_is_not_known(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    orders = [placement(ORDER), placement(OTHER), placement(OTHER[::-1])]
    for number, made in enumerate(orders):
        permute(folder, made, tmp_path / f"{number}")
        folder = tmp_path / f"{number}"
    permute(folder, orders[2], tmp_path / "undone", inverse=True)
    assert read(tmp_path / "undone") == read(tmp_path / "1")
    outcome = placer(
        "permute", tmp_path / "undone", saved(tmp_path, orders[0]), "--inverse", "-o", tmp_path / "odd"
    )
    assert outcome.code == 0
    assert f"note: {RECORD} does not say which placement was applied last" in outcome.err


def test_a_placement_is_undone_without_a_record(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    permute(folder, placement(ORDER), tmp_path / "out")
    (tmp_path / "out" / RECORD).unlink()
    done = permute(tmp_path / "out", placement(ORDER), tmp_path / "back", inverse=True)
    assert tree(tmp_path / "back") == tree(folder)
    assert done.restored is None  # nothing says what it was at first


def test_the_way_back_tells_weights_that_changed_meanwhile(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    permute(folder, placement(ORDER), tmp_path / "out")
    shard = tmp_path / "out" / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = permute(tmp_path / "out", None, tmp_path / "back", inverse=True)
    assert done.restored is False
    assert any("changed since" in note for note in done.notes)


def test_memory_holds_no_whole_tensor(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    row = 1 << 24
    names = {
        "model.layers.0.mlp.router.weight": [E, 1],
        "model.layers.0.mlp.experts.down_proj": [E, row],
        "lm_head.weight": [row],
    }
    header, at = {}, 0
    for name, shape in names.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + int(np.prod(shape))]}
        at += int(np.prod(shape))
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt_oss"}')
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + at)  # zeros that take no room on the disk
    tracemalloc.start()
    try:
        permute(folder, placement(ORDER), tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26  # of 144 MiB
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == path.stat().st_size


# -- the command --------------------------------------------------------------------------------------------


def saved(tmp_path: Path, made: Placement) -> Path:
    made.save(tmp_path / "placement.json")
    return tmp_path / "placement.json"


def test_the_command_says_what_it_did_and_undoes_it(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in", "deepseek_v3")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"as it was")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "etag").write_text("1")
    file = saved(tmp_path, placement(ORDER, layers=(1,)))
    outcome = placer("permute", folder, file, "-o", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["schema"] == "placer/permute/1"
    assert document["layer_ids"] == [1]
    assert document["layers_left"] == [2]
    assert document["experts_moved"] == E
    assert document["model_type"] == "deepseek_v3"
    assert outcome.err.splitlines() == [
        "note: not in the placement, so left alone: layer 2",
        "note: original/model.safetensors is no shard of the checkpoint and was copied as it is",
        "note: .cache was left out",
    ]
    assert not (tmp_path / "out" / ".cache").exists()
    assert (tmp_path / "out" / "original" / "model.safetensors").read_bytes() == b"as it was"

    outcome = placer("permute", tmp_path / "out", "--inverse", "-o", tmp_path / "back")
    assert outcome.code == 0
    assert "the first weights again, byte for byte" in outcome.out
    shutil.rmtree(folder / ".cache")
    assert tree(tmp_path / "back") == tree(folder)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    (tmp_path / "out").mkdir()
    before = os.umask(0o027)
    try:
        assert placer("permute", folder, saved(tmp_path, placement(ORDER)), "-o", tmp_path / "out").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    plain, tensors = literal(tmp_path / "plain")
    blobs = tmp_path / "models--a--b" / "blobs"
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in plain.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    permute(folder, placement(ORDER), tmp_path / "out")
    assert read(tmp_path / "out") == {name: expected(name, tensors, {0: ORDER}) for name in tensors}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def refused(tmp_path: Path, outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "placement.json", "secret", "full"}


BAD_PLACEMENTS: dict[str, tuple[Placement, str, list[str]]] = {
    "copies": (
        Placement(physical_to_logical=np.array([[*range(E), *range(E)]]), num_experts=E, shape=(1, 1, 4)),
        "mixtral",
        ["layer 0: expert 0 is in 2 slots", "one slot an expert"],
    ),
    "copies in one layer": (
        Placement(
            physical_to_logical=np.array([[0, 1, -1, 2, 3, -1], [0, 1, 2, 3, 0, -1]]),
            num_experts=4,
            shape=(1, 1, 2),
            layer_ids=(4, 6),
        ),
        "mixtral",
        ["layer 4: rank 0 has an empty slot"],
    ),
    "another number of experts": (placement([1, 0, 3, 2]), "mixtral", ["a model of 8 experts", "is of 4"]),
    "a layer that the model lacks": (
        placement(ORDER, ORDER, layers=(1, 7)),
        "mixtral",
        ["layer 7 has no experts", "layers 0..2"],
    ),
    "a dense layer": (
        placement(ORDER, ORDER, layers=(0, 1)),
        "deepseek_v3",
        ["layer 0 has no experts", "layers 1..2"],
    ),
    "torn groups": (
        placement(ORDER, [0, 1, 2, 4, 3, 5, 6, 7], layers=(1, 2)),
        "deepseek_v3",
        ["layer 2: group 1 would be of experts from groups 1, 2", "4 groups"],
    ),
}


@pytest.mark.parametrize("case", BAD_PLACEMENTS)
def test_placements_that_no_checkpoint_can_have_are_refused(case: str, tmp_path: Path) -> None:
    made, model, words = BAD_PLACEMENTS[case]
    folder, _ = literal(tmp_path / "in", model)
    before = tree(folder)
    outcome = placer("permute", folder, saved(tmp_path, made), "-o", tmp_path / "out")
    refused(tmp_path, outcome, *words)
    assert tree(folder) == before


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return apply


def remap(tensor: str, shard: str) -> Callable[[Path], None]:
    return edit(INDEX, lambda index: index["weight_map"].update({tensor: shard}))


def link(name: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder.parent / "secret").write_text("secret")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def tensors_changed(change: Callable[[Tensors], object], model: str = "mixtral") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        shutil.rmtree(folder)
        _, tensors = literal(folder, model)
        shutil.rmtree(folder)
        change(tensors)
        write(folder, tensors, config)

    return apply


def renamed(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def truncated(folder: Path) -> None:
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def twice(folder: Path) -> None:
    """A shard that holds a tensor of another one as well."""
    name, content = "lm_head.weight", bytes(2)
    (folder / "more.safetensors").write_bytes(
        safetensors({name: ("BF16", (1,), content), "x": ("U8", (0,), b"")})
    )
    remap("x", "more.safetensors")(folder)


def twice_in_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",'))


AT = "model.layers.1.block_sparse_moe"
HOSTILE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "an unknown model": (edit("config.json", lambda c: c.update(model_type="llama")), ["'llama'", "known"]),
    "no model": (edit("config.json", lambda c: c.pop("model_type")), ["model_type: found None"]),
    "a model that is no text": (edit("config.json", lambda c: c.update(model_type=[1])), ["found [1]"]),
    "another number of experts": (
        edit("config.json", lambda c: c.update(num_local_experts=16)),
        ["a model of 16 experts, the permutation is of 8"],
    ),
    "experts that are no number": (
        edit("config.json", lambda c: c.update(num_local_experts="8")),
        ["num_local_experts: found '8'"],
    ),
    "groups that are no number": (edit("config.json", lambda c: c.update(n_group=0)), ["n_group: found 0"]),
    "groups that do not divide": (edit("config.json", lambda c: c.update(n_group=3)), ["3 gate groups"]),
    "experts named in the config": (
        edit("config.json", lambda c: c.update(quantization_config={"ignore": [f"{AT}.experts.3.w1"]})),
        ["quantization_config", f"{AT}.experts.3.w1"],
    ),
    "some experts meant in the config": (
        edit("config.json", lambda c: c.update(quantization_config={"ignore": [r"re:.*experts\.3\..*"]})),
        ["quantization_config", "experts", "some experts of a layer"],
    ),
    "no regular expression in the config": (
        edit("config.json", lambda c: c.update(quantization_config={"ignore": ["re:.*experts(.*"]})),
        ["quantization_config", "'re:.*experts(.*'", "no regular expression"],
    ),
    "no weights": (lambda f: (f / INDEX).unlink(), ["found neither", "model.safetensors"]),
    "an index that is no JSON": (lambda f: (f / INDEX).write_bytes(b"\xff"), [INDEX, "not JSON"]),
    "a nested index": (lambda f: (f / INDEX).write_text('{"a":' * 100_000), ["nested too deeply"]),
    "an index without a map": (edit(INDEX, lambda i: i.pop("weight_map")), ["weight_map: found None"]),
    "an index of numbers": (remap("lm_head.weight", 1), ["weight_map: found"]),  # type: ignore[arg-type]
    "a missing shard": (
        remap("lm_head.weight", "model-00009.safetensors"),
        ["model-00009.safetensors", "missing"],
    ),
    "a path out of the folder": (remap("lm_head.weight", "../secret"), ["'../secret'", "file in the folder"]),
    "an absolute path": (remap("lm_head.weight", "/etc/passwd"), ["'/etc/passwd'", "file in the folder"]),
    "the folder above": (remap("lm_head.weight", ".."), ["'..'", "file in the folder"]),
    "no name": (remap("lm_head.weight", ""), ["''", "file in the folder"]),
    "a folder within": (remap("lm_head.weight", "extra"), ["'extra', which is missing"]),
    "a file that is no shard": (remap("lm_head.weight", "tokenizer.json"), ["tokenizer.json", "a header of"]),
    "the wrong shard": (
        remap("lm_head.weight", "model-00001-of-00003.safetensors"),
        ["'lm_head.weight' is not in model-00001"],
    ),
    "a tensor that no shard has": (
        remap("ghost", "model-00001-of-00003.safetensors"),
        ["'ghost' is not in model-00001"],
    ),
    "a tensor that the index lacks": (
        edit(INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        ["'lm_head.weight' is missing in", INDEX],
    ),
    "a tensor in two shards": (twice, ["'lm_head.weight' is in", "as well"]),
    "a tensor twice in the index": (twice_in_index, ["'lm_head.weight' stands twice"]),
    "an index and a single file": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors({})),
        ["expected one of the two"],
    ),
    "a shard cut off": (truncated, ["model-00003-of-00003.safetensors", "cut off"]),
    "an absurd header": (
        lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(b"\xff" * 20),
        ["model-00003", "a header of 18,446,744,073,709,551,615 bytes"],
    ),
    "a link out of the folder": (link("notes.txt", "../secret"), ["notes.txt", "leads out of"]),
    "a shard that is a link": (
        link("model-00002-of-00003.safetensors", "/etc/passwd"),
        ["model-00002", "leads out of"],
    ),
    "a link to nothing": (link("notes.txt", "nothing"), ["notes.txt", "leads nowhere"]),
    "a link in a circle": (link("notes.txt", "notes.txt"), ["notes.txt", "leads nowhere"]),
    "a link to a folder": (link("more", "extra"), ["more: a link to a folder"]),
    "a pipe": (lambda f: os.mkfifo(f / "pipe"), ["pipe: not a regular file"]),
    "a router of another size": (
        tensors_changed(lambda t: t.update({f"{AT}.gate.weight": ("BF16", (7, 4), bytes(56))})),
        [f"{AT}.gate.weight: found shape [7, 4]", "8 experts"],
    ),
    "a router with axes exchanged": (
        tensors_changed(lambda t: t.update({f"{AT}.gate.weight": ("BF16", (4, 8), bytes(64))})),
        [f"{AT}.gate.weight: found shape [4, 8]"],
    ),
    "no router": (
        tensors_changed(lambda t: t.pop(f"{AT}.gate.weight")),
        ["layer 1", "no router"],
    ),
    "a router without experts": (
        tensors_changed(lambda t: [t.pop(name) for name in list(t) if f"{AT}.experts" in name]),
        ["layer 1", "no experts"],
    ),
    "a missing expert": (
        tensors_changed(lambda t: [t.pop(name) for name in list(t) if f"{AT}.experts.5." in name]),
        [f"{AT}.experts.5: missing"],
    ),
    "an expert too many": (
        tensors_changed(lambda t: t.update({f"{AT}.experts.8.w1.weight": ("U8", (1,), b"1")})),
        [f"{AT}.experts.8: one too many"],
    ),
    "an expert without a tensor": (
        tensors_changed(lambda t: t.pop(f"{AT}.experts.5.w2.weight")),
        [f"{AT}.experts.0.w2.weight: expert 5 has no such tensor"],
    ),
    "an expert of another type": (
        tensors_changed(lambda t: t.update({f"{AT}.experts.5.w2.weight": ("U8", (8, 6), bytes(48))})),
        [f"{AT}.experts.5.w2.weight: found U8 [8, 6]", "BF16 [4, 6]"],
    ),
    "an unknown tensor in the router": (
        tensors_changed(lambda t: t.update({f"{AT}.gate.tid2eid": ("U8", (1,), b"1")})),
        [f"{AT}.gate.tid2eid", "unknown"],
    ),
    "an unknown tensor among the experts": (
        tensors_changed(lambda t: t.update({f"{AT}.experts.gate_up_proj.absmax": ("U8", (8,), bytes(8))})),
        [f"{AT}.experts.gate_up_proj.absmax", "unknown"],
    ),
    "shared experts in a model without": (
        tensors_changed(lambda t: t.update({f"{AT}.shared_expert.w1.weight": ("U8", (8,), bytes(8))})),
        [f"{AT}.shared_expert.w1.weight", "unknown"],
    ),
    "experts elsewhere": (
        tensors_changed(renamed("lm_head.weight", "mtp.layers.0.mlp.experts.0.w1.weight")),
        ["mtp.layers.0.mlp.experts.0.w1.weight", "unknown"],
    ),
    "two sets of experts in a layer": (
        tensors_changed(renamed("lm_head.weight", "layers.1.mlp.gate.weight")),
        ["layer 1 has experts in", "layers.1.mlp"],
    ),
    "a record that is none": (lambda f: (f / RECORD).write_text("{}"), [RECORD, "schema: found None"]),
    "a record of text": (
        lambda f: (f / RECORD).write_text(
            '{"schema": "placer/permutation/1", "weights": "", "layer_ids": ["a"]}'
        ),
        [RECORD],
    ),
    "a record of nothing": (
        lambda f: (f / RECORD).write_text(
            '{"schema": "placer/permutation/1", "weights": "", "layer_ids": [], "old_expert": []}'
        ),
        [RECORD, "old_expert: found []"],
    ),
    "a record of a placement that is no text": (
        lambda f: (f / RECORD).write_text(
            '{"schema": "placer/permutation/1", "weights": "", "layer_ids": [], "placement": 1}'
        ),
        [RECORD, "placement: found 1"],
    ),
    "a record of another model": (
        lambda f: (f / RECORD).write_text(
            '{"schema": "placer/permutation/1", "weights": "", "layer_ids": [0], "old_expert": [[1, 0]]}'
        ),
        [RECORD, "a model of 8 experts"],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_checkpoints_that_cannot_be_trusted_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    folder, _ = literal(tmp_path / "in")
    change(folder)
    file = saved(tmp_path, placement(ORDER, ORDER, ORDER))
    refused(tmp_path, placer("permute", folder, file, "-o", tmp_path / "out"), *words)


SOME = (
    r".*experts\.3\..*",
    r".*experts.[0-3].*",
    r".*experts\.(0|5)\.w1",
    r".*experts\.3$",
    r"model\.layers\.1\..*experts\.[1-7]\..*",
    r".*experts.3.*|.*w1.*",
    r".*\.3\.w2\.weight",
    r"language_model.*experts\.3\..*",
    r"experts\.3\..*",
)
ALL = (
    r".*experts.*",
    r".*experts\.\d+\..*",
    r".*experts\.[0-9]+\.w[13]",
    r".*experts.[0-7].*",
    r"model\.layers\.1\..*",
    r".*w2$",
    r".*shared_experts.0.*",
    r"language_model.*experts\.[0-9]+\..*",
    "lm_head",
)


@pytest.mark.parametrize(("patterns", "fine"), [(SOME, False), (ALL, True)])
def test_settings_of_quantisation_must_be_for_all_experts_of_a_layer(
    patterns: tuple[str, ...], fine: bool, tmp_path: Path
) -> None:
    folder, _ = literal(tmp_path / "in")
    for pattern in patterns:
        quantizations: list[dict[str, Any]] = [
            {"ignore": ["lm_head", f"re:{pattern}"]},
            {"config_groups": {"group_0": {"targets": [f"re:{pattern}"], "weights": {"num_bits": 4}}}},
            {"dynamic": {f"-:{pattern}": {}}},
        ]
        for quantization in quantizations:
            edit("config.json", lambda c, q=quantization: c.update(quantization_config=q))(folder)  # type: ignore[misc]
            if fine:
                Checkpoint.open(folder)
            else:
                with pytest.raises(InvalidInput, match="some experts of a layer"):
                    Checkpoint.open(folder)


def test_settings_of_quantisation_for_one_of_fused_experts_are_refused(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in", "gpt_oss")
    edit("config.json", lambda c: c.update(quantization_config={"ignore": [r"re:.*experts\.\d+\..*"]}))(
        folder
    )
    Checkpoint.open(folder)
    edit("config.json", lambda c: c.update(quantization_config={"ignore": [r"re:.*experts\.3\..*"]}))(folder)
    with pytest.raises(InvalidInput, match="some experts of a layer"):
        Checkpoint.open(folder)


def test_layers_that_stay_may_be_odd(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    name = f"{AT}.gate.weight"
    tensors_changed(lambda t: t.update({name: ("F4", (7, 2), bytes(7)), f"{AT}.gate.x": ("U8", (), b"1")}))(
        folder
    )
    with pytest.raises(InvalidInput, match="unknown"):
        permute(folder, placement(ORDER), tmp_path / "out")
    tensors_changed(lambda t: t.update({name: ("F4", (3, 2), bytes(3))}))(folder)
    permute(folder, placement(ORDER), tmp_path / "out")
    assert read(tmp_path / "out")[name] == bytes(3)
    shutil.rmtree(tmp_path / "out")
    half = b"\x12\x34\x56\x78\x9a\xbc"  # rows of three half bytes
    tensors_changed(lambda t: t.update({name: ("F4", (4, 3), half)}))(folder)
    permute(folder, placement(ORDER), tmp_path / "out")
    assert read(tmp_path / "out")[name] == half


def test_rows_that_end_inside_a_byte_are_refused(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    tensors_changed(lambda t: t.update({f"{AT}.gate.weight": ("F4", (8, 1), bytes(4))}))(folder)
    with pytest.raises(InvalidInput, match="rows of F4 end inside a byte"):
        permute(folder, placement(ORDER, layers=(1,)), tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("full", "full: is there already"),
        ("placement.json", "placement.json: is there already"),
        ("in", "in: is there already"),
        ("in/new", "lies in"),
        ("none/new", "none/new: cannot be written: No such file"),
        ("placement.json/new", "cannot be written: Not a directory"),
    ],
)
def test_outputs_that_are_in_the_way_are_refused(output: str, words: str, tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = tree(tmp_path)
    file = saved(tmp_path, placement(ORDER))
    refused(tmp_path, placer("permute", folder, file, "-o", tmp_path / output), words)
    assert {name: data for name, data in tree(tmp_path).items() if name != "placement.json"} == before


def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = literal(tmp_path / "in")
    (tmp_path / "full").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "full")
    monkeypatch.setattr("tempfile.mkdtemp", lambda **where: pytest.fail("something was written"))
    file = saved(tmp_path, placement(ORDER))
    refused(
        tmp_path, placer("permute", folder, file, "-o", tmp_path / "full"), "full: a mount point", "in it"
    )


def test_what_is_missing_on_the_command_line_is_said(tmp_path: Path) -> None:
    folder, _ = literal(tmp_path / "in")
    refused(tmp_path, placer("permute", folder, "-o", tmp_path / "out"), "missing PLACEMENT")
    refused(tmp_path, placer("permute", folder, "--inverse", "-o", tmp_path / "out"), RECORD)
    file = saved(tmp_path, placement(ORDER))
    refused(tmp_path, placer("permute", tmp_path / "none", file, "-o", tmp_path / "out"), "no such folder")
    refused(tmp_path, placer("permute", file, file, "-o", tmp_path / "out"), "not a folder")
    with pytest.raises(InvalidInput, match="no placement"):
        permute(folder, None, tmp_path / "out")


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = literal(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    file = saved(tmp_path, placement(ORDER))
    refused(tmp_path, placer("permute", folder, file, "-o", tmp_path / "out"), "the disk has 1 kB left")


@pytest.mark.parametrize("failing", ["rewrite", "shutil.copyfile"])
def test_a_disk_that_fills_up_half_way_leaves_nothing(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = literal(tmp_path / "in")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"placer.permuted.{failing}", full)
    file = saved(tmp_path, placement(ORDER))
    refused(
        tmp_path, placer("permute", folder, file, "-o", tmp_path / "out"), "out", "No space left on device"
    )


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = literal(tmp_path / "in")

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("placer.permuted.rewrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        permute(folder, placement(ORDER), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def signalled(tmp_path: Path, number: signal.Signals, first: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which gets a signal twice before it writes a shard."""
    literal(tmp_path / "in")
    file = saved(tmp_path, placement(ORDER))
    script = f"""
import os, shutil, signal, sys
from placer import permuted
from placer.cli import main
{first}
write, remove = permuted.rewrite, shutil.rmtree
def rewrite(*arguments):
    os.kill(os.getpid(), {number.value})
    write(*arguments)
def rmtree(*arguments, **options):
    os.kill(os.getpid(), {number.value})
    remove(*arguments, **options)
permuted.rewrite, shutil.rmtree = rewrite, rmtree
main(sys.argv[1:])
"""
    arguments = [tmp_path / "in", file, "-o", tmp_path / "out"]
    return subprocess.run(
        [sys.executable, "-c", script, "permute", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_told_to_end_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    done = signalled(tmp_path, number)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "placement.json"}


def test_a_process_that_outlives_its_terminal_goes_on(tmp_path: Path) -> None:
    done = signalled(tmp_path, signal.SIGHUP, "signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / RECORD).is_file()


def test_signals_are_handled_as_before_afterwards_and_not_at_all_beside_the_main_thread(
    tmp_path: Path,
) -> None:
    folder, _ = literal(tmp_path / "in")
    file = saved(tmp_path, placement(ORDER))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert placer("permute", folder, file, "-o", tmp_path / "1").code == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(placer, "permute", folder, file, "-o", tmp_path / "2").result().code == 0
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


# -- permutations -------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.permutations(range(n))] * 2)))
def test_permutations_compose_as_functions_do(pair: tuple[list[int], list[int]]) -> None:
    one, two = (Permutation(np.array([order]), (4,)) for order in pair)
    assert two.after(one).old_expert[0].tolist() == [pair[0][new] for new in pair[1]]
    assert one.after(one.inverse()).is_identity
    assert one.inverse().after(one).is_identity


@pytest.mark.parametrize(
    ("rows", "layers", "words"),
    [
        ([[0, 0, 1]], (2,), "layer 2: expected every expert 0..2 once"),
        ([[0, 1]], (1, 2), "expected a row for each"),
        ([[0, 1], [1, 0]], (1, 1), "distinct ids"),
        ([[0.5, 1]], (1,), "old_expert: found"),
    ],
)
def test_what_is_no_permutation_is_refused(rows: Any, layers: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        Permutation(rows, layers)


# -- the same model, by transformers ------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "num_experts_per_tok": 3,
    "intermediate_size": 24,
}
SHARED = {
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
GROUPS = {"n_group": 4, "topk_group": 2}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": E},
    "qwen2_moe": {
        "num_experts": E,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": E},
    "deepseek_v2": {**SHARED, **GROUPS, **LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**SHARED, **GROUPS, **LATENT},
    "gpt_oss": {"num_local_experts": E, "head_dim": 8},
    "glm4_moe": {**SHARED, "n_group": 1, "topk_group": 1, "head_dim": 8},
}


def random_model(name: str) -> Any:
    """A small model with large random weights, biases and correction biases, so that nothing is near zero."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.AutoConfig.for_model(name, **{**SMALL, **MODELS[name]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) * 0.2)
    return model


def outputs(model: Any) -> tuple[Any, dict[int, Any]]:
    """Logits of fixed tokens, and the experts that each MoE layer took, as its router gave them."""
    import torch

    taken: dict[int, Any] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        for module in layer.mlp.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                hooks.append(
                    module.register_forward_hook(
                        lambda _module, _inputs, out, number=number: taken.update({number: out[2]})
                    )
                )
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits
    for hook in hooks:
        hook.remove()
    return logits, taken


@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("name", MODELS)
def test_the_permuted_model_computes_the_same(name: str, layout: str, tmp_path: Path) -> None:
    model = random_model(name)
    import torch
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "in", max_shard_size="20KB", save_original_format=layout == "hub")
    logits, taken = outputs(model)
    assert taken
    orders = dict(zip(taken, (ORDER, OTHER, ORDER), strict=False))
    done = permute(tmp_path / "in", placement(*orders.values(), layers=tuple(orders)), tmp_path / "out")
    assert done.model_type == name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again, taken_again = outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(again, logits, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1
    for layer, order in orders.items():
        old = torch.tensor(order)[taken_again[layer]]
        assert torch.equal(old.sort().values, taken[layer].sort().values)
        assert not torch.equal(taken_again[layer].sort().values, taken[layer].sort().values)

    assert permute(tmp_path / "out", None, tmp_path / "back", inverse=True).restored
    assert tree(tmp_path / "back") == tree(tmp_path / "in")


def test_without_the_router_rows_it_would_not(tmp_path: Path) -> None:
    model = random_model("olmoe")
    import torch
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "in")
    permute(tmp_path / "in", placement(ORDER, ORDER, ORDER), tmp_path / "out")
    permuted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        for layer, former in zip(permuted.model.layers, model.model.layers, strict=True):
            layer.mlp.gate.weight.copy_(former.mlp.gate.weight)
    assert not torch.allclose(outputs(permuted)[0], outputs(model)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_model_type_that_transformers_or_the_hub_knows(name: str) -> None:
    known = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    assert name in known or name == "kimi_k2"  # which brings its own code, and DeepSeek-V3's layers


def test_checkpoints_of_transformers_open_with_their_layers(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    model.save_pretrained(tmp_path / "in")
    found = Checkpoint.open(tmp_path / "in")
    assert list(found.layers) == [1]  # every second layer
    assert found.num_experts == E
