"""What a trace says about traffic: counts that add up over shards, and the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput

if TYPE_CHECKING:
    import networkx as nx

    from placer.trace import Trace

_CHUNK_TOKENS = 1 << 16  # tokens of one layer converted at a time, so that memory stays bounded


@dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """Load, co-activation and transitions of every layer; ``a + b`` merges two shards.

    Parameters
    ----------
    num_tokens : int
        Tokens counted.
    load : (num_layers, num_experts) int64
        Tokens that use each expert.
    pairs : (num_layers, num_experts, num_experts) int64, optional
        Tokens that use both experts; symmetric, zero diagonal. None when only counts are known.
    transitions : (num_layers - 1, num_experts, num_experts) int64, optional
        Tokens that use expert e in a layer and expert f in the next one.

    Examples
    --------
    >>> from placer import Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[0, 2]]]), num_experts=3)
    >>> traffic = Traffic.from_trace(trace)
    >>> traffic.load.tolist(), traffic.pairs[0, 0].tolist()
    ([[2, 1, 1]], [0, 1, 1])
    >>> (traffic + traffic).load.tolist()
    [[4, 2, 2]]
    """

    num_tokens: int
    load: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64] | None = None
    transitions: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.load.ndim != 2 or self.load.dtype.kind not in "iu" or (self.load < 0).any():
            raise InvalidInput(
                f"load: found {self.load.dtype} of shape {self.load.shape}, expected counts (num_layers, num_experts)"
            )
        layers, experts = self.load.shape
        for name, rows in (("pairs", layers), ("transitions", layers - 1)):
            table = getattr(self, name)
            if table is not None and table.shape != (rows, experts, experts):
                raise InvalidInput(f"{name}: found shape {table.shape}, expected {(rows, experts, experts)}")
        for name in ("load", "pairs", "transitions"):
            if getattr(self, name) is not None:
                view = getattr(self, name).view()
                view.setflags(write=False)
                object.__setattr__(self, name, view)

    @classmethod
    def from_trace(cls, trace: Trace, *, transitions: bool = False) -> Traffic:
        """Count a trace; transitions between layers only on request, since they cost the most."""
        from placer.search.counting import count_pairs, count_transitions

        layers, experts = trace.num_layers, trace.num_experts
        load = np.zeros((layers, experts), np.int64)
        pairs = np.zeros((layers, experts * experts), np.uint32)
        moves = np.zeros((layers - 1, experts, experts), np.int64) if transitions else None
        width = (0,) * trace.top_k
        for start in range(0, trace.num_tokens, _CHUNK_TOKENS):
            chunk = trace.topk_idx[start : start + _CHUNK_TOKENS]
            for layer in range(layers):
                tokens = np.ascontiguousarray(chunk[:, layer], dtype=np.int32)
                used = tokens[tokens >= 0]
                load[layer] += np.bincount(used, minlength=experts)
                count_pairs(tokens, width, pairs[layer])
                if moves is not None and layer + 1 < layers:
                    count_transitions(tokens, chunk[:, layer + 1].astype(np.int32), moves[layer])
        table = pairs.reshape(layers, experts, experts).astype(np.int64)
        table += table.transpose(0, 2, 1).copy()
        return cls(num_tokens=trace.num_tokens, load=load, pairs=table, transitions=moves)

    def __add__(self, other: Traffic) -> Traffic:
        if not isinstance(other, Traffic):
            return NotImplemented
        if self.load.shape != other.load.shape:
            raise InvalidInput(
                f"traffic: found loads of shape {other.load.shape}, expected {self.load.shape}"
            )

        def both(a: Any, b: Any) -> Any:
            return None if a is None or b is None else a + b

        return Traffic(
            num_tokens=self.num_tokens + other.num_tokens,
            load=self.load + other.load,
            pairs=both(self.pairs, other.pairs),
            transitions=both(self.transitions, other.transitions),
        )

    def coactivation_graph(self, layer: int) -> nx.Graph:
        """The co-activation graph of one layer.

        Nodes are experts with attribute ``load`` (tokens); an edge's ``weight`` is the number of tokens
        that use both ends.

        Examples
        --------
        >>> from placer import Trace
        >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[0, 2]]]), num_experts=3)
        >>> sorted(Traffic.from_trace(trace).coactivation_graph(0).edges(data="weight"))
        [(0, 1, 1), (0, 2, 1)]
        """
        import networkx as nx

        if self.pairs is None:
            raise InvalidInput("co-activation: found loads only, expected pair counts (made from a trace)")
        graph: nx.Graph = nx.Graph()
        for expert, load in enumerate(self.load[layer].tolist()):
            graph.add_node(expert, load=load)
        left, right = np.nonzero(np.triu(self.pairs[layer]))
        weight = self.pairs[layer][left, right]
        graph.add_weighted_edges_from(zip(left.tolist(), right.tolist(), weight.tolist(), strict=True))
        return graph


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """The tokens themselves, each with the key of its sequence; ``a + b`` appends.

    Parameters
    ----------
    topk_idx : (num_tokens, num_layers, top_k) integer
        Logical experts of each token, -1 = none.
    key : (num_tokens,) uint64
        Hash of the token's source and sequence: the order in which sequences are sampled, so that a sample
        of merged routes does not depend on the order of merging.
    num_experts : int
        Logical experts per layer.
    step : (num_tokens,) integer, optional
        Engine step of each token. Routes that are merged number their steps alike.
    """

    topk_idx: npt.NDArray[Any]
    key: npt.NDArray[np.uint64]
    num_experts: int
    step: npt.NDArray[Any] | None = None

    @classmethod
    def from_trace(cls, trace: Trace) -> Routes:
        """The routes of a trace."""
        return cls(
            topk_idx=trace.topk_idx,
            key=trace.sequence_key(),
            num_experts=trace.num_experts,
            step=trace.step,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens."""
        return int(self.topk_idx.shape[0])

    def __add__(self, other: Routes) -> Routes:
        if not isinstance(other, Routes):
            return NotImplemented
        if self.num_experts != other.num_experts or self.topk_idx.shape[1:] != other.topk_idx.shape[1:]:
            raise InvalidInput(
                f"routes: found {other.num_experts} experts and (layers, top_k) {other.topk_idx.shape[1:]}, "
                f"expected {self.num_experts} and {self.topk_idx.shape[1:]}"
            )
        ids = [self.topk_idx, other.topk_idx]
        if ids[0].dtype != ids[1].dtype:
            ids = [part.astype(np.int32) for part in ids]
        return Routes(
            topk_idx=np.concatenate(ids),
            key=np.concatenate([self.key, other.key]),
            num_experts=self.num_experts,
            step=None if self.step is None or other.step is None else np.concatenate([self.step, other.step]),
        )

    def sample(self, budget: int) -> Routes:
        """Whole sequences with the smallest keys, until `budget` tokens are reached (the last may pass it).

        Samples of shards, merged and sampled again, give the sample of the whole.
        """
        if budget >= self.num_tokens:
            return self
        keys, counts = np.unique(self.key, return_counts=True)
        before = np.cumsum(counts) - counts
        last = keys[max(1, int((before < budget).sum())) - 1]
        keep = self.key <= last
        return Routes(
            topk_idx=self.topk_idx[keep],
            key=self.key[keep],
            num_experts=self.num_experts,
            step=None if self.step is None else self.step[keep],
        )
