"""Families of models: which tensors of their checkpoints belong to the experts and the router of a layer.

Names are those that models are published under on the Hugging Face hub, and those that transformers 5 gives its
modules in memory, where experts are fused. A model is found by the ``model_type`` of its config.json, never by its
tensors' names alone: two models can agree in names and differ in what an expert's number means to the router.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MOE = re.compile(
    r"(?P<module>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?:mlp|block_sparse_moe))\.(?P<rest>.+)"
)
_PART = re.compile(r"experts\.(?P<expert>0|[1-9][0-9]{0,5})\.(?P<part>.+)")
_FUSED = r"experts\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|_scale_inv)?"
_ABOUT_EXPERTS = re.compile(r"expert|router|moe|\.gate\.", re.IGNORECASE)
_PLAIN_GATE = r"gate\.weight"
_BIASED_GATE = r"gate\.(weight|e_score_correction_bias)"


@dataclass(frozen=True)
class Family:
    """How the checkpoints of a family name what moves with an expert.

    Tensors ``experts.N.*`` are the N-th expert's in every family.

    Parameters
    ----------
    rows : str
        Regular expression of those tensors of an MoE module, fused experts aside, whose first axis is the experts.
    untouched : str
        Regular expression of its tensors that all tokens share.
    num_groups : int
        Gate groups of a model whose config.json has no ``n_group``.
    """

    rows: str = _PLAIN_GATE
    untouched: str = r"(?!)"
    num_groups: int = 1


@dataclass(frozen=True)
class Role:
    """What one tensor of an MoE module is.

    Parameters
    ----------
    layer : int
        The model's own number of the layer.
    module : str
        What comes before in the tensor's name.
    kind : {"expert", "rows", "shared", "unknown"}
        One expert's, one with a row for each expert, one that all tokens share, or none that is known.
    expert : int
        Whose tensor it is, for ``expert``.
    part : str
        The rest of its name.
    """

    layer: int
    module: str
    kind: str
    expert: int = -1
    part: str = ""


#: By ``model_type``.
FAMILIES = {
    "mixtral": Family(),
    "minimax_m2": Family(rows=r"gate\.weight|e_score_correction_bias"),
    "olmoe": Family(),
    "qwen2_moe": Family(untouched=r"shared_expert\..+|shared_expert_gate\.weight"),
    "qwen3_moe": Family(),
    "deepseek_v2": Family(untouched=r"shared_experts\..+"),
    "deepseek_v3": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+", num_groups=8),
    "deepseek_v32": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+", num_groups=8),
    "kimi_k2": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+"),
    "dots1": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+"),
    "glm4_moe": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+"),
    "glm4_moe_lite": Family(rows=_BIASED_GATE, untouched=r"shared_experts\..+"),
    "gpt_oss": Family(rows=r"router\.(weight|bias)"),
}


def role(family: Family, name: str) -> Role | None:
    """What a tensor has to do with experts, by its name; None for nothing.

    A layer's dense network bears names of the same shape, so that ``unknown`` is an error only where the module also
    holds experts, or the name speaks of them, see `speaks_of_experts`.

    Examples
    --------
    >>> role(FAMILIES["mixtral"], "model.layers.3.block_sparse_moe.experts.5.w1.weight")
    Role(layer=3, module='model.layers.3.block_sparse_moe', kind='expert', expert=5, part='w1.weight')
    >>> role(FAMILIES["gpt_oss"], "model.layers.0.mlp.router.bias").kind
    'rows'
    >>> role(FAMILIES["gpt_oss"], "model.layers.0.self_attn.q_proj.weight")
    """
    found = _MOE.fullmatch(name)
    if found is None:
        return None
    layer, module, rest = int(found["layer"]), found["module"], found["rest"]
    part = _PART.fullmatch(rest)
    if part is not None:
        return Role(layer, module, "expert", int(part["expert"]), part["part"])
    if re.fullmatch(f"{family.rows}|{_FUSED}", rest):
        return Role(layer, module, "rows", part=rest)
    return Role(layer, module, "shared" if re.fullmatch(family.untouched, rest) else "unknown", part=rest)


def speaks_of_experts(name: str) -> bool:
    """Whether a name has a word in it that tensors of experts and routers have.

    Examples
    --------
    >>> speaks_of_experts("mtp.layers.0.mlp.experts.0.up_proj.weight"), speaks_of_experts("lm_head.weight")
    (True, False)
    """
    return _ABOUT_EXPERTS.search(name) is not None
