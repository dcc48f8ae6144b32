"""Safetensors files: read as the format's own library reads them, and refused where they are damaged."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors_bytes import framed, safetensors

from placer.errors import InvalidInput
from placer.shards import Shard, Tensor, rewrite

LITERAL = (
    b"\x6e\0\0\0\0\0\0\0"
    b'{"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},'
    b'"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
    b"\x07\0\0\0\0\0\0\0"
    b"\x80\x3f\x00\x40"
)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def test_a_literal_file_is_read(tmp_path: Path) -> None:
    shard = Shard.open(written(tmp_path, LITERAL))
    start = 118
    assert list(shard.tensors.items()) == [
        ("a", Tensor("I64", (), start, start + 8)),
        ("b", Tensor("BF16", (2, 1), start + 8, start + 12)),
    ]
    assert shard.array("a").item() == 7
    assert shard.array("b").tolist() == [[0x80, 0x3F], [0x00, 0x40]]  # rows of bytes: numpy has no bfloat16
    assert shard.tensors["b"].row(1) == (start + 10, start + 12)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda n: n != "__metadata__"),
        hnp.arrays(
            st.sampled_from(["<i4", "|u1", "<f2", "<i8", "|i1"]), hnp.array_shapes(min_dims=0, min_side=0)
        ),
        max_size=5,
    ),
    st.none() | st.dictionaries(st.text("ab"), st.text("cd")),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    shard = Shard.open(written(tmp_path_factory.mktemp("s"), safetensors(arrays, metadata)))
    assert shard.metadata == (metadata or {})
    assert shard.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        found = shard.array(name)
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        assert found.tobytes() == array.tobytes()
        assert not found.flags.writeable
        assert found.flags.aligned


def test_files_of_the_formats_own_library_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        f"{kind}.{size}": np.arange(6).reshape(2, 3).astype(f"{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    }
    arrays |= {f"f.{size}": np.linspace(-1, 1, 5).astype(f"f{size}") for size in (2, 4, 8)}
    arrays |= {"flags": np.array([True, False, True]), "none": np.zeros((0, 3), "f4")}
    library.save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    shard = Shard.open(tmp_path / "x.safetensors")
    assert shard.metadata == {"format": "np"}
    assert shard.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert shard.array(name).dtype == array.dtype
        assert np.array_equal(shard.array(name), array)


def test_types_of_torch_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    values = torch.arange(12).reshape(3, 4)
    types = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    types |= {"F8_E8M0": torch.float8_e8m0fnu}
    tensors = {name: values.to(dtype) for name, dtype in types.items()}
    library.save_file(tensors, tmp_path / "x.safetensors")
    shard = Shard.open(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert shard.tensors[name].dtype == name
        assert np.array_equal(shard.array(name), tensor.view(torch.uint8).numpy())


def test_elements_smaller_than_a_byte_are_counted_in_bits(tmp_path: Path) -> None:
    shard = Shard.open(written(tmp_path, safetensors({"x": ("F4", (2, 6), bytes(range(6)))})))
    assert shard.array("x").tolist() == [[0, 1, 2], [3, 4, 5]]
    shard = Shard.open(written(tmp_path, safetensors({"x": ("F4", (2, 3), bytes(3))})))
    with pytest.raises(InvalidInput, match="x: 2 rows of F4 are no whole bytes"):
        shard.array("x")


def entry(dtype: Any = "U8", shape: Any = (2,), data_offsets: Any = (0, 2), **other: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **other}


def file(data: bytes = b"ab", **entries: Any) -> bytes:
    return framed(json.dumps(entries).encode(), data)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "shorter than a length": (b"\x02\0\0", "in a file of 3"),
    "an absurd header": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615 bytes"),
    "a header past the end": ((1000).to_bytes(8, "little") + b"{}", "1,000 bytes in a file of 10"),
    "no header": (framed(b""), "expected a JSON object"),
    "not JSON": (framed(b"{nonsense}"), "not JSON"),
    "not text": (framed(b"{\xff\xfe}"), "not JSON"),
    "a list": (framed(b"[]"), "expected a JSON object"),
    "spaces first": (framed(b" {}"), "expected a JSON object"),
    "nested": (framed(b'{"a":' * 100_000), "nested too deeply"),
    "an integer of many digits": (framed(b'{"a":' + b"9" * 10_000 + b"}"), "not JSON"),
    "a name twice": (framed(b'{"a":{},"a":{}}'), "'a' stands twice"),
    "a key twice": (framed(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' stands twice"),
    "metadata that is no text": (file(__metadata__={"a": 1}), "__metadata__"),
    "no entry": (file(a=None), "'a': found None"),
    "no shape": (file(a={"dtype": "U8", "data_offsets": [0, 2]}), "expected dtype, shape and data_offsets"),
    "an unknown type": (file(a=entry("U128")), "dtype: found 'U128'"),
    "a type that is no text": (file(a=entry(["U8"])), "dtype: found"),
    "a negative extent": (file(a=entry(shape=[-2])), "shape: found [-2]"),
    "a fractional extent": (file(a=entry(shape=[2.0])), "shape: found [2.0]"),
    "a true extent": (file(a=entry(shape=[True, 2])), "shape: found [True, 2]"),
    "NaN": (framed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "shape: found [nan]"),
    "many axes": (file(a=entry(shape=[1] * 1000)), "up to 32 extents"),
    "an absurd shape": (file(a=entry(shape=[2**62] * 32)), "data_offsets span 2"),
    "a shape that overflows to fit": (file(a=entry(shape=[2**32, 2**32, 1])), "data_offsets span 2"),
    "three offsets": (file(a=entry(data_offsets=[0, 1, 2])), "expected two offsets"),
    "offsets that run back": (file(a=entry(data_offsets=[2, 0])), "data_offsets span -2"),
    "half a byte": (file(a=entry("F4", [3])), "takes 1.5 bytes"),
    "overlap": (file(a=entry(), b=entry(data_offsets=[1, 3])), "'b': data_offsets begin at 1, expected 2"),
    "the same bytes twice": (file(a=entry(), b=entry()), "'b': data_offsets begin at 0, expected 2"),
    "a gap": (file(b"abc", a=entry(data_offsets=[1, 3])), "'a': data_offsets begin at 1, expected 0"),
    "cut off": (file(b"a", a=entry()), "cut off or damaged"),
    "bytes behind the end": (file(b"abc", a=entry()), "but the file has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = HOSTILE[case]
    with pytest.raises(InvalidInput) as error:
        Shard.open(written(tmp_path, content))
    assert words in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'x.safetensors'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_header_is_worse_than_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(safetensors({"load": np.arange(6, dtype=np.int32).reshape(2, 3)}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = written(tmp_path_factory.mktemp("s"), bytes(content[: data.draw(st.integers(0, len(content)))]))
    with suppress(InvalidInput):
        shard = Shard.open(path)
        for name in shard.tensors:
            shard.array(name)


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none.safetensors: cannot be read: No such file"):
        Shard.open(tmp_path / "none.safetensors")
    shard = Shard.open(written(tmp_path, safetensors({"a": np.zeros(1, np.int8)})))
    with pytest.raises(InvalidInput, match="no tensor 'b'"):
        shard.array("b")


def test_a_rewritten_shard_keeps_its_header_to_the_byte(tmp_path: Path) -> None:
    arrays = {name: np.full(3, value, np.int32) for value, name in enumerate("abc")}
    content = safetensors(arrays, {"format": "pt"}).replace(b"}}}", b"}} }")
    shard = Shard.open(written(tmp_path, content))
    other = {"a": "c", "b": "b", "c": "a"}
    out = io.BytesIO()
    rewrite(out, shard, lambda name: shard.chunks(shard[other[name]].start, shard[other[name]].stop))
    assert out.getvalue()[: shard.data_start] == content[: shard.data_start]
    assert np.frombuffer(out.getvalue()[shard.data_start :], "<i4").tolist() == [2] * 3 + [1] * 3 + [0] * 3


def test_a_tensor_never_gets_more_or_fewer_bytes_than_it_had(tmp_path: Path) -> None:
    shard = Shard.open(written(tmp_path, safetensors({"a": np.zeros(4, np.int8)})))
    for pieces in ([b"ab"], [b"abc", b"de"]):
        with pytest.raises(InvalidInput, match=r"a: \d bytes for it, expected 4"):
            rewrite(io.BytesIO(), shard, lambda name, pieces=pieces: iter(pieces))


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, safetensors({"a": np.zeros(4, np.int8)}))
    shard = Shard.open(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InvalidInput, match="ends at byte"):
        list(shard.chunks(shard["a"].start, shard["a"].stop))


def test_a_large_tensor_passes_through_little_memory(tmp_path: Path) -> None:
    size = 1 << 28
    path = written(tmp_path, framed(json.dumps({"a": entry(shape=[size], data_offsets=[0, size])}).encode()))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)  # zeros that take no room on the disk
    shard = Shard.open(path)

    class Nowhere(io.RawIOBase):
        def write(self, data: Any) -> int:
            return len(data)

    def data(name: str) -> Iterator[bytes]:
        return shard.chunks(shard[name].start, shard[name].stop)

    tracemalloc.start()
    try:
        rewrite(Nowhere(), shard, data)  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
