"""Recording which experts the tokens of a running model choose.

In models of Hugging Face transformers 5 the experts of a layer are a module that is called with hidden states, ids and
weights. A hook on each keeps the ids, so what is recorded is what the model used, whatever scores, biases and groups
led to it. Two more hooks, on the module that runs the layers, tell where a forward begins and ends, which tokens are
padding, and which sequences go on.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from placer import routing
from placer.errors import InvalidInput
from placer.routing import Module, Tensor
from placer.trace import Trace

_IN_FLIGHT = 4  # forwards whose copies from the GPU nobody waits for


@contextmanager
def record(model: Module, *, weights: bool = False, max_tokens: int | None = None) -> Iterator[Recorder]:
    """Record the routing of a model of Hugging Face transformers while it runs inside the block.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, DeepSeek-V3, gpt-oss, GLM-4-MoE, and other models of
    transformers 5 with experts like theirs; alone, or inside a wrapper. Inference, ``generate`` and training are
    recorded, and what gradient checkpointing computes again is not recorded again.

    Each row of a batch is a sequence, and goes on where the model is called with the same cache again. Padding is left
    out: tokens that ``attention_mask`` masks, and pad tokens that follow an end token, one a step, with which
    ``generate`` fills up rows that have ended (both tokens as the model's generation config has them). Documents packed
    into one row count as one sequence. A forward that ends in an error is left out whole.

    Parameters
    ----------
    model : torch.nn.Module
        The model before any ``torch.compile``, which skips hooks.
    weights : bool
        Record the weights of the experts too, as float32.
    max_tokens : int, optional
        Record the first so many tokens; then the model runs on unrecorded. This bounds memory.

    Yields
    ------
    Recorder
        Ask it for its `trace`, inside the block or after it.

    Raises
    ------
    InvalidInput
        When torch is missing, or the model is compiled or has no experts known here. Inside the block, when the model
        runs in a way that cannot be followed, such as with a mask that does not fit.

    Examples
    --------
    >>> model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924")  # doctest: +SKIP
    >>> with placer.record(model, max_tokens=100_000) as recorder:  # doctest: +SKIP
    ...     for batch in batches:
    ...         model.generate(**batch, max_new_tokens=64)
    >>> recorder.trace().save("trace.npz")  # doctest: +SKIP
    """
    if max_tokens is not None and not (type(max_tokens) is int and max_tokens > 0):
        raise InvalidInput(f"max_tokens: found {max_tokens!r}, expected a whole number from 1")
    stack, by_layer = routing.find_experts(model)
    recorder = Recorder(stack, by_layer, routing.end_tokens(model), weights, max_tokens)
    with ExitStack() as hooks:
        hooks.callback(stack.register_forward_pre_hook(recorder._begin, with_kwargs=True).remove)
        hooks.callback(stack.register_forward_hook(recorder._end, always_call=True).remove)
        for layer, experts in by_layer.items():
            # In front of hooks by which expert parallelism sends tokens to other ranks.
            handle = experts.register_forward_pre_hook(
                recorder._routed(layer), with_kwargs=True, prepend=True
            )
            hooks.callback(handle.remove)
        yield recorder


@dataclass
class _Rows:
    """The sequences in the rows of a batch, and which of them `generate` only fills up; None for none."""

    sequence: NDArray[np.int32]
    ended: Tensor | None = None


@dataclass(kw_only=True)
class _Forward:
    """One run of the layers so far; `keep` is None where no token is padding."""

    rows: _Rows
    length: int
    past: int
    keep: Tensor | None
    cache: Any
    ids: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Copy:
    """What one forward chose, on the CPU, or on its way there until `ready`."""

    ids: Tensor
    weights: Tensor | None
    keep: Tensor | None
    ready: Any
    sequence: NDArray[np.int32]
    step: int


class Recorder:
    """What `record` has recorded so far; made by it, for the module that runs the layers and their routing."""

    def __init__(
        self,
        stack: Module,
        layers: Iterable[int],
        end_tokens: tuple[tuple[int, ...], int | None],
        weights: bool,
        max_tokens: int | None,
    ) -> None:
        self._torch: Any = import_module("torch")
        self._signature = inspect.signature(stack.forward)
        self._model = routing.model_name(stack)
        self._layers = tuple(layers)
        self._num_experts = routing.num_experts(stack)
        self._groups = routing.groups(stack)
        self._ends, self._filler = end_tokens
        self._weights = weights
        self._most = max_tokens
        self._forward: _Forward | None = None
        self._known: WeakKeyDictionary[Any, _Rows] = WeakKeyDictionary()  # by cache, as long as it lives
        self._top_k: int | None = None
        self._steps = 0
        self._sequences = 0
        self._tokens = 0
        self._phases: set[str] = set()
        self._copies: deque[_Copy] = deque()
        self._parts: dict[str, list[NDArray[Any]]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far."""
        self._settle()
        return self._tokens

    def trace(self) -> Trace:
        """What was recorded, as a trace.

        Layers carry the model's own numbers, `sequence` counts rows of batches, `step` counts forwards. The experts of
        a token stand in the model's order, which need not be that of their weights.

        Raises
        ------
        InvalidInput
            When no token was recorded, or an expert that the model's config does not know.
        """
        self._settle()
        if not self._tokens:
            raise InvalidInput(
                "recorder: found no token, expected the model to run inside the block of record"
            )
        # The joined arrays replace their parts, so that asking often costs no memory.
        self._parts = {key: [np.concatenate(parts)] for key, parts in self._parts.items()}
        arrays: dict[str, Any] = {key: parts[0] for key, parts in self._parts.items()}
        return Trace(
            **arrays,
            num_experts=self._num_experts,
            model=self._model,
            num_groups=self._groups[0],
            topk_groups=self._groups[1],
            layer_ids=self._layers,
            phase=next(iter(self._phases)) if len(self._phases) == 1 else None,
            source="placer.record",
            name=self._model or "trace",
        )

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _begin(self, stack: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run before the layers."""
        self._forward = None
        if self._most is not None and self._tokens >= self._most:
            return
        # A compiler that traces this meets an error, gives up, and has the model run as it is, which is recorded.
        if self._torch.compiler.is_compiling():
            raise InvalidInput("model: found torch.compile at work, expected no compilation")
        # Backward passes run the model only where checkpointing computes something again.
        if self._torch._C._current_graph_task_id() >= 0:
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        tokens, cache = given.get("input_ids"), given.get("past_key_values")
        inputs = given.get("inputs_embeds") if tokens is None else tokens
        if inputs is None:  # which the model refuses next
            return
        batch, length = inputs.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        keep = routing.real_tokens(given.get("attention_mask"), batch, length, past)
        rows = self._rows(batch, cache if past else None)
        if not past or length > 1 or tokens is None:
            rows.ended = None
        else:
            keep = self._without_filler(tokens, rows, keep)
        self._forward = _Forward(rows=rows, length=length, past=past, keep=keep, cache=cache)

    def _routed(self, layer: int) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        """What runs before the experts of a layer."""

        def hook(experts: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = self._forward
            if forward is None:  # checkpointing computes it again, or somebody calls a part of the model
                return
            where = f"layer {layer}: {type(experts).__name__}"
            if layer in forward.ids:
                raise InvalidInput(f"{where} ran twice in one forward, expected once")
            ids, weights = self._checked(where, (*args, *kwargs.values()))
            batch = len(forward.rows.sequence)
            if len(ids) != batch * forward.length:
                raise InvalidInput(
                    f"{where} got {len(ids)} tokens, expected a batch of {batch} x {forward.length}"
                )
            forward.ids[layer] = ids.detach().to(self._torch.int16)
            if self._weights:
                forward.weights[layer] = weights.detach().float()

        return hook

    def _checked(self, where: str, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Ids and weights, ``(tokens, top_k)``, in what experts are called with."""
        if len(given) != 3 or not all(map(self._torch.is_tensor, given)):
            kinds = ", ".join(type(each).__name__ for each in given)
            raise InvalidInput(f"{where} is called with ({kinds}), expected hidden states, ids and weights")
        _, ids, weights = given
        if ids.is_floating_point() or ids.dim() != 2 or ids.shape != weights.shape:
            raise InvalidInput(
                f"{where} is called with ids {ids.dtype} {tuple(ids.shape)} and weights {tuple(weights.shape)}, "
                "expected integers and floats of shape (tokens, top_k)"
            )
        top_k = int(ids.shape[1])
        if self._top_k not in (None, top_k):
            raise InvalidInput(
                f"{where} is called with {top_k} experts a token, expected {self._top_k} as before"
            )
        self._top_k = top_k
        return ids, weights

    def _end(self, stack: Module, args: tuple[Any, ...], output: Any) -> None:
        """Run after the layers, also when they end in an error and there is no output."""
        forward, self._forward = self._forward, None
        if forward is None or output is None:
            return
        missing = [layer for layer in self._layers if layer not in forward.ids]
        if missing:
            raise InvalidInput(
                f"layer {missing[0]}: its experts were not called in a forward, expected those of all "
                f"{len(self._layers)} MoE layers, run by the code of transformers and no fused kernel"
            )
        cache = getattr(output, "past_key_values", None) if forward.cache is None else forward.cache
        if cache is not None:
            self._known[cache] = forward.rows
        ids = self._joined(forward.ids)
        copy = _Copy(
            ids=_sent(ids),
            weights=_sent(self._joined(forward.weights)) if self._weights else None,
            keep=None if forward.keep is None else _sent(forward.keep.to(ids.device)),
            ready=self._torch.cuda.Event() if ids.is_cuda else None,
            sequence=np.repeat(forward.rows.sequence, forward.length),
            step=self._steps,
        )
        if copy.ready is not None:
            copy.ready.record(self._torch.cuda.current_stream(ids.device))
        self._copies.append(copy)
        self._steps += 1
        self._phases.add("decode" if forward.past else "prefill")
        self._settle(0 if copy.ready is None else _IN_FLIGHT)

    # -- what they keep ------------------------------------------------------------------------------------------

    def _joined(self, rows: dict[int, Tensor]) -> Tensor:
        """Layers side by side, ``(tokens, layers, top-k)``, on the device of the last one."""
        device = rows[self._layers[-1]].device
        return self._torch.stack([rows[layer].to(device, non_blocking=True) for layer in self._layers], dim=1)

    def _rows(self, batch: int, cache: Any) -> _Rows:
        """The rows of a filled cache, or new ones."""
        rows = None if cache is None else self._known.get(cache)
        if rows is not None and len(rows.sequence) == batch:
            return rows
        first, self._sequences = self._sequences, self._sequences + batch
        return _Rows(np.arange(first, first + batch, dtype=np.int32))

    def _without_filler(self, tokens: Tensor, rows: _Rows, keep: Tensor | None) -> Tensor | None:
        """What to keep of a step of single tokens ``(batch, 1)``; takes note of the rows that end with it."""
        ended = rows.ended
        for end in self._ends:
            rows.ended = tokens == end if rows.ended is None else rows.ended | (tokens == end)
        if ended is None:
            return keep
        goes_on = (tokens != self._filler) | ~ended
        return goes_on if keep is None else keep.to(goes_on.device) & goes_on

    def _settle(self, in_flight: int = 0) -> None:
        """Take over all copies but the latest few, without their padding."""
        while len(self._copies) > in_flight:
            copy = self._copies.popleft()
            if copy.ready is not None:
                copy.ready.synchronize()
            kept = np.arange(len(copy.ids)) if copy.keep is None else np.flatnonzero(copy.keep.numpy())
            if self._most is not None:
                kept = kept[: self._most - self._tokens]
            ids = copy.ids.numpy()[kept]
            if ids.size and not 0 <= ids.min() <= ids.max() < self._num_experts:
                raise InvalidInput(
                    f"step {copy.step}: found experts {ids.min()} to {ids.max()}, "
                    f"expected 0 to {self._num_experts - 1} as the config says"
                )
            parts = {
                "topk_idx": ids.astype(np.uint8 if self._num_experts <= 256 else np.int16),
                "sequence": copy.sequence[kept],
                "step": np.full(len(kept), copy.step, np.int32),
            }
            if copy.weights is not None:
                parts["topk_weights"] = copy.weights.numpy()[kept]
            for key, part in parts.items():
                self._parts.setdefault(key, []).append(part)
            self._tokens += len(kept)


def _sent(tensor: Tensor) -> Tensor:
    """A tensor on its way to the CPU; only from CUDA, where an event tells that it has arrived, nobody waits for it."""
    return tensor.to("cpu", non_blocking=tensor.is_cuda)
