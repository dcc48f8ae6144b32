"""Train a small Mixture-of-Experts model on text in the Python installation and record its routing.

``python traces/train_tinymoe.py --out tinymoe.npz`` makes a trace in the shape of the one in this folder: 6 layers of
64 experts, 8 of them a token, in OLMoE's recipe (arXiv:2409.02060). Tokens are bytes, and texts are whatever this
Python came with, so that another Python gives another trace. Needs ``pip install 'placer[torch]'``; 500 steps
take about ten minutes on one core.
"""

from __future__ import annotations

import ast
import hashlib
import math
import platform
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import placer

WINDOW, BATCH = 256, 8  # bytes of a sequence, and sequences of a step
HELD_OUT = 8  # one document in so many is left out of training
LARGEST = 3_000_000  # bytes of a domain
PEAK_RATE = 2e-3

Bytes = NDArray[np.uint8]


# -- text ----------------------------------------------------------------------------------------------------


def whole(text: str) -> str:
    """All of a file."""
    return text


def prose(text: str) -> str:
    """The long strings of a Python file: documentation, help texts, licences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strings with odd escapes
        tree = ast.parse(text)
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n\n".join(each for each in strings if isinstance(each, str) and each.count(" ") >= 20)


#: What kinds of text there are: a folder of `sysconfig`, patterns in it, and what of a file is taken.
DOMAINS: dict[str, tuple[str, tuple[str, ...], Callable[[str], str]]] = {
    "library": ("stdlib", ("*.py", "[a-su-z]*/*.py"), whole),
    "prose": ("stdlib", ("*.py", "[a-su-z]*/*.py", "LICENSE.txt"), prose),
    "tables": ("stdlib", ("encodings/*.py",), whole),
    "tests": ("stdlib", ("test/**/*.py",), whole),
    "headers": ("include", ("**/*.h",), whole),
}


def documents(domain: str, largest: int) -> Iterator[tuple[bool, Bytes]]:
    """The texts of a domain, in an order by chance that is always the same, and whether each is held out.

    A file is held out of every domain or of none.
    """
    folder, patterns, part = DOMAINS[domain]
    root = Path(sysconfig.get_path(folder))
    found = {path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern)}
    if domain == "library":
        found = {name for name in found if not name.startswith(("encodings/", "pydoc_data/"))}
    keys = {name: hashlib.sha256(name.encode()).digest() for name in found}
    size = 0
    for name in sorted(found, key=keys.__getitem__):
        try:
            text = part((root / name).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # examples of bad files, which tests come with
            continue
        yield keys[name][-1] % HELD_OUT == 0, np.frombuffer(text.encode(), np.uint8)
        size += len(text)
        if size > largest:
            return


def texts(largest: int) -> dict[str, tuple[Bytes, Bytes]]:
    """For each domain found in this Python: bytes to train on, and held-out windows ``(windows, WINDOW)``."""
    found = {}
    for domain in DOMAINS:
        train, held_out = [np.zeros(0, np.uint8)], [np.zeros((0, WINDOW), np.uint8)]
        for apart, text in documents(domain, largest):
            if apart:
                held_out.append(text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW))
            else:
                train.append(text)
        parts = np.concatenate(train), np.concatenate(held_out)
        if len(parts[0]) > WINDOW and len(parts[1]):
            found[domain] = parts
            click.echo(f"{domain}: {len(parts[0]):,} bytes to train on, {parts[1].size:,} held out", err=True)
    return found


# -- model ---------------------------------------------------------------------------------------------------


def built() -> Any:
    """An untrained model of the size of `tinymoe`, for bytes."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=WINDOW,
        output_router_logits=True,  # adds the loss that balances load
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    kind: Any = OlmoeForCausalLM
    # Of the ways that transformers has to run experts, the fastest to train on a CPU.
    return kind._from_config(config, experts_implementation="grouped_mm")


def train(model: Any, corpora: list[Bytes], steps: int, rng: np.random.Generator) -> None:
    """AdamW over windows drawn from all domains alike, the rate rising for a while, then falling along a cosine."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    begin = time.monotonic()
    for step in range(steps):
        rate = PEAK_RATE * min((step + 1) / 50, 0.525 + 0.475 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [corpora[i] for i in rng.integers(len(corpora), size=BATCH)]
        starts = [int(rng.integers(len(corpus) - WINDOW)) for corpus in chosen]
        rows = [corpus[start : start + WINDOW] for corpus, start in zip(chosen, starts, strict=True)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            click.echo(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - begin:.0f} s", err=True)


def recorded(model: Any, windows: list[Bytes], tokens: int, rng: np.random.Generator) -> placer.Trace:
    """The routing of held-out windows, equally many of each domain and in random order, with their domains."""
    import torch

    share = -(-tokens // (WINDOW * len(windows)))
    pool = [
        (domain, row)
        for domain, rows in enumerate(windows)
        for row in rows[np.sort(rng.permutation(len(rows))[:share])]
    ]
    pool = [pool[i] for i in rng.permutation(len(pool))[: -(-tokens // WINDOW)]]
    model.eval()
    with placer.record(model, max_tokens=tokens) as recorder, torch.no_grad():
        for start in range(0, len(pool), BATCH):
            rows = np.stack([row for _, row in pool[start : start + BATCH]])
            model(input_ids=torch.from_numpy(rows.astype(np.int64)), use_cache=False)
    trace = recorder.trace()
    # Every window is one row of a batch, so that sequences count windows.
    return replace(trace, domain=np.array([domain for domain, _ in pool], np.int8)[trace.sequence])


@click.command()
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The trace to write."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=500, show_default=True, help="Steps of training."
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=107_520,
    show_default=True,
    help="Tokens to record, at most.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--smoke", is_flag=True, help="Two steps and 1,000 tokens, to see that everything runs.")
def main(out: Path, steps: int, tokens: int, seed: int, smoke: bool) -> None:
    """Train a small model on the text of this Python, and write what its routers choose on text held out."""
    import torch

    if smoke:
        steps, tokens = 2, 1000
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    found = texts(LARGEST // 30 if smoke else LARGEST)
    model = built()
    train(model, [corpus for corpus, _ in found.values()], steps, rng)
    trace = recorded(model, [windows for _, windows in found.values()], tokens, rng)
    kinds = ", ".join(f"{number} {domain}" for number, domain in enumerate(found))
    source = (
        f"traces/train_tinymoe.py, {steps} steps, text of Python {platform.python_version()}; domains {kinds}"
    )
    replace(trace, model="tinymoe", source=source, license="MIT").save(out)
    click.echo(
        f"{out}: {trace.num_tokens:,} tokens, {trace.num_layers} layers, {len(found)} domains", err=True
    )


if __name__ == "__main__":
    main()
