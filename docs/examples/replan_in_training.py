"""Plan again where experts live while a model trains, since its routing drifts.

``python docs/examples/replan_in_training.py`` takes less than a minute on a CPU, with a tiny model. Needs
``pip install 'placer[torch]'``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import placer

STEPS, EVERY, RECORDED = 120, 30, 5  # plan every 30 steps, on what 5 of them recorded
BATCH, LENGTH = 16, 64


def tiny_model() -> Any:
    """2 layers of 32 experts, 4 of them a token."""
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
        output_router_logits=True,  # adds the loss that balances load
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def moved(old: placer.Placement, new: placer.Placement) -> int:
    """Experts that another GPU holds now, over all layers: what a plan costs before it saves anything."""
    gpus = [plan.logical_to_physical[:, :, 0] // plan.slots_per_rank for plan in (old, new)]
    return int((gpus[0] != gpus[1]).sum())


def main() -> None:
    """Train; at every plan, say what the tokens recorded since then cost without it and with it."""
    text = torch.tensor(list(Path(ast.__file__).read_bytes()))
    draw = torch.Generator().manual_seed(0)
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    topology = placer.Topology.load("dgx-h100").with_shape("1x4x2")

    def train_step() -> float:
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=draw)
        tokens = torch.stack([text[start : start + LENGTH] for start in starts])
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def cost(plan: placer.Placement, trace: placer.Trace) -> str:
        report = placer.evaluate(plan, trace, topology)
        return f"{report.remote['server']:.3f} / {report.load['server']['max_over_mean']:.2f}"

    plan = contiguous = None
    click.echo(
        "other servers a token is sent to / the busiest server's load, on the tokens of the latest steps"
    )
    click.echo("step   loss    contiguous  plan in force      new plan  experts moved")
    for step in range(EVERY, STEPS + 1, EVERY):
        for _ in range(EVERY - RECORDED):
            train_step()
        with placer.record(model) as recorder:  # hooks are there for these steps only
            loss = np.mean([train_step() for _ in range(RECORDED)])
        trace = recorder.trace()

        problem = placer.Problem.from_trace(trace, topology, max_load=1.1, load_margin=0.0)
        if plan is None or contiguous is None:
            plan = contiguous = placer.solve(problem, "linear").placement
        # The search begins at the plan in force.
        budget = placer.Budget(seconds=None, rounds=1)
        new = placer.solve(problem, "tabu", budget=budget, initial=plan).placement
        costs = "  ".join(f"{cost(each, trace):>12}" for each in (contiguous, plan, new))
        click.echo(f"{step:4d}  {loss:5.2f}  {costs}  {moved(plan, new):13d}")
        plan = new  # here a stack would move the weights


if __name__ == "__main__":
    main()
