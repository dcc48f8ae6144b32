"""Models: what placer must know of a Mixture-of-Experts model to turn vectors into bytes and seconds.

The known models are data, in ``models.toml`` beside this file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from placer.errors import InvalidInput
from placer.files import nearest

# Bytes of one parameter. FP4 is MXFP4, 4.25 bits with its scale of 1 byte for 32 weights (gpt-oss, arXiv:2508.10925);
# the 4 bytes for 128 x 128 weights of DeepSeek's FP8 are left out: 0.02 %.
PARAMETER_BYTES: Mapping[str, float] = MappingProxyType({"bf16": 2.0, "fp8": 1.0, "fp4": 4.25 / 8.0})

# Bytes of one element of a hidden vector on the wire. FP8 carries one FP32 scale for 128 channels
# (DeepEP, docs/legacy.md).
ELEMENT_BYTES: Mapping[str, float] = MappingProxyType({"bf16": 2.0, "fp8": 1.0 + 4.0 / 128.0})


def _bytes_of(dtype: str, sizes: Mapping[str, float], where: str) -> float:
    if dtype not in sizes:
        raise InvalidInput(f"{where} is {dtype!r}, expected one of {', '.join(sizes)}")
    return sizes[dtype]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a Mixture-of-Experts model; None where it is not known.

    Parameters
    ----------
    name : str
    hidden_size : int
        Elements of the vector that a token sends to an expert.
    expert_width : int or None
        Inner width of one routed expert, which has three matrices: gate, up and down.
    num_layers, num_moe_layers, num_experts, num_shared_experts, top_k : int or None
        `num_experts` counts the routed experts of one layer.
        A shared expert is as large as a routed one, and every GPU holds all of them.
    num_groups, topk_groups : int
        Expert groups of the router and how many of them a token may use; 1 and 1 without a group limit.
    expert_dtype : {"bf16", "fp8", "fp4"}
        How the published checkpoint stores the routed experts.
    dispatch_dtype, combine_dtype : {"bf16", "fp8"}
        How a hidden vector travels to the experts and back.
    total_parameters : float or None
        Parameters of the whole model, as published.
    source : str or None
        Where the figures come from.

    Raises
    ------
    InvalidInput
        When a size is below 1 or a dtype is unknown.

    Examples
    --------
    >>> model = Model.named("deepseek-v3")
    >>> model.expert_bytes("fp8"), model.dispatch_bytes
    (44040192.0, 14336.0)
    """

    name: str
    hidden_size: int
    expert_width: int | None = None
    num_layers: int | None = None
    num_moe_layers: int | None = None
    num_experts: int | None = None
    num_shared_experts: int | None = None
    top_k: int | None = None
    num_groups: int = 1
    topk_groups: int = 1
    expert_dtype: str = "bf16"
    dispatch_dtype: str = "bf16"
    combine_dtype: str = "bf16"
    total_parameters: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for key in ("hidden_size", "expert_width", "num_layers", "num_moe_layers", "num_experts", "top_k"):
            size = getattr(self, key)
            if size is None and key != "hidden_size":
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidInput(f"model {self.name}: {key} is {size!r}, expected an integer >= 1")
        if not 1 <= self.topk_groups <= self.num_groups:
            found = f"topk_groups is {self.topk_groups} of num_groups {self.num_groups}"
            raise InvalidInput(f"model {self.name}: {found}, expected 1 <= topk_groups <= num_groups")
        _bytes_of(self.expert_dtype, PARAMETER_BYTES, f"model {self.name}: expert_dtype")
        _bytes_of(self.dispatch_dtype, ELEMENT_BYTES, f"model {self.name}: dispatch_dtype")
        _bytes_of(self.combine_dtype, ELEMENT_BYTES, f"model {self.name}: combine_dtype")

    @property
    def expert_parameters(self) -> int | None:
        """Parameters of one routed expert."""
        return None if self.expert_width is None else 3 * self.hidden_size * self.expert_width

    @property
    def routed_parameters(self) -> int | None:
        """Parameters of all routed experts in all layers."""
        if self.expert_parameters is None or self.num_experts is None or self.num_moe_layers is None:
            return None
        return self.expert_parameters * self.num_experts * self.num_moe_layers

    @property
    def dispatch_bytes(self) -> float:
        """Bytes of one hidden vector on its way to the experts."""
        return self.hidden_size * ELEMENT_BYTES[self.dispatch_dtype]

    @property
    def combine_bytes(self) -> float:
        """Bytes of one hidden vector on its way back."""
        return self.hidden_size * ELEMENT_BYTES[self.combine_dtype]

    @property
    def flops_per_token_expert(self) -> int | None:
        """Floating-point operations of one expert for one token: a multiply and an add for each weight."""
        return None if self.expert_parameters is None else 2 * self.expert_parameters

    def expert_bytes(self, dtype: str | None = None) -> float | None:
        """Bytes of one routed expert's weights, in `dtype` or as the checkpoint stores them.

        Raises
        ------
        InvalidInput
            When the dtype is unknown.
        """
        size = _bytes_of(dtype or self.expert_dtype, PARAMETER_BYTES, f"model {self.name}: expert dtype")
        return None if self.expert_parameters is None else self.expert_parameters * size

    def shared_bytes(self, dtype: str | None = None) -> float | None:
        """Bytes of one layer's shared experts, stored as the routed ones are; none where their number is unknown.

        Examples
        --------
        >>> Model.named("deepseek-v2").shared_bytes() / 1e6
        94.37184
        """
        size = self.expert_bytes(dtype)
        return None if size is None else size * (self.num_shared_experts or 0)

    @staticmethod
    def named(name: str) -> Model:
        """The known model of this name, whatever its case and the organisation before it.

        Raises
        ------
        InvalidInput
            When no known model has this name.

        Examples
        --------
        >>> Model.named("mistralai/Mixtral_8x7B").name
        'mixtral-8x7b'
        """
        models = _models()
        found = models.get(_normalised(name))
        if found is None:
            raise InvalidInput(f"unknown model {name!r}: {nearest(_normalised(name), models)}")
        return found

    @staticmethod
    def for_trace_name(name: str | None, num_experts: int | None = None) -> Model:
        """The known model that a trace's ``model`` entry means, else `ASSUMED`.

        The base name must be a known name, or go on after one with ``-`` or ``.``; the longest wins.

        Parameters
        ----------
        name : str or None
        num_experts : int, optional
            Routed experts in the trace. A model with another number is not the one meant: small variants
            share the beginning of a large model's name (DeepSeek-V2-Lite).

        Examples
        --------
        >>> Model.for_trace_name("Mixtral-8x7B-Instruct-v0.1 (FP8)").name
        'mixtral-8x7b'
        >>> Model.for_trace_name("deepseek-ai/DeepSeek-V2-Lite", num_experts=64).name
        'assumed'
        """
        text = _normalised(name or "")
        models = _models()
        matches = [known for known in models if text == known or text.startswith((f"{known}-", f"{known}."))]
        found = models[max(matches, key=len)] if matches else ASSUMED
        return found if num_experts in (None, found.num_experts) else ASSUMED


ASSUMED = Model(
    name="assumed", hidden_size=4096, source="nothing is known of the model; BF16 vectors of 4096"
)


def known() -> list[str]:
    """Names of the known models, sorted; aliases such as ``deepseek-r1`` are left out.

    Examples
    --------
    >>> "olmoe-1b-7b" in known()
    True
    """
    return sorted({model.name for model in _models().values()})


def _normalised(name: str) -> str:
    """The base name: without organisation, remarks in brackets, case, or underscores."""
    return name.split(" (")[0].rstrip("/").split("/")[-1].strip().lower().replace("_", "-")


@cache
def _models() -> Mapping[str, Model]:
    """Every known model under its name and its aliases."""
    table = tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))
    models: dict[str, Model] = {}
    for name, row in table.items():
        aliases = row.pop("aliases", [])
        models |= dict.fromkeys([name, *aliases], Model(name=name, **row))
    return MappingProxyType(models)
