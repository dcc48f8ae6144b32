"""Checkpoints: folders of safetensors shards with a config.json, and where their experts are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from placer.errors import InvalidInput
from placer.families import FAMILIES, Family, role, speaks_of_experts
from placer.files import nearest
from placer.folder import files_within
from placer.shards import Shard, Tensor, parse_object, quoted

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

_LARGEST_DOCUMENT = 100_000_000  # bytes of a JSON file
# What regular expressions begin with in the settings of compressed-tensors, and of GPTQModel ("dynamic").
_REGEX = ("re:", "+:", "-:")
_NUMBERED = re.compile(r"(?<!shared_)experts\W*\d")
_OTHER_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5"})


@dataclass(frozen=True)
class Experts:
    """The experts and the router of one layer.

    Parameters
    ----------
    module : str
        What their tensors' names begin with.
    rows : tuple of str
        Tensors with a row for each expert, by their full names.
    parts : dict of int to dict of str to str
        Each expert's own tensors: its parts, and their full names.
    """

    module: str
    rows: tuple[str, ...]
    parts: dict[int, dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint, opened: its tensors are known by name, type and place, and nothing of them is in memory.

    Parameters
    ----------
    folder : Path
    model_type : str
        A key of `placer.families.FAMILIES`.
    num_groups : int
        Gate groups of every layer.
    num_experts : int or None
        Experts of every MoE layer, as far as the config says.
    files : tuple of Path
        All files, relative to the folder.
    passed_over : tuple of Path
        Folders in it that are no part of the checkpoint.
    shards : dict of str to Shard
        By file name.
    holder : dict of str to Shard
        The shard that holds each tensor.
    layers : dict of int to Experts
        By the model's own numbers of its MoE layers.
    """

    folder: Path
    model_type: str
    num_groups: int
    num_experts: int | None
    files: tuple[Path, ...]
    passed_over: tuple[Path, ...]
    shards: dict[str, Shard]
    holder: dict[str, Shard]
    layers: dict[int, Experts]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read the config, the index and all headers of a checkpoint, and check that they agree.

        Raises
        ------
        InvalidInput
            When a file is missing or damaged, a name leads out of the folder, index and shards differ, the model is of
            no known family, a tensor among its experts is unknown, or the quantisation is set for some of them only.
        """
        folder = Path(folder)
        files, passed_over = files_within(folder)
        config = read_object(folder / CONFIG)
        model_type, family = _family(folder / CONFIG, config)
        index = _index(folder, {path.name for path in files if len(path.parts) == 1})
        names = [SINGLE] if index is None else sorted(set(index.values()))
        shards = {name: Shard.open(folder / name) for name in names}
        holder = _holders(folder, shards, index)
        layers = _layers(folder, family, holder)
        _check_quantization(folder / CONFIG, config, layers)
        return cls(
            folder=folder,
            model_type=model_type,
            num_groups=_count(folder, config, "n_group", family.num_groups) or 1,
            num_experts=_num_experts(folder, config),
            files=tuple(files),
            passed_over=tuple(passed_over),
            shards=shards,
            holder=holder,
            layers=layers,
        )

    @property
    def other_weights(self) -> list[Path]:
        """Files that seem to hold weights besides the shards: other formats, adapters, originals in folders."""
        return [p for p in self.files if p.suffix in _OTHER_WEIGHTS and p.as_posix() not in self.shards]

    def tensor(self, name: str) -> Tensor:
        """Type, shape and place of a tensor."""
        return self.holder[name].tensors[name]

    def check_layer(self, layer: int, num_experts: int) -> None:
        """Refuse a layer whose experts cannot be told apart or exchanged.

        Raises
        ------
        InvalidInput
            Naming the tensor, when the layer has no experts or not `num_experts` of them, no router, or experts that
            differ in type or shape.
        """
        if layer not in self.layers:
            held = f"has them in {layers_in_words(list(self.layers))}" if self.layers else "has none at all"
            raise InvalidInput(f"{self.folder}: layer {layer} has no experts; the checkpoint {held}")
        found = self.layers[layer]
        if not any(name in found.rows for name in (f"{found.module}.{x}.weight" for x in ("gate", "router"))):
            raise InvalidInput(f"{self.folder}: layer {layer}: {found.module} has no router (gate.weight)")
        for name in found.rows:
            tensor = self.tensor(name)
            if not tensor.shape or tensor.shape[0] != num_experts:
                raise InvalidInput(
                    f"{self.holder[name].path}: {name}: found shape {list(tensor.shape)}, "
                    f"expected a row for each of {num_experts} experts"
                )
            if tensor.nbytes % num_experts:
                raise InvalidInput(
                    f"{self.holder[name].path}: {name}: rows of {tensor.dtype} end inside a byte"
                )
        if not found.parts and not any(name.startswith(f"{found.module}.experts.") for name in found.rows):
            raise InvalidInput(f"{self.folder}: layer {layer}: {found.module} has a router and no experts")
        if found.parts:
            self._check_parts(found, num_experts)

    def _check_parts(self, found: Experts, num_experts: int) -> None:
        expected = range(num_experts)
        if found.parts.keys() != set(expected):
            wrong = min(found.parts.keys() ^ set(expected))
            raise InvalidInput(
                f"{self.folder}: {found.module}.experts.{wrong}: "
                f"{'missing' if wrong in expected else 'one too many'}, expected experts 0..{num_experts - 1}"
            )
        first = found.parts[0]
        for expert, parts in found.parts.items():
            if parts.keys() != first.keys():
                part = min(parts.keys() ^ first.keys())
                has, lacks = (expert, 0) if part in parts else (0, expert)
                raise InvalidInput(
                    f"{self.folder}: {found.module}.experts.{has}.{part}: "
                    f"expert {lacks} has no such tensor, expected the same of all"
                )
            for part, name in parts.items():
                one, other = self.tensor(name), self.tensor(first[part])
                if (one.dtype, one.shape) != (other.dtype, other.shape):
                    raise InvalidInput(
                        f"{self.holder[name].path}: {name}: found {one.dtype} {list(one.shape)}, "
                        f"expected {other.dtype} {list(other.shape)} as for expert 0"
                    )


def layers_in_words(layers: Sequence[int]) -> str:
    """Layer numbers as text.

    Examples
    --------
    >>> layers_in_words([3, 4, 5]), layers_in_words([3])
    ('layers 3..5', 'layer 3')
    """
    from placer.evaluation import format_ids

    return f"layers {format_ids(tuple(layers))}" if len(layers) > 1 else f"layer {layers[0]}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises
    ------
    InvalidInput
        When it cannot be read, is not one, or is larger than any should be.
    """
    try:
        if path.stat().st_size > _LARGEST_DOCUMENT:
            raise InvalidInput(f"more than {_LARGEST_DOCUMENT:,} bytes, expected a short JSON file")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None


def _family(path: Path, config: dict[str, Any]) -> tuple[str, Family]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = nearest(model_type, FAMILIES) if isinstance(model_type, str) else nearest("", FAMILIES)
        raise InvalidInput(f"{path}: model_type: found {short(model_type)}, expected a known family; {hint}")
    return model_type, FAMILIES[model_type]


def _check_quantization(path: Path, config: dict[str, Any], layers: dict[int, Experts]) -> None:
    """Refuse settings that name experts: the numbers in them stay when the experts move."""
    for word in dict.fromkeys(_words(config.get("quantization_config"))):
        found = role(Family(), word) or role(Family(), f"{word}.weight")
        if found is not None and found.kind == "expert":
            raise InvalidInput(
                f"{path}: quantization_config: names {quoted(word)}, which a permutation would not reach"
            )
        if not word.startswith(_REGEX):
            continue
        try:
            apart = _tells_apart(re.compile(word.partition(":")[2]), layers.values())
        except (re.error, RecursionError, OverflowError):
            raise InvalidInput(
                f"{path}: quantization_config: {quoted(word)} holds no regular expression"
            ) from None
        if apart:
            raise InvalidInput(
                f"{path}: quantization_config: {quoted(word)} means some experts of a layer, "
                "which a permutation would not reach; expected all or none"
            )


def _tells_apart(pattern: re.Pattern[str], layers: Iterable[Experts]) -> bool:
    """Whether a pattern matches, from the start, modules or tensors of some experts of a layer but not of others.

    One that matches none of them is judged by its looks: fused experts are loaded under names that are not here.
    """
    matched = False
    for found in layers:
        tensors = {f".{part}" for own in found.parts.values() for part in own}
        names = {"", *tensors, *(name.rpartition(".")[0] for name in tensors)}
        reached = {
            frozenset(name for name in names if pattern.match(f"{found.module}.experts.{expert}{name}"))
            for expert in found.parts
        }
        if len(reached) > 1:
            return True
        matched = matched or any(reached)
    return not matched and _NUMBERED.search(pattern.pattern.replace("[0-9]", r"\d")) is not None


def _words(value: Any) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [value] if isinstance(value, str) else []


def _count(folder: Path, config: dict[str, Any], key: str, default: int | None) -> int | None:
    value = config.get(key, default)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value < 2**31:
        raise InvalidInput(f"{folder / CONFIG}: {key}: found {short(value)}, expected a count")
    return value


def _num_experts(folder: Path, config: dict[str, Any]) -> int | None:
    # transformers writes one under the name of another, as Qwen3-MoE's "num_experts"
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    counts = {key: _count(folder, config, key, None) for key in keys if config.get(key) is not None}
    if len(set(counts.values())) > 1:
        raise InvalidInput(f"{folder / CONFIG}: found {counts}, expected one number of experts")
    return next(iter(counts.values()), None)


def _index(folder: Path, here: set[str]) -> dict[str, str] | None:
    """The shard of every tensor; None for a checkpoint in a single file."""
    if INDEX not in here:
        if SINGLE not in here:
            raise InvalidInput(f"{folder}: found neither {INDEX} nor {SINGLE}, expected a checkpoint")
        return None
    path = folder / INDEX
    found = read_object(path).get("weight_map")
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(value, str) for value in found.values())
    ):
        raise InvalidInput(f"{path}: weight_map: found {short(found)}, expected the shard of every tensor")
    names = set(found.values())
    for name in sorted(names - here):
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise InvalidInput(
                f"{path}: weight_map: found {quoted(name)}, expected the name of a file in the folder"
            )
        raise InvalidInput(f"{path}: weight_map names {quoted(name)}, which is missing")
    if SINGLE in here - names:
        raise InvalidInput(
            f"{folder}: holds {SINGLE} and an {INDEX} that does not name it; expected one of the two"
        )
    return found


def _holders(folder: Path, shards: dict[str, Shard], index: dict[str, str] | None) -> dict[str, Shard]:
    """The shard of every tensor, where shards and index agree."""
    holder: dict[str, Shard] = {}
    for shard in shards.values():
        for name in shard.tensors:
            if name in holder:
                raise InvalidInput(f"{shard.path}: {quoted(name)} is in {holder[name].path.name} as well")
            if index is not None and name not in index:
                raise InvalidInput(f"{shard.path}: {quoted(name)} is missing in {INDEX}")
            holder[name] = shard
    for name, file in (index or {}).items():
        if name not in shards[file].tensors:
            raise InvalidInput(f"{folder / INDEX}: weight_map: {quoted(name)} is not in {file}")
    return holder


def _layers(folder: Path, family: Family, names: Iterable[str]) -> dict[int, Experts]:
    roles = {name: role(family, name) for name in names}
    moe = {found.module for found in roles.values() if found and found.kind in ("expert", "rows")}
    layers: dict[int, Experts] = {}
    rows: dict[int, list[str]] = {}
    for name, found in roles.items():
        among = found if found is not None and found.module in moe else None
        if speaks_of_experts(name) if among is None else among.kind == "unknown":
            raise InvalidInput(
                f"{folder}: {quoted(name)}: unknown among experts and routers, so none can be moved safely"
            )
        if among is None:
            continue
        here = layers.setdefault(among.layer, Experts(among.module, (), {}))
        if here.module != among.module:
            raise InvalidInput(
                f"{folder}: layer {among.layer} has experts in {here.module} and in {among.module}"
            )
        if among.kind == "expert":
            here.parts.setdefault(among.expert, {})[among.part] = name
        elif among.kind == "rows":
            rows.setdefault(among.layer, []).append(name)
    return {n: Experts(here.module, tuple(rows.get(n, ())), here.parts) for n, here in sorted(layers.items())}
