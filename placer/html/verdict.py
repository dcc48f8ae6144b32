"""Verdict: one sentence that says whether a placement helps, and the truth when it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from placer.html.numbers import SAME, Numbers, relative

HEAT = 0.005  # a busiest unit this much hotter, as a share of the mean, counts as hotter

WORDS = {
    (-1, -1): "Better",
    (-1, 0): "Better",
    (-1, 1): "A trade",
    (0, -1): "More even load",
    (0, 0): "No difference",
    (0, 1): "Worse",
    (1, -1): "A trade",
    (1, 0): "Worse",
    (1, 1): "Worse",
}
TONES = {"Better": "good", "More even load": "good", "Worse": "bad"}
SYMBOLS = {"good": "\u2714", "bad": "\u2716", "even": "\u2194"}
BETWEEN = {"server": "inter-server traffic", "gpu": "traffic between GPUs"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the top of a page says.

    Parameters
    ----------
    word : str
        The judgement in a word or two.
    tone : {"good", "bad", "even"}
    sentence, step : markup
        Traffic, load and proof; and what becomes of a step's time.
    """

    word: str
    tone: str
    sentence: Any
    step: Any

    @property
    def symbol(self) -> str:
        """The tone for those who see no colours."""
        return SYMBOLS[self.tone]

    @property
    def text(self) -> str:
        """The sentence without markup."""
        return f"{self.word}: {self.sentence.striptags()}."


def verdict(
    numbers: Numbers, level: str, tokens: str, *, usual: str = "contiguous experts", proof: str = ""
) -> Verdict:
    """Judge ``report`` against ``baseline``, both in the document that `numbers` reads.

    Parameters
    ----------
    numbers : Numbers
    level : {"server", "gpu"}
        Whose traffic decides.
    tokens : str
        Which tokens, in words: ``on unseen tokens``.
    usual : str
        What the baseline is, in words.
    proof : str
        What is proved, in words, with ``{gap}`` for the document's ``proof.gap``; empty for nothing.

    Examples
    --------
    >>> report = {"bytes_per_token": {"gpu": 3.0}, "load": {"gpu": {"max_over_mean": 1.5, "worst_layer": 1.6}},
    ...     "seconds": {"step": 2.0}, "tokens_per_gpu": 1, "bottleneck": "gpu links"}
    >>> baseline = report | {"bytes_per_token": {"gpu": 2.0}}
    >>> print(verdict(Numbers({"report": report, "baseline": baseline}), "gpu", "on this trace").text)
    Worse: 50 % more traffic between GPUs than contiguous experts on this trace, busiest GPU 50 % above mean on
    average, 60 % in the worst layer.
    """
    from markupsafe import Markup, escape

    volume, heat = f"bytes_per_token.{level}", f"load.{level}"
    change = relative(numbers.get(f"report.{volume}"), numbers.get(f"baseline.{volume}"))
    means = [numbers.get(f"{which}.{heat}.max_over_mean") for which in ("report", "baseline")]
    steps = relative(numbers.get("report.seconds.step"), numbers.get("baseline.seconds.step"))
    word = _word(change, means[0] - means[1], 0.0 if steps is None else steps)
    if not numbers.get(f"report.{volume}") and not change:
        first = Markup("no {} at all").format(BETWEEN[level])
    elif change is None:
        first = Markup("{} where {} have none").format(BETWEEN[level], usual)
    elif abs(change) < SAME:
        first = Markup("the same {} as {}").format(BETWEEN[level], usual)
    else:
        amount = numbers.change(f"report.{volume}", f"baseline.{volume}", "less")
        first = Markup("{} {} {} than {}").format(
            amount, "less" if change < 0 else "more", BETWEEN[level], usual
        )
    mean, worst = (numbers.value(f"report.{heat}.{key}", "above") for key in ("max_over_mean", "worst_layer"))
    unit = "GPU" if level == "gpu" else level
    load = Markup("busiest {} {} above mean on average, {} in the worst layer").format(unit, mean, worst)
    if means[0] - means[1] > HEAT:
        load += Markup(" (contiguous: {} and {})").format(
            *(numbers.value(f"baseline.{heat}.{key}", "above") for key in ("max_over_mean", "worst_layer"))
        )
    sentence = Markup("{} {}, {}").format(first, tokens, load)
    if proof:
        gap = numbers.value("proof.gap", "gap")
        sentence += ", " + Markup(str(escape(proof))).format(gap=gap)
    tone = TONES.get(word, "even")
    return Verdict(word=word, tone=tone, sentence=sentence, step=_step(numbers))


def _word(traffic: float | None, heat: float, step: float) -> str:
    """The judgement on changes of traffic, load and step; where they disagree a longer step is worse."""
    word = WORDS[_sign(traffic, SAME, unknown=1), _sign(heat, HEAT)]
    if step <= SAME:
        return word
    return {"A trade": "Worse", "Better": "A trade", "More even load": "A trade"}.get(word, word)


def _step(numbers: Numbers) -> Any:
    from markupsafe import Markup

    before, after = "baseline.seconds.step", "report.seconds.step"
    change = relative(numbers.get(after), numbers.get(before))
    now = numbers.value(after, "seconds")
    if change is None or abs(change) < SAME:
        said = Markup("A modelled step takes {}, as with contiguous experts").format(now)
    else:
        amount, way = numbers.change(after, before, "less"), "less" if change < 0 else "more"
        said = Markup("A modelled step takes {} instead of {}, {} {}").format(
            now, numbers.value(before, "seconds"), amount, way
        )
    bottleneck = numbers.get("report.bottleneck")
    return (
        said + Markup("; most of it goes to {}.").format(bottleneck) if bottleneck != "none" else said + "."
    )


def _sign(value: float | None, least: float, unknown: int = 0) -> int:
    if value is None:
        return unknown
    return 0 if abs(value) <= least else 1 if value > 0 else -1
