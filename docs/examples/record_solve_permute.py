"""Record a model, place its experts, and permute its checkpoint, so that any stack has the placement.

``python docs/examples/record_solve_permute.py`` takes less than a minute on a CPU, with a random model; any checkpoint
in a folder takes its place. Needs ``pip install 'placer[torch]'``.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import placer

SHAPE = "1x4x2"  # one rack of four servers with two GPUs each


def random_checkpoint(folder: Path) -> None:
    """A tiny model, for trying this out: 2 layers of 32 experts, 4 of them a token."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=32,
        num_experts_per_tok=4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)


def record(model: Any, texts: torch.Tensor) -> placer.Trace:
    """What the routers choose for texts ``(batches, rows, tokens)``; each row of a batch is a sequence."""
    with placer.record(model) as recorder, torch.no_grad():
        for batch in texts:
            model(batch, use_cache=False)
    return recorder.trace()


def main() -> None:
    """Record, solve, permute, and record again."""
    # Any text does, as long as it is like what the model will see; here it is Python, byte by byte.
    text = Path(ast.__file__).read_bytes()[: 64 * 64 * 8]
    batches = torch.tensor(list(text)).reshape(-1, 8, 64)

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before"), Path(folder, "after")
        random_checkpoint(before)
        model: Any = AutoModelForCausalLM.from_pretrained(before)

        # 1. Record, and keep sequences aside: a placement is judged on tokens that it was not fitted on.
        trace = record(model, batches)
        fitted, unseen = trace.split(0.5)

        # 2. Solve, for traffic between servers with at most 10 % more load than the mean.
        topology = placer.Topology.load("dgx-h100").with_shape(SHAPE)
        problem = placer.Problem.from_trace(fitted, topology, max_load=1.1, load_margin=0.0)
        placement = placer.solve(problem, budget=placer.Budget(seconds=None, rounds=1)).placement
        contiguous = placer.solve(problem, "linear").placement

        # 3. Permute: experts and router rows in the order of the placement, everything else as it was.
        placer.permute(before, placement, after)

        # 4. The permuted model is the same function, and the contiguous layout of its experts is the placement.
        permuted: Any = AutoModelForCausalLM.from_pretrained(after)
        with torch.no_grad():
            difference = (model(batches[0]).logits - permuted(batches[0]).logits).abs().max().item()
        again = record(permuted, batches).split(0.5)[1]
        reports = [placer.evaluate(contiguous, tokens, topology) for tokens in (unseen, again)]

    click.echo(f"recorded {trace.num_tokens:,} tokens, solved on {fitted.num_tokens:,} of them")
    click.echo(f"largest difference of logits: {difference:.1e}")
    click.echo(f"servers a token touches, and the busiest one's load, on {unseen.num_tokens:,} other tokens:")
    for name, report in zip(("as it was", "permuted"), reports, strict=True):
        load = report.load["server"]["max_over_mean"]
        click.echo(f"  checkpoint {name:9}  {report.touched['server']:.3f}  {load:.3f} times the mean")


if __name__ == "__main__":
    main()
