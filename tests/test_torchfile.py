"""Files of torch.save: read exactly, and nothing that they hold is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_bytes import tensor, text, write

from placer import plainpickle, torchfile
from placer.errors import InvalidInput

# A literal file's parts: {"load": tensor([[1, 2, 3], [4, 5, 6]], dtype=int32), "rank": 0}, as torch 2 pickles it.
PICKLE = (
    b"\x80\x02}q\x00(X\x04\x00\x00\x00loadq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nIntStorage\nq\x04X\x01\x00\x00\x000q\x05X\x06\x00\x00\x00cuda:0q\x06K\x06tq\x07QK\x00K\x02K\x03\x86q\x08"
    b"K\x03K\x01\x86q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rX\x04\x00\x00\x00rankq\x0eK\x00u."
)
STORAGE = np.arange(1, 7, dtype="<i4").tobytes()


def refused(path: Path, match: str) -> None:
    with pytest.raises(InvalidInput, match=match) as caught:
        torchfile.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_literal_file_is_read_wherever_its_tensors_lived(tmp_path: Path) -> None:
    found = torchfile.load(write(tmp_path / "dump.pt", PICKLE, [STORAGE], stem="dump"))
    assert found["rank"] == 0
    assert found["load"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found["load"].dtype == np.int32
    assert not found["load"].flags.writeable


def test_big_endian_and_unsaid_byte_orders_are_read(tmp_path: Path) -> None:
    swapped = np.arange(1, 7, dtype=">i4").tobytes()
    big = torchfile.load(write(tmp_path / "big.pt", PICKLE, [swapped], byteorder=b"big"))
    old = torchfile.load(write(tmp_path / "old.pt", PICKLE, [STORAGE], byteorder=None))
    assert big["load"].tolist() == old["load"].tolist() == [[1, 2, 3], [4, 5, 6]]
    refused(write(tmp_path / "odd.pt", PICKLE, [STORAGE], byteorder=b"middle"), "byteorder: found b'middle'")


def test_the_head_tells_what_a_file_may_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "dump.pt", PICKLE, [STORAGE])
    assert torchfile.head(path, 20) == PICKLE[:20]
    (tmp_path / "text").write_text("PK")
    assert torchfile.head(tmp_path / "text") == b""
    assert torchfile.head(tmp_path / "missing") == b""
    np.savez(tmp_path / "array.npz", PICKLE)
    assert torchfile.head(tmp_path / "array.npz") == b""


# -- what torch writes -----------------------------------------------------------------------------------


def same(found: Any, expected: Any) -> bool:
    import torch

    if isinstance(expected, torch.Tensor):
        wide = expected.detach().float() if expected.dtype == torch.bfloat16 else expected.detach()
        values = wide.numpy()
        return (
            isinstance(found, np.ndarray)
            and found.dtype == values.dtype
            and found.shape == values.shape
            and np.array_equal(found, values, equal_nan=found.dtype.kind == "f")
        )
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def test_every_dtype_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = ["bool", "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64"]
    names += ["uint8", "uint16", "uint32", "uint64"]
    value = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, name)) for name in names}
    value["bfloat16"] = torch.tensor([1.5, -2.0, 3e38, float("nan")], dtype=torch.bfloat16)
    torch.save(value, tmp_path / "all.pt")
    assert same(torchfile.load(tmp_path / "all.pt"), value)


def test_views_share_what_torch_stores_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24).reshape(2, 3, 4)
    value = [base, base[1], base.transpose(0, 2), base[:, ::2, 1:3], base[0, 0, 0], base[:0]]
    torch.save(value, tmp_path / "views.pt")
    assert same(torchfile.load(tmp_path / "views.pt"), value)


def test_plain_data_and_parameters_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = {
        "numbers": [0, -1, 255, 65536, -(2**31), 2**40, -(2**63), 2.5, float("inf"), None, True, False],
        "texts": ["", "a\nb", "über", "x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "ordered": OrderedDict(b=1, a=2),
        3: {"nested": [[], {}]},
        "size": torch.Size([2, 3]),
        "weight": torch.nn.Parameter(torch.ones(2, 2)),
    }
    for protocol in (2, 4):
        torch.save(value, tmp_path / "plain.pt", pickle_protocol=protocol)
        assert same(torchfile.load(tmp_path / "plain.pt"), {**value, "size": (2, 3)})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_torch_writes_is_read_back(data: st.DataObject, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = st.tuples(
        st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["int32", "float64", "bool"])
    ).map(lambda drawn: torch.arange(int(np.prod(drawn[0]))).reshape(drawn[0]).to(getattr(torch, drawn[1])))
    scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
    leaves = scalars | st.text(st.characters(exclude_categories=["Cs"])) | arrays
    trees = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
        ),
        max_leaves=12,
    )
    value = data.draw(trees)
    torch.save(value, tmp_path / "tree.pt")
    assert same(torchfile.load(tmp_path / "tree.pt"), value)


@pytest.mark.parametrize("what", ["sparse", "float8", "module"])
def test_what_is_no_dense_tensor_is_refused(what: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
        "module": lambda: torch.nn.Linear(2, 2),
    }[what]()
    torch.save(value, tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", "neither imported nor called")


def test_files_of_the_old_format_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa850192e8002"))
    refused(tmp_path / "old.pt", "torch before 1.6")
    torch = pytest.importorskip("torch")
    torch.save(torch.ones(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "torch before 1.6")


# -- hostile files ---------------------------------------------------------------------------------------


class Attack:
    """Pickled as a call of os.system."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_a_command_runs_nothing(protocol: int, tmp_path: Path) -> None:
    attack = pickle.dumps({"load": Attack(tmp_path / "ran")}, protocol)
    refused(write(tmp_path / "attack.pt", attack), "neither imported nor called|is not run")
    assert not (tmp_path / "ran").exists()
    pickle.loads(attack)
    assert (tmp_path / "ran").exists()  # the attack is a real one


@pytest.mark.parametrize(
    "instructions",
    [
        b"cos\nsystem\n(X\x02\x00\x00\x00lstR.",
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        b"ctorch\nload\n(X\x01\x00\x00\x00xtR.",
        b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.",
        b"(X\x02\x00\x00\x00lsios\nsystem\n.",  # INST
        b"cos\nsystem\n(X\x02\x00\x00\x00lso.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"}}b.",  # BUILD
        b")\x81.",  # NEWOBJ
        b"P1\n.",  # PERSID
    ],
)
def test_instructions_that_build_more_than_plain_data_are_not_run(
    instructions: bytes, tmp_path: Path
) -> None:
    refused(write(tmp_path / "odd.pt", instructions), "neither imported nor called|is not run|damaged")


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (b"", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b".", "damaged"),
        (b"0", "is not run"),
        (b"}s.", "damaged"),
        (b"h\x07.", "damaged at instruction 1"),
        (b"((.", "damaged|half"),
        (b"(.", "half a value"),
        (b"(q\x00.", "damaged"),
        (b"]]](aa.", "half a value|damaged"),
        (b"K\x01K\x02.", "damaged"),
        (b"K\x01)R.", "a call of what cannot be called"),
        (b"ctorch\nIntStorage\n.", "found torch.IntStorage"),
        (b"ctorch\nIntStorage\n)R.", "cannot be called"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"ccollections\nOrderedDict\n](K\x01etR.", "damaged|cannot be called"),
        (b"ccollections\nOrderedDict\n(](tR.", "damaged"),
        (b"}K\x01\x85K\x01s.", "a key of type tuple"),  # hashing a deep tuple overruns the C stack
        (b"}]K\x01s.", "a key of type list"),
        (b"\x8a\x09" + bytes(8) + b"\x7f.", "71 bits"),
        (b"]q\x00h\x00a.", "holds itself"),
        (b"]q\x00" + b"h\x00\x86q\x00" * 30 + b".", "repeated or nested"),
        (b"]" * 100 + b"a" * 99 + b".", "nested too often"),
        (b"\xff\xfe", "damaged"),
        (b"Q.", "damaged"),
        (b"]Q.", "something other than a storage"),
    ],
)
def test_damaged_and_tricky_pickles_are_told_in_one_line(
    instructions: bytes, match: str, tmp_path: Path
) -> None:
    refused(write(tmp_path / "odd.pt", instructions), match)


@pytest.mark.parametrize(
    ("instructions", "match"),
    [
        (tensor("IntStorage", "0", 6, 0, (7,), (1,)), "leaves its storage of 6"),
        (tensor("IntStorage", "0", 6, 1, (6,), (1,)), "leaves its storage"),
        (tensor("IntStorage", "0", 6, 0, (2, 3), (4, 1)), "leaves its storage"),
        (tensor("IntStorage", "0", 6, 2**40, (1,), (1,)), "leaves its storage"),
        (tensor("IntStorage", "0", 6, 0, (2**40,), (0,)), "repeats it"),
        (tensor("IntStorage", "0", 6, -1, (1,), (1,)), "from -1"),
        (tensor("IntStorage", "0", 6, 5, (2,), (-1,)), r"strides \(-1,\)"),
        (tensor("IntStorage", "0", 6, 0, (2, 3), (1,)), r"shape \(2, 3\), strides \(1,\)"),
        (tensor("IntStorage", "0", 6, 0, (0, 2**61, 2**61), (1, 1, 1)), "damaged"),
        (tensor("IntStorage", "0", 7, 0, (6,), (1,)), "found 24 bytes, expected 7 values"),
        (tensor("LongStorage", "0", 6, 0, (6,), (1,)), "found 24 bytes, expected 6 values of i8"),
        (tensor("IntStorage", "0", 2**62, 0, (6,), (1,)), "found 24 bytes"),
        (tensor("IntStorage", "1", 6, 0, (6,), (1,)), "no member data/1"),
        (tensor("IntStorage", "../data/0", 6, 0, (6,), (1,)), "without type or key"),
        (tensor("IntStorage", "0", -1, 0, (6,), (1,)), "absurd key or number"),
        (tensor("ComplexFloatStorage", "0", 3, 0, (3,), (1,)), "neither imported nor called"),
        (tensor("BoolStorage", "0", 24, 0, (24,), (1,)), "a boolean that is neither 0 nor 1"),
        (
            b"]("
            + tensor("IntStorage", "0", 6, 0, (6,), (1,))
            + tensor("FloatStorage", "0", 6, 0, (6,), (1,))
            + b"e",
            "found both i4 and f4",
        ),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(
    instructions: bytes, match: str, tmp_path: Path
) -> None:
    refused(write(tmp_path / "odd.pt", b"\x80\x02" + instructions + b".", [STORAGE]), match)


def test_small_files_cannot_unfold_to_large_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "SMALL", 1 << 12)
    one = tensor("ByteStorage", "0", 4096, 0, (4096,), (1,))
    again = b"](" + one + b"q\x00" + b"h\x00" * 100 + b"e."
    refused(write(tmp_path / "again.pt", again, [bytes(4096)]), "one stands for many")
    views = b"](" + one * 200 + b"e."
    refused(write(tmp_path / "views.pt", views, [bytes(4096)]), "one stands for many")
    zeros = write(tmp_path / "bomb.pt", one + b".", [bytes(4096)], compression=zipfile.ZIP_DEFLATED)
    refused(zeros, "encrypted or compressed")


def test_long_pickles_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "long.pt", b"](" + b"K\x01" * 500 + b"e.")
    assert torchfile.load(path) == [1] * 500
    monkeypatch.setattr(plainpickle, "MAX_INSTRUCTIONS", 100)
    refused(path, "more than 100 instructions")
    monkeypatch.setattr(plainpickle, "MAX_BYTES", 100)
    refused(path, "found 1004 bytes, expected at most 100")


def test_members_that_overlap_cannot_add_up_to_more_than_the_file(tmp_path: Path) -> None:
    import struct

    both = (
        b"]("
        + tensor("IntStorage", "0", 6, 0, (6,), (1,))
        + tensor("IntStorage", "1", 6, 0, (6,), (1,))
        + b"e."
    )
    path = write(tmp_path / "overlap.pt", both, [STORAGE, STORAGE])
    content = bytearray(path.read_bytes())
    at = content.rindex(b"archive/data/1") - 46  # the second storage in the central directory
    content[at + 20 : at + 28] = struct.pack("<II", 100_000, 100_000)
    path.write_bytes(content)
    refused(path, "members hold more bytes than the file")


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    refused(tmp_path / "missing.pt", "cannot be read: No such file")
    refused(tmp_path, "cannot be read")
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "not a torch.save file")
    np.savez(tmp_path / "array.npz", np.arange(3))
    refused(tmp_path / "array.npz", "found 0 members STEM/data.pkl")
    path = write(tmp_path / "cut.pt", PICKLE, [STORAGE])
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "not a torch.save file, or a truncated one")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    pickled=st.booleans(),
)
def test_a_changed_byte_is_read_or_told_in_one_line(
    at: int, byte: int, pickled: bool, tmp_path: Path
) -> None:
    content = bytearray(PICKLE)
    if pickled:  # with a sound checksum around it
        content[at % len(content)] = byte
        path = write(tmp_path / "changed.pt", bytes(content), [STORAGE])
    else:
        path = write(tmp_path / "changed.pt", PICKLE, [STORAGE])
        content = bytearray(path.read_bytes())
        content[at % len(content)] = byte
        path.write_bytes(content)
    try:
        found = torchfile.load(path)
    except InvalidInput:
        refused(path, "changed.pt: .")
    else:
        assert type(found) in plainpickle.PLAIN


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(
    [b"(", b")", b"]", b"}", b"N", b"K\x05", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"q\x00", b"h\x00", b"R",
     b"Q", text("storage"), text("0"), b"ctorch\nIntStorage\n", b"ccollections\nOrderedDict\n",
     b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"\x89"]), max_size=25))  # fmt: skip
def test_any_sequence_of_instructions_gives_plain_data_or_an_error(parts: list[bytes]) -> None:
    names: dict[str, Any] = {
        "torch.IntStorage": None,
        "torch.Size": lambda size: size,
        "collections.OrderedDict": dict,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
    }
    try:
        found = plainpickle.read(b"".join(parts) + b".", names=names, persistent=lambda found: None)
    except InvalidInput:
        return
    assert type(found) in plainpickle.PLAIN


def test_files_put_together_by_hand_are_those_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = {"a": [np.arange(6).reshape(2, 3), 1.5, None], "b": np.ones((2, 1, 3), np.float32)}
    path = torch_bytes.save(tmp_path / "own.pt", value)
    read = torch.load(path, weights_only=True)
    assert same(torchfile.load(path), read)
    assert np.array_equal(read["a"][0].numpy(), value["a"][0])
