"""What models of Hugging Face transformers, their configs and their masks say about experts and tokens.

Reference: https://github.com/huggingface/transformers, ``modeling_*.py`` of each family, version 5.
"""

from __future__ import annotations

from importlib import import_module
from os.path import basename
from typing import Any

from placer.errors import InvalidInput

Module = Any  # torch.nn.Module
Tensor = Any  # torch.Tensor

FAMILIES = "Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, DeepSeek-V3, gpt-oss, GLM-4-MoE"

_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")  # keys of configs


def find_experts(model: Module) -> tuple[Module, dict[int, Module]]:
    """The module that runs the layers, and the experts of each MoE layer by the model's number of the layer.

    The experts of a layer are one module by the name of ``experts``, called with hidden states, ids and weights.

    Raises
    ------
    InvalidInput
        When torch is missing, or the model is compiled, has no experts, or several in one layer or stacks of layers.
    """
    try:
        torch = import_module("torch")
    except ImportError:
        raise InvalidInput(
            "torch: found none, expected it to record a model: pip install 'placer[torch]'"
        ) from None
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput(f"model: found {type(model).__name__}, expected a torch.nn.Module")
    found: dict[str, dict[int, Module]] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise InvalidInput(
                f"model: found {path or kind} compiled by torch.compile, expected no compilation"
            )
        parts = path.split(".")
        place = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        if parts[-1] != "experts" or not place or isinstance(module, torch.nn.ModuleList):
            continue
        layers = found.setdefault(".".join(parts[: place - 1]), {})
        if int(parts[place]) in layers:
            raise InvalidInput(
                f"model: found experts twice in layer {parts[place]}, expected one module, not also {path}"
            )
        layers[int(parts[place])] = module
    if not found:
        raise InvalidInput(
            f"model: found no experts in {type(model).__name__}, expected a model of transformers 5 that has them: "
            f"{FAMILIES} or alike"
        )
    if len(found) > 1:
        raise InvalidInput(
            f"model: found stacks {' and '.join(found)}, expected one; record one of these parts"
        )
    owner, layers = found.popitem()
    return model.get_submodule(owner), dict(sorted(layers.items()))


def num_experts(stack: Module) -> int:
    """Experts of a layer.

    Raises
    ------
    InvalidInput
        When the config says none.
    """
    config = getattr(stack, "config", None)
    for key in _NUM_EXPERTS:
        if isinstance(count := getattr(config, key, None), int):
            return count
    raise InvalidInput(
        f"config of {type(stack).__name__}: found none of {', '.join(_NUM_EXPERTS)}, expected one"
    )


def groups(stack: Module) -> tuple[int, int]:
    """Groups of experts that routers tell apart, and how many of them a token may use."""
    config = getattr(stack, "config", None)
    count = getattr(config, "n_group", None) or 1
    if count == 1 or getattr(config, "topk_method", None) == "greedy":  # DeepSeek-V2-Lite
        return 1, 1
    return count, getattr(config, "topk_group", None) or count


def model_name(stack: Module) -> str | None:
    """What a model is called: the last part of where it was loaded from, or else its kind."""
    config = getattr(stack, "config", None)
    origin = basename(str(getattr(config, "_name_or_path", None) or "").rstrip("/"))
    return origin or getattr(config, "model_type", None)


def end_tokens(model: Module) -> tuple[tuple[int, ...], int | None]:
    """The tokens that end a text, and the one that ``generate`` feeds to rows that have ended.

    As the generation config says; without a pad token ``generate`` takes the first end token.
    """
    configs = (part.generation_config for part in model.modules() if hasattr(part, "generation_config"))
    generation = next(configs, None)
    ends = getattr(generation, "eos_token_id", None)
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    pad = getattr(generation, "pad_token_id", None)
    return ends, ends[0] if pad is None and ends else pad


def real_tokens(mask: Any, batch: int, length: int, past: int) -> Tensor | None:
    """Which tokens of a batch are not padding, ``(batch, length)`` bool; None for all.

    Masks ``(batch, past + length)`` say so themselves. In masks for pairs ``(batch, 1, query, key)``, which
    ``generate`` makes for caches of a fixed size, a token that may not look at itself is padding; they are bool, or
    0 for yes and hugely negative for no.

    Raises
    ------
    InvalidInput
        When the mask is of another kind, or too small.
    """
    if isinstance(mask, dict) and "full_attention" in mask:  # a mask for each kind of layer
        mask = mask["full_attention"]
    if mask is None:
        return None
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) == 2:
        real = mask[:, past : past + length] != 0
    elif len(shape) == 4:
        own = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)
        real = own if own.dtype == import_module("torch").bool else own >= 0
    else:
        raise InvalidInput(
            f"attention_mask: found {type(mask).__name__} of shape {shape}, expected a tensor of 2 or 4 dimensions"
        )
    if real.shape[-1] != length or real.shape[0] not in (1, batch):
        raise InvalidInput(
            f"attention_mask: found shape {shape}, expected {batch} rows of {past} tokens before and {length} now"
        )
    return real.expand(batch, length)
