from __future__ import annotations

import pickle
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InvalidInput
from placer.quantity import parse_quantity
from placer.topology import Level, Topology, shipped

FILE = Path(__file__).parents[1] / "topologies" / "dgx-h100.toml"
H100 = Topology.load(FILE)
SHAPES = {
    "dgx-h100": (1, 8, 8),
    "dgx-h100-superpod": (4, 32, 8),
    "h800": (1, 8, 8),
    "dgx-h200": (1, 8, 8),
    "gb200-nvl72": (1, 4, 72),
    "mi300x": (1, 8, 8),
    "tpu-v5p": (1, 1, 64),
}


def level(name: str, fanout: int, **changes: object) -> Level:
    plain: dict[str, object] = {"bandwidth": 50e9, "efficiency": 0.5, "latency": 3e-6, "link": "switch"}
    return Level(name=name, fanout=fanout, **(plain | changes))  # type: ignore[arg-type]


def machine(*levels: Level) -> Topology:
    return replace(Topology.load("dgx-h100"), name="machine", levels=levels)


def refused(call: object, *words: str) -> None:
    """The call raises one line with all the words in it."""
    with pytest.raises(InvalidInput) as caught:
        call()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_shipped_topologies_have_their_default_shapes() -> None:
    assert {name: Topology.load(name).shape for name in shipped()} == SHAPES


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_constant_of_a_shipped_file_has_its_source_beside_it(name: str) -> None:
    lines = (FILE.parent / f"{name}.toml").read_text().splitlines()
    sourced = ("bandwidth =", "efficiency =", "latency =", "gpu_memory =", "hbm_bandwidth =", "flops_")
    constants = [line for line in lines if line.startswith(sourced)]
    assert len(constants) == 4 + 3 * 3
    assert all("  # " in line for line in constants)


def test_h100_figures_are_si_numbers() -> None:
    topology = Topology.load("DGX-H100")
    gpu, server, rack = topology.levels
    assert (gpu.bandwidth, gpu.latency, gpu.effective_bandwidth) == (450e9, 3.33e-6, 450e9 * 0.82)
    assert (server.bandwidth, server.effective_bandwidth) == (50e9, 44e9)
    assert rack.latency > server.latency
    assert (topology.gpu_memory, topology.hbm_bandwidth) == (80e9, 3.35e12)
    assert (topology.flops_bf16, topology.flops_fp8) == (989.4e12, 1978.9e12)


def test_h800_reaches_the_measured_150_and_44_gigabytes_a_second() -> None:
    gpu, server, _ = Topology.load("h800").levels
    assert gpu.effective_bandwidth == pytest.approx(150e9)
    assert server.effective_bandwidth == pytest.approx(44.2e9, rel=0.01)


def test_only_a_mesh_limits_a_pair_to_one_link() -> None:
    mesh = Topology.load("mi300x").levels[0]
    switch = Topology.load("dgx-h100").levels[0]
    assert mesh.pair_bandwidth == pytest.approx(64e9 * mesh.efficiency)
    assert switch.pair_bandwidth == switch.effective_bandwidth


def test_a_smaller_mesh_keeps_its_links_and_loses_their_sum() -> None:
    mesh = Topology.load("mi300x").with_shape("1x8x4").levels[0]
    assert mesh.bandwidth == pytest.approx(3 * 64e9)
    assert mesh.pair_bandwidth == pytest.approx(64e9 * mesh.efficiency)


def test_oversubscription_divides_the_bandwidth() -> None:
    assert level("rack", 2, oversubscription=4).effective_bandwidth == 50e9 * 0.5 / 4


def test_units_nest_when_further_levels_stand_between_and_outside() -> None:
    names = ("gpu", 2), ("board", 4), ("server", 3), ("leaf", 5), ("rack", 2), ("pod", 7)
    topology = machine(*(level(*pair) for pair in names))
    assert topology.num_ranks == 2 * 4 * 3 * 5 * 2 * 7
    assert topology.shape == (14, 15, 8)
    assert topology.unit_sizes == (1, 2, 8, 24, 120, 240)
    assert topology.num_units == (1680, 840, 210, 70, 14, 7)
    assert topology.index("leaf") == 3
    reshaped = topology.with_shape("7x10x4")
    assert [unit.fanout for unit in reshaped.levels] == [1, 4, 2, 5, 1, 7]
    refused(lambda: topology.with_shape("7x12x4"), "--shape '7x12x4'", "12 servers", "leaf")
    refused(lambda: topology.index("lead"), "lead", "leaf")


@given(st.tuples(*[st.integers(1, 500)] * 3))
@settings(max_examples=30, deadline=None)
def test_a_shape_given_is_the_shape_obtained(shape: tuple[int, int, int]) -> None:
    topology = Topology.load("dgx-h100")
    reshaped = topology.with_shape("x".join(map(str, shape)))
    assert reshaped == topology.with_shape(shape)
    assert reshaped.shape == shape
    assert reshaped.num_ranks == shape[0] * shape[1] * shape[2]
    assert reshaped.num_units[0] == reshaped.num_ranks


@pytest.mark.parametrize(
    "text", ["2x4", "0x8x8", "1x-8x8", "1x8x8x1", "axbxc", "", "1,8,8", "1x8x1e9", "1x٣x8"]
)
def test_a_bad_shape_is_refused(text: str) -> None:
    refused(lambda: Topology.load("h800").with_shape(text), "--shape", "RACKSxSERVERSxGPUS", "1x8x8")


def test_a_topology_survives_pickling() -> None:
    topology = Topology.load("mi300x")
    assert pickle.loads(pickle.dumps(topology)) == topology


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("450 GB/s", "bandwidth", 450e9),
        ("400 Gb/s", "bandwidth", 50e9),
        ("80 GB", "bytes", 80e9),
        ("80GiB", "bytes", 80 * 2.0**30),
        ("0 GB", "bytes", 0.0),
        (" 3.33 us ", "seconds", 3.33e-6),
        ("3.33 µs", "seconds", 3.33e-6),
        ("989.4 TFLOP/s", "flops", 989.4e12),
        ("1.5e3", "bytes", 1500.0),
        (50e9, "bandwidth", 50e9),
        (7, "number", 7.0),
    ],
)
def test_quantities_are_read_into_si_units(text: str | float, kind: str, value: float) -> None:
    assert parse_quantity(text, kind) == value


@pytest.mark.parametrize(
    "text",
    ["-80 GB", "nan", "inf", "80 GB/s", "80 Gb", "GB", "", "80 G B", "1e999 GB", "9" * 400, -1.0]
    + [float("nan"), float("inf"), 10**400, True, None],
)
def test_nonsense_is_no_size(text: str) -> None:
    refused(lambda: parse_quantity(text, "bytes", "--gpu-memory"), "--gpu-memory", "80 GB")


@given(st.floats(0, 1e15, allow_nan=False))
@settings(max_examples=50, deadline=None)
def test_a_bare_number_reads_the_same_as_text_and_as_number(value: float) -> None:
    assert parse_quantity(repr(value), "bytes") == parse_quantity(value, "bytes") == value


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    refused(lambda: Topology.load("dgx-h10"), "dgx-h10", "did you mean", "dgx-h100")
    refused(lambda: Topology.load(""), "unknown topology ''")


def test_a_file_is_read_by_its_path_and_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.read_text())
    mine = Topology.load(path)
    assert mine == replace(Topology.load("dgx-h100"), name="mine")
    assert Topology.load(str(path)) == mine
    path.write_text('name = "ours"\n' + FILE.read_text())
    assert Topology.load(path).name == "ours"


def test_a_shipped_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("h800").write_text("not TOML at all")
    assert Topology.load("h800").name == "h800"
    refused(lambda: Topology.load("./h800"), "h800", "expected a TOML file")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("fanout = 8", "fanout = 0", ['level "gpu"', "fanout is 0", ">= 1"]),
        ("fanout = 8", "fanout = 8.0", ['level "gpu"', "fanout is 8.0", "integer"]),
        ("fanout = 8", "fanout = true", ['level "gpu"', "fanout is True"]),
        ("fanout = 8", "fan_out = 8", ["level 1", "fan_out", "did you mean fanout?"]),
        ("fanout = 8", "", ["level 1", '"fanout" is missing']),
        ('"450 GB/s"', '"0 GB/s"', ['level "gpu"', "bandwidth is 0.0"]),
        ('"450 GB/s"', '"-450 GB/s"', ["level 1: bandwidth", "'-450 GB/s'", "50 GB/s"]),
        ('"450 GB/s"', "inf", ["level 1: bandwidth", "inf"]),
        ('"450 GB/s"', "[450]", ["level 1: bandwidth", "[450]"]),
        ('"3.33 us"', '"-1 us"', ["level 1: latency", "'-1 us'"]),
        ('"3.33 us"', "nan", ["level 1: latency", "nan"]),
        ("efficiency = 0.82", "efficiency = 1.5", ["efficiency is 1.5", "at most 1"]),
        ("efficiency = 0.82", "efficiency = 0", ["efficiency is 0.0", "more than 0"]),
        ("oversubscription = 1", "oversubscription = 0.5", ["oversubscription is 0.5", "at least 1"]),
        ('link = "switch"', 'link = "string"', ["link is 'string'", "switch, mesh, torus"]),
        ('link = "switch"', "link = []", ["link is []", "switch, mesh, torus"]),
        ('name = "rack"', 'name = "pod"', ["gpu, server, pod", "rack"]),
        ('name = "rack"', 'name = "gpu"', ["gpu, server, gpu", "rack"]),
        ('name = "gpu"', 'name = "tile"', ["tile, server, rack"]),
        ('name = "gpu"', 'name = "a\\nb"', ["level 1: name", "one line of text"]),
        ('gpu_memory = "80 GB"', 'gpu_memory = "80 apples"', ["gpu_memory '80 apples'", "80 GB"]),
        ('gpu_memory = "80 GB"', "gpu_memory = 0", ["gpu_memory is 0.0"]),
        ('gpu_memory = "80 GB"', "", ['"gpu_memory" is missing']),
        ("description =", "describtion =", ["describtion", "did you mean description?"]),
        ("description =", "description = 1 #", ["description is 1"]),
        ("description =", "description", ["expected a TOML file"]),
        ("description =", "levels = 3\ndescription =", ["expected a TOML file"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    text = FILE.read_text()
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new, 1))
    refused(lambda: Topology.load(path), str(path), *words)


LISTED = {
    "a server": "gpu_memory = [" + '"141 GB", ' * 6 + '"80 GB", 80e9]',
    "the machine": "gpu_memory = [" + '"141 GB", ' * 56 + '"80 GB", ' * 8 + "]",
}


@pytest.mark.parametrize("of", LISTED)
def test_gpus_of_several_sizes_are_listed_for_a_server_or_for_the_machine(tmp_path: Path, of: str) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(FILE.read_text().replace('gpu_memory = "80 GB"', LISTED[of], 1))
    mixed = Topology.load(path)
    assert mixed.gpu_memory == 80e9
    assert len(mixed.gpu_memories) == {"a server": 8, "the machine": 64}[of]
    assert set(mixed.gpu_memories) == {141e9, 80e9}
    assert mixed.gpu_memories[-1] == 80e9
    assert H100.gpu_memories == ()


def test_a_shape_keeps_the_gpus_whose_memory_is_listed() -> None:
    server = replace(H100, gpu_memory=40e9, gpu_memories=(80e9,) * 7 + (40e9,))
    assert server.with_shape("3x5x8").gpu_memories == server.gpu_memories
    refused(lambda: server.with_shape("1x8x4"), "--shape '1x8x4'", "lists 8 sizes, expected 4, one for each")
    machine = replace(H100, gpu_memory=40e9, gpu_memories=(80e9,) * 63 + (40e9,))
    assert machine.with_shape("2x4x8").gpu_memories == machine.gpu_memories
    refused(
        lambda: machine.with_shape("1x4x8"), "--shape '1x4x8'", "lists 64 sizes", "or 32, one for each GPU"
    )


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("[]", ["gpu_memory is []", "80 GB"]),
        ('["80 GB"]', ["gpu_memory lists 1 sizes", "8, one for each GPU of a server", "64"]),
        ('["80 GB", "lots"]', ["gpu_memory 'lots'", "80 GB"]),
        ('["80 GB", []]', ["gpu_memory []"]),
        ("[" + "0, " * 8 + "]", ["gpu_memory is 0.0", "more than 0"]),
        ('"80 GB"\ngpu_memories = [80e9]', ["unknown key 'gpu_memories'", "gpu_memory"]),
    ],
)
def test_a_wrong_list_of_memories_is_refused_in_one_line(
    tmp_path: Path, listed: str, words: list[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(FILE.read_text().replace('gpu_memory = "80 GB"', f"gpu_memory = {listed}", 1))
    refused(lambda: Topology.load(path), str(path), *words)


def test_the_memory_of_a_gpu_is_the_least_of_those_listed() -> None:
    refused(lambda: replace(H100, gpu_memories=(90e9,) * 8), "gpu_memory is 80000000000.0", "the least")


@pytest.mark.parametrize("levels", ["levels = 3", "levels = []", "levels = [3]", 'levels = "gpu"'])
def test_levels_must_be_tables(tmp_path: Path, levels: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(FILE.read_text().split("[[levels]]")[0] + levels)
    refused(lambda: Topology.load(path), str(path), "levels" if "[3]" not in levels else "level 1")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refused(lambda: Topology.load(tmp_path / "none.toml"), "none.toml", "cannot be read")
    refused(lambda: Topology.load(tmp_path), str(tmp_path), "cannot be read")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: Topology.load(tmp_path / "binary.toml"), "binary.toml", "expected a TOML file")


@given(st.sampled_from(FILE.read_text().splitlines()), st.text(max_size=20))
@settings(max_examples=50, deadline=None)
def test_no_line_of_garbage_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, line: str, new: str
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "file.toml"
    path.write_text(FILE.read_text().replace(line, new, 1), encoding="utf-8", errors="surrogateescape")
    message = str(path)
    try:
        Topology.load(path)
    except InvalidInput as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_the_shipped_files_hold_no_key_that_the_readme_leaves_out() -> None:
    page = (FILE.parent / "README.md").read_text()
    table = tomllib.loads(FILE.read_text())
    levels = [f"levels.{field.name}" for field in fields(Level)]
    for key in [key for key in table if key != "levels"] + levels:
        assert f"`{key}`" in page
    for name in shipped():
        assert f"| `{name}` | {'x'.join(map(str, SHAPES[name]))} |" in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"link": "torus", "dims": (3, 3)},
            "dims is [3, 3], expected sides of a torus whose product is the fanout 8",
        ),
        ({"dims": (2, 4)}, "dims is [2, 4], expected sides of a torus"),
        ({"routing": "magic"}, "routing is 'magic', expected one of ideal, ecmp, spray"),
        ({"rails": 1}, "rails is 1, expected true or false"),
    ],
)
def test_impossible_links_are_refused(change: dict[str, object], expected: str) -> None:
    refused(lambda: level("gpu", 8, **change), expected)


@pytest.mark.parametrize("link", ["mesh", "torus"])
def test_only_the_gpus_of_a_server_form_a_mesh_or_torus(link: str) -> None:
    levels = H100.levels
    refused(
        lambda: replace(H100, levels=(levels[0], replace(levels[1], link=link), levels[2])), f"link is {link}"
    )


def test_a_torus_has_two_links_a_dimension_and_keeps_their_rate() -> None:
    cube = Topology.load("tpu-v5p").levels[0]
    assert cube.sides == (4, 4, 4)
    assert cube.pair_bandwidth == pytest.approx(100e9 * 0.82)
    small = cube.with_fanout(12)
    assert small.sides == (2, 2, 3)
    assert small.pair_bandwidth == cube.pair_bandwidth
    assert replace(cube, dims=()).sides == (4, 4, 4)
    assert replace(cube, dims=(8, 8)).pair_bandwidth == pytest.approx(150e9 * 0.82)


def test_a_torus_of_too_many_gpus_is_refused() -> None:
    refused(lambda: Topology.load("tpu-v5p").with_shape("1x1x4096"), "torus of 4096", "at most 1024")


def test_a_fabric_of_many_paths_reaches_a_share_of_its_bandwidth() -> None:
    uplink = H100.levels[2]
    for routing, share in (("ideal", 1.0), ("ecmp", 0.65), ("spray", 0.9)):
        assert replace(uplink, routing=routing).effective_bandwidth == pytest.approx(44e9 * share)
