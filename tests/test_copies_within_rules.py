"""Copies within rules: where an expert may stand by plain loops, and what is found against all contents there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer import Budget, Placement, Problem, copies, gpus, solve
from placer.clock import Clock
from placer.constraints import Apart, Constraints, Free, Pin
from placer.errors import Infeasible, InvalidInput
from placer.layer import Layer
from placer.rules import Rules
from placer.search.copies import CLOSED, anneal_copies, may_take
from placer.search.dispatch import RULES
from placer.tables import judged
from tests.instances import noisy_trace, problem

Shape = tuple[int, int, int]
Ints = npt.NDArray[np.int64]
Slots = npt.NDArray[np.int32]

QUICK = Budget(seconds=None, rounds=1)
# Shape, slots of a GPU, experts: servers of one, two and four GPUs, racks, and one server, whose GPUs are units.
SHAPES: tuple[tuple[Shape, int, int], ...] = (
    ((1, 4, 1), 5, 12),
    ((1, 4, 2), 3, 16),
    ((2, 2, 2), 3, 16),
    ((1, 2, 4), 3, 16),
    ((1, 1, 4), 5, 12),
    ((2, 4, 1), 2, 12),
    ((1, 3, 4), 1, 8),
    ((1, 8, 1), 1, 6),
)


# -- random rules, and the same as plain loops -------------------------------------------------------------------


def ranks_of(shape: Shape, level: str) -> int:
    return {"gpu": 1, "server": shape[2], "rack": shape[1] * shape[2]}[level]


def drawn_rules(rng: np.random.Generator, shape: Shape, slots: int, experts: int) -> Constraints:
    """Up to three pins, up to three groups kept apart, and slots or whole GPUs that stay empty in half of all draws."""
    ranks = shape[0] * shape[1] * shape[2]

    def some(most: int, least: int = 1) -> tuple[int, ...]:
        number = int(rng.integers(least, max(least, most) + 1))
        return tuple(rng.choice(experts, min(number, experts), replace=False).tolist())

    pins, apart = [], []
    for level in rng.choice(["gpu", "server", "rack"], int(rng.integers(0, 4))).tolist():
        pins.append(
            Pin(experts=some(3), level=level, unit=int(rng.integers(ranks // ranks_of(shape, level))))
        )
    for level in rng.choice(["gpu", "server", "rack"], int(rng.integers(0, 4))).tolist():
        if (units := ranks // ranks_of(shape, level)) > 1:
            apart.append(Apart(experts=some(min(units, 6), 2), level=level))
    shut = tuple(rng.choice(ranks, min(ranks, int(rng.integers(1, 3))), replace=False).tolist())
    most = None if rng.random() < 0.5 else int(rng.integers(1, slots + 1))
    free = (Free(gpus=shut, slots=most),) if rng.random() < 0.5 else ()
    return Constraints(pin=tuple(pins), apart=tuple(apart), free=free)


def posed(case: tuple[Shape, int, int], seed: int, rules: Constraints | None, **options: object) -> Problem:
    shape, slots, experts = case
    trace = noisy_trace(num_experts=experts, top_k=3, tokens=120, layers=1, seed=seed)
    return problem(
        trace, "x".join(map(str, shape)), **{"slots_per_gpu": slots, "constraints": rules, **options}
    )


def drawn(seed: int, **options: object) -> tuple[Problem, Constraints, Shape] | None:
    """A problem under rules; None where they cannot be kept."""
    case = SHAPES[seed % len(SHAPES)]
    rules = drawn_rules(np.random.default_rng(seed), *case)
    try:
        return posed(case, seed, rules, **options), rules, case[0]
    except (Infeasible, InvalidInput):
        return None


def layer_drawn(seed: int) -> Layer:
    """The layer of a problem under rules that can be kept."""
    found = drawn(seed)
    assume(found is not None)
    assert found is not None
    return found[0].layer(0)


def units_keep(rows: Sequence[Sequence[int]], rules: Constraints, shape: Shape) -> bool:
    """Whether pins, and experts kept apart in units or more, are as asked; rows are the experts of each unit."""
    ranks = shape[0] * shape[1] * shape[2] // len(rows)  # of a unit

    def inside(unit: int, level: str, number: int) -> bool:
        size = ranks_of(shape, level)
        if size < ranks:
            return number * size // ranks == unit
        return unit * ranks // size == number

    for pin in rules.pin:
        for unit, row in enumerate(rows):
            if {*row} & {*pin.experts} and not inside(unit, pin.level, pin.unit):
                return False
    for apart in rules.apart:
        size = ranks_of(shape, apart.level)
        for one, other in combinations(apart.experts, 2) if size >= ranks else ():
            both = [{unit * ranks // size for unit, row in enumerate(rows) if e in row} for e in (one, other)]
            if both[0] & both[1]:
                return False
    return True


def gpus_suffice(rows: Sequence[Sequence[int]], rules: Constraints, open_gpus: Sequence[int]) -> bool:
    """Whether no unit holds more experts that are to stand on GPUs of their own than it has open ones."""
    groups = [{*apart.experts} for apart in rules.apart if apart.level == "gpu"]
    return all(
        len({*row} & group) <= most for row, most in zip(rows, open_gpus, strict=True) for group in groups
    )


def partners(expert: int, rules: Constraints) -> set[int]:
    """Experts that are to stand on other GPUs than this one."""
    groups = [{*apart.experts} for apart in rules.apart if apart.level == "gpu" and expert in apart.experts]
    return set().union(*groups) - {expert}


def plain_rows(content: Ints) -> list[list[int]]:
    return [[e for e in row if e >= 0] for row in content.tolist()]


def machine_of(layer: Layer) -> copies._Machine:
    return copies._Machine.of(layer)


def started(layer: Layer, machine: copies._Machine) -> Ints:
    """What units hold in an arrangement that keeps all rules."""
    assert layer.rules is not None
    return machine.content(layer.slots(layer.rules.start))


# -- where an expert may stand -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_an_expert_may_be_taken_where_pins_and_partners_let_it(seed: int) -> None:
    """Partners are few enough where GPUs with an open slot are more than those in the unit already."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 4, 3).tolist())
    units, ranks, slots = shape[0] * shape[1], shape[2], int(rng.integers(3, 5))
    experts = min(7, units * ranks * slots)
    rules = drawn_rules(rng, shape, slots, experts)
    low, high = (
        np.zeros(units * ranks * slots, np.int32),
        np.full(units * ranks * slots, units * ranks * slots),
    )
    for pin in rules.pin:
        size = ranks_of(shape, pin.level) * slots
        low[list(pin.experts)], high[list(pin.experts)] = pin.unit * size, (pin.unit + 1) * size
    last_pin = {e: pin for pin in rules.pin for e in pin.experts}
    shut = rng.random(units * ranks * slots) < 0.3
    made = Rules(
        num_experts=experts,
        low=low,
        high=high.astype(np.int32),
        shut=shut,
        apart=[(a.experts, ranks_of(shape, a.level) * slots) for a in rules.apart],
        start=low,
    )
    room = (~shut).reshape(units, ranks, slots).any(axis=2).sum(axis=1)
    holders = {
        e: {*rng.choice(units, int(rng.integers(0, units + 1)), replace=False).tolist()}
        for e in range(experts)
    }
    where = np.array([sum(1 << u for u in holders[e]) for e in range(experts)], np.uint64)
    limits = (*copies._limits(made, ranks * slots), room.astype(np.int64))
    for f, u, e, v in product(range(experts), range(units), range(-1, experts), range(-1, units)):
        if f == e or v == u or (e >= 0 and u not in holders[e]) or (e < 0 <= v):
            continue
        then = {g: (held - {u}) | ({v} - {-1}) if g == e else held for g, held in holders.items() if g != f}
        pinned = last_pin.get(f)
        allowed = pinned is None or u in {
            r // ranks
            for r in range(
                pinned.unit * ranks_of(shape, pinned.level), (pinned.unit + 1) * ranks_of(shape, pinned.level)
            )
        }
        beside: set[int] = set()
        for apart in (a for a in rules.apart if f in a.experts):
            others = {g for g in apart.experts if g != f}
            if apart.level == "gpu":
                beside |= {g for g in others if u in then[g]}
            else:
                span = ranks_of(shape, apart.level) // ranks
                allowed &= not any(w // span == u // span for g in others for w in then[g])
        assert may_take(f, u, e, v, where, limits) == (allowed and len(beside) < room[u])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_an_expert_alone_keeps_the_rules_where_its_unit_and_seat_allow_it(seed: int) -> None:
    layer = layer_drawn(seed)
    machine = machine_of(layer)
    assert layer.rules is not None
    assert machine.limits is not None
    allowed, each = machine.limits[0], layer.slots_per_rank
    for expert, at in product(range(layer.num_experts), range(layer.num_slots)):
        unit, gpu = at // machine.width, at % machine.width // each
        kept = bool(int(allowed[expert]) >> unit & 1) and machine.seat[expert] in (-1, gpu)
        slots = np.full(layer.num_slots, -1, np.int32)
        slots[at] = expert
        assert layer.rules.keeps(slots) == (kept and not machine.shut[unit, at % machine.width])
    assert machine.room.sum() == (~machine.shut).sum()


def test_slower_gpus_and_servers_begin_with_the_load_that_their_caps_lack() -> None:
    made = problem(noisy_trace(layers=1), "1x2x2", slots_per_gpu=5, max_load=1.3)
    speeds = (1.0, 2.0, 2.0, 3.0)
    layer = replace(made, topology=replace(made.topology, gpu_speeds=speeds)).layer(0)
    machine = machine_of(layer)
    gpu, server = layer.caps[:2]
    assert machine.gpu_idle == pytest.approx(gpu * np.array([[2 / 3, 1 / 3], [1 / 3, 0.0]]))
    assert machine.idle == pytest.approx(server * np.array([2 / 5, 0.0]))


def test_a_find_that_breaks_a_rule_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="gpu", unit=3),))
    made = problem(noisy_trace(layers=1), "1x4x1", slots_per_gpu=5, constraints=rules)
    free = solve(replace(made, constraints=None), budget=QUICK).placement.physical_to_logical[0]
    layer = made.layer(0)
    assert not layer.rules.keeps(free)
    monkeypatch.setattr(copies, "finds", lambda *_, **__: iter([(free, ((0.0, 0.0, 1.0), None))]))
    result = solve(made, budget=QUICK)
    assert rules.check(result.placement) == []
    assert any("no copies were found" in note for note in result.notes)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_of_two_experts_one_may_be_taken_beside_the_other_where_some_slots_keep_the_rules(seed: int) -> None:
    layer = layer_drawn(seed)
    machine = machine_of(layer)
    assert layer.rules is not None
    each = layer.slots_per_rank
    slots_of = [  # two of each GPU are enough
        [u * machine.width + i for i in range(machine.width) if not closed[i] and i % each < 2]
        for u, closed in enumerate(machine.shut)
    ]
    rng = np.random.default_rng(seed)
    for one, other in rng.permutation(list(combinations(range(layer.num_experts), 2)))[:5].tolist():
        for u, w in product(range(len(slots_of)), repeat=2):
            if u == w and len(slots_of[u]) < 2:  # that there is a slot at all is not asked
                continue
            kept = False
            for p, q in product(slots_of[u], slots_of[w]):
                slots = np.full(layer.num_slots, -1, np.int32)
                slots[p], slots[q] = one, other
                kept |= p != q and layer.rules.keeps(slots)
            where = np.zeros(layer.num_experts, np.uint64)
            first = may_take(one, u, -1, -1, where, machine.limits)
            where[one] = 1 << u
            taken = first and may_take(other, w, -1, -1, where, machine.limits)
            assert (taken and bool(slots_of[u]) and bool(slots_of[w])) == kept


# -- annealing within limits -------------------------------------------------------------------------------------


def annealed(
    layer: Layer,
    machine: copies._Machine,
    content: Ints,
    *,
    rule: str,
    seed: int,
    steps: int,
    heat: tuple[float, float] = (3.0, 0.1),
    caps: tuple[float, float] = (np.inf, np.inf),
) -> tuple[float, float, float]:
    """Cost, and load above the caps of units and GPUs, as returned; content is changed."""
    draws = np.random.default_rng(seed).random((steps, 6))
    cost, over, crowd, _ = anneal_copies(
        RULES[rule],
        content,
        *layer.distinct,
        *layer.uses,
        layer.pairs[: layer.num_experts, : layer.num_experts].astype(np.float64),
        layer.load[:, None].astype(np.float64),
        machine.idle,
        caps[0],
        machine.gpu_idle,
        machine.room,
        machine.seat,
        caps[1],
        1.0,
        0.0,
        np.zeros(layer.num_experts),
        *heat,
        draws,
        machine.limits,
    )
    return float(cost), float(over), float(crowd)


def plain_cost(rule: str, topk: Ints, rows: Sequence[Sequence[int]]) -> float:
    """Expected units that tokens touch besides the home's, which is any unit: by trying all picks or sets of units."""
    held = [[u for u, row in enumerate(rows) if e in row] for e in range(1 + int(topk.max()))]
    total = 0.0
    for token in topk.tolist():
        for home in range(len(rows)):
            holders = [held[e] for e in token if e >= 0]
            away = [options for options in holders if home not in options]
            if rule == "cover":
                sizes = (n for n in range(len(rows)) if met(away, n, len(rows)))
                total += next(sizes)
                continue
            picks = list(product(*(away if rule == "nearest" else holders)))
            total += sum(len({*units} - {home}) for units in picks) / len(picks)
    return total / len(rows)


def met(wanted: Sequence[Sequence[int]], size: int, units: int) -> bool:
    """Whether some set of so many units meets each list."""
    return any(
        all({*chosen} & {*options} for options in wanted) for chosen in combinations(range(units), size)
    )


def plain_crowd(content: Ints, machine: copies._Machine, load: Ints, most: float) -> float:
    """Load above what GPUs may have, the heaviest copies on the coolest GPU with room, after those with a seat."""
    number, over = np.bincount(content[content >= 0], minlength=len(load)), 0.0
    for unit, row in enumerate(plain_rows(content)):
        dealt = [[float(idle)] for idle in machine.gpu_idle[unit]]
        for e in row:
            if machine.seat[e] >= 0:
                dealt[machine.seat[e]].append(load[e] / number[e])
        for share in sorted((load[e] / number[e] for e in row if machine.seat[e] < 0), reverse=True):
            open_gpus = [gpu for gpu, room in zip(dealt, machine.room[unit], strict=True) if len(gpu) <= room]
            min(open_gpus, key=sum).append(share)
        over += sum(max(0.0, sum(gpu) - most) for gpu in dealt)
    return over


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rule=st.sampled_from(list(RULES)),
    tight=st.sampled_from([0.9, 1.1, np.inf]),
    fast=st.booleans(),
)
def test_annealing_keeps_the_limits_and_returns_what_a_recount_gives(
    seed: int, rule: str, tight: float, fast: bool
) -> None:
    found = drawn(seed, max_load=1.1)
    assume(found is not None)
    assert found is not None
    layer = found[0].layer(0)
    if fast:  # one GPU, so that others begin with some load
        layer = replace(layer, speeds=(2.0, *[1.0] * (layer.num_ranks - 1)))
    machine = machine_of(layer)
    before = started(layer, machine)
    after = before.copy()
    caps = float(layer.caps[machine.level] * tight), float(layer.caps[0] * tight)
    cost, over, crowd = annealed(layer, machine, after, rule=rule, seed=seed, steps=600, caps=caps)
    rows = plain_rows(after)
    assert np.array_equal(after == CLOSED, machine.shut)
    assert {e for row in rows for e in row} == set(range(layer.num_experts))
    assert all(len({*row}) == len(row) for row in rows)
    assert units_keep(rows, found[1], found[2])
    assert gpus_suffice(rows, found[1], np.count_nonzero(machine.room, axis=1).tolist())
    assert cost == pytest.approx(plain_cost(rule, layer.tokens.astype(np.int64), rows), abs=1e-6)
    share = layer.load / np.bincount(after[after >= 0])
    if rule != "cover":  # whose load is no even share
        load = np.array([share[row].sum() for row in rows])
        assert over == pytest.approx(np.maximum(load + machine.idle - caps[0], 0.0).sum(), abs=1e-6)
    if machine.width > layer.slots_per_rank:
        assert crowd == pytest.approx(plain_crowd(after, machine, layer.load, caps[1]), abs=1e-6)
    again = annealed(layer, machine, after.copy(), rule=rule, seed=seed, steps=0, caps=caps)
    assert again == pytest.approx((cost, over, crowd), abs=1e-6)


# Four experts in units of two slots, and rules that bite: shape, slots of a GPU, rules.
BITING: tuple[tuple[Shape, int, Constraints], ...] = (
    ((1, 3, 1), 2, Constraints(pin=(Pin(experts=(0,), level="server", unit=2),))),
    ((1, 3, 1), 2, Constraints(apart=(Apart(experts=(0, 1), level="server"),))),
    (
        (1, 3, 1),
        2,
        Constraints(
            pin=(Pin(experts=(3,), level="server", unit=0),),
            apart=(Apart(experts=(0, 1, 2), level="server"),),
        ),
    ),
    ((1, 3, 1), 2, Constraints(free=(Free(gpus=(1,), slots=1),))),
    ((1, 3, 2), 1, Constraints(apart=(Apart(experts=(0, 1)),), free=(Free(gpus=(3,)),))),
    (
        (2, 2, 1),
        2,
        Constraints(
            pin=(Pin(experts=(2,), level="rack", unit=1),), apart=(Apart(experts=(0, 1), level="rack"),)
        ),
    ),
    ((1, 1, 3), 2, Constraints(apart=(Apart(experts=(0, 1)), Apart(experts=(0, 2))))),
)


def contents(layer: Layer, rules: Constraints, shape: Shape) -> Iterator[list[list[int]]]:
    """All that units may hold within the limits, every expert somewhere."""
    machine = machine_of(layer)
    ways = [
        [list(held) for number in range(room + 1) for held in combinations(range(layer.num_experts), number)]
        for room in machine.room.sum(axis=1).tolist()
    ]
    gpus_open = np.count_nonzero(machine.room, axis=1).tolist()
    for rows in product(*ways):
        every = len({e for row in rows for e in row}) == layer.num_experts
        if every and units_keep(rows, rules, shape) and gpus_suffice(rows, rules, gpus_open):
            yield [*rows]


@pytest.mark.parametrize("rule", list(RULES))
def test_annealing_reaches_the_best_of_all_contents_within_the_limits_in_most_tiny_cases(rule: str) -> None:
    """Fourteen seeded cases, from the start that rules come with."""
    hits, bites = 0, 0
    for seed in range(2 * len(BITING)):
        shape, slots, rules = BITING[seed % len(BITING)]
        trace = noisy_trace(num_experts=4, top_k=2, tokens=12, layers=1, seed=seed)
        name = "x".join(map(str, shape))
        layer = problem(trace, name, slots_per_gpu=slots, constraints=rules).layer(0)
        machine, topk = machine_of(layer), layer.tokens.astype(np.int64)
        within = list(contents(layer, rules, shape))
        least = min(plain_cost(rule, topk, rows) for rows in within)
        content = started(layer, machine)
        cost, _, _ = annealed(layer, machine, content, rule=rule, seed=seed, steps=6000, heat=(2.0, 0.02))
        assert sorted(map(sorted, plain_rows(content))) in [sorted(map(sorted, rows)) for rows in within]
        assert cost >= least - 1e-9
        hits += cost <= least + 1e-9
        free = started(layer, machine)
        unbound = replace(machine, limits=None)
        bites += (
            annealed(layer, unbound, free, rule=rule, seed=seed, steps=6000, heat=(2.0, 0.02))[0]
            < least - 1e-9
        )
    assert hits >= 11
    assert bites >= 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_hot_experts_are_shared_out_only_where_rules_let_them_and_wherever_they_do(seed: int) -> None:
    found = drawn(seed, max_load=1.0)
    assume(found is not None)
    assert found is not None
    layer = found[0].layer(0)
    layer.caps[:] /= 3  # so low that many experts are too hot
    machine = machine_of(layer)
    before = started(layer, machine)
    after = copies._shared(layer, machine, before)
    assert ((after == before) | (before == -1)).all()
    rows = plain_rows(after)
    gpus_open = np.count_nonzero(machine.room, axis=1).tolist()
    assert all(len({*row}) == len(row) for row in rows)
    assert units_keep(rows, found[1], found[2])
    assert gpus_suffice(rows, found[1], gpus_open)
    beside = (layer.slots_per_rank - 1) * float(np.quantile(layer.load, copies.LIGHT))
    share = layer.load / np.bincount(after[after >= 0])
    for expert in np.flatnonzero(share > max(0.0, float(layer.caps[0]) - beside)).tolist():
        for unit in np.flatnonzero((after == -1).any(axis=1)).tolist():
            more = [[*row, expert] if u == unit else row for u, row in enumerate(rows)]
            assert (
                expert in rows[unit]
                or not units_keep(more, found[1], found[2])
                or len(partners(expert, found[1]) & {*rows[unit]}) >= gpus_open[unit]
            )


# -- finds -------------------------------------------------------------------------------------------------------


def test_finds_hold_every_expert_and_break_no_rule_but_seldom_those_of_gpus() -> None:
    tried = kept = 0
    for seed in range(120):
        rule = ("nearest", "spread", "cover", "table")[seed // 8 % 4]
        found = drawn(seed, max_load=(None, 1.02, 1.3)[seed % 3], replica_choice=rule)
        if found is None or not copies.suits(layer := replace(found[0].layer(0), copies=True)):
            continue
        assert layer.rules is not None
        start, clock = layer.slots(layer.rules.start), Clock.start(rounds=1)
        for slots, _ in copies.finds(
            layer, start, judged(layer, start)[0], rng=np.random.default_rng(seed), clock=clock
        ):
            width = machine_of(layer).width
            assert set(range(layer.num_experts)) == {*slots.tolist()} - {-1}
            for row in slots.reshape(layer.num_ranks, -1).tolist():
                held = [e for e in row if e >= 0]
                assert len({*held}) == len(held)
                assert row == [*sorted(held), *[-1] * (layer.slots_per_rank - len(held))]
            assert units_keep(plain_rows(slots.reshape(-1, width).astype(np.int64)), found[1], found[2])
            room = (~layer.rules.shut).reshape(-1, width).sum(axis=1)
            assert ((slots >= 0).reshape(-1, width).sum(axis=1) <= room).all()
            tried, kept = tried + 1, kept + layer.rules.keeps(slots)
    assert tried >= 60
    assert kept >= tried - 2


# -- auto --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rule=st.sampled_from(["nearest", "spread", "cover", "table"]),
    max_load=st.sampled_from([None, 1.02, 1.2]),
)
def test_auto_breaks_no_constraint_and_is_never_worse_than_without_copies(
    seed: int, rule: str, max_load: float | None
) -> None:
    found = drawn(seed, max_load=max_load, replica_choice=rule)
    assume(found is not None)
    assert found is not None
    ours, theirs = (solve(found[0], method, budget=QUICK).placement for method in ("auto", "tabu"))
    assert found[1].check(ours) == []
    layer = found[0].layer(0)
    assert score(layer, ours) <= (score(layer, theirs)[0], score(layer, theirs)[1] * (1 + 1e-9))
    assert not theirs.has_copies


def score(layer: Layer, placement: Placement) -> tuple[float, float]:
    table = None if placement.table is None else placement.table[0]
    return layer.score(placement.physical_to_logical[0], table)


TWO_PINS = Constraints(
    pin=(Pin(experts=(0, 1), level="server", unit=3), Pin(experts=(5,), level="gpu", unit=2)),
    apart=(Apart(experts=(2, 3, 4), level="server"), Apart(experts=(6, 7, 8))),
    free=(Free(gpus=(7,), slots=1),),
)


@pytest.mark.parametrize("rule", ["nearest", "cover", "table"])
@pytest.mark.parametrize("max_load", [None, 1.1])
def test_copies_within_constraints_cut_traffic(rule: str, max_load: float | None) -> None:
    trace = noisy_trace(layers=1)
    options = {"slots_per_gpu": 4, "max_load": max_load, "replica_choice": rule, "constraints": TWO_PINS}
    made = problem(trace, "1x4x2", **options)
    ours, theirs = (solve(made, method, budget=QUICK) for method in ("auto", "tabu"))
    assert TWO_PINS.check(ours.placement) == []
    number = ours.placement.replica_count[0]
    assert number[[0, 1, 5]].tolist() == [1, 1, 1]
    assert (number > 1).sum() >= 4
    assert score(made.layer(0), ours.placement)[0] == 0.0
    assert ours.objective < 0.95 * theirs.objective
    assert not any("stay empty" in note for note in ours.notes)


@pytest.mark.parametrize("rule", ["nearest", "cover", "table"])
def test_copies_within_constraints_are_the_same_for_any_number_of_jobs(rule: str) -> None:
    only = replace(TWO_PINS, pin=tuple(replace(pin, layers=(1, 2)) for pin in TWO_PINS.pin))
    options = {"slots_per_gpu": 3, "max_load": 1.2, "replica_choice": rule, "constraints": only}
    made = problem(noisy_trace(layers=3, tokens=300), "1x4x2", **options)
    found = [solve(made, "auto", budget=QUICK, seed=7, jobs=jobs).placement for jobs in (1, 2, 2)]
    assert len({placement.digest for placement in found}) == 1
    assert found[0].has_copies


@pytest.mark.parametrize(
    ("case", "rules"),
    [
        (((1, 4, 2), 4, 16), Constraints(free=(Free(gpus=(3,)),))),
        (((1, 4, 2), 4, 16), Constraints(free=(Free(gpus=(2, 3)),))),
        (
            ((1, 4, 2), 4, 16),
            Constraints(pin=(Pin(experts=(0, 1), level="gpu", unit=2),), free=(Free(gpus=(3,), slots=3),)),
        ),
        (((1, 4, 2), 3, 16), Constraints(apart=(Apart(experts=(0, 1, 2, 3), level="server"),))),
        (
            ((1, 4, 2), 3, 16),
            Constraints(
                apart=(
                    Apart(experts=(0, 1, 2, 3), level="server"),
                    Apart(experts=(0, 5, 6)),
                    Apart(experts=(0, 7), level="server"),
                )
            ),
        ),
        (((1, 4, 2), 3, 16), Constraints(apart=(Apart(experts=tuple(range(8))),))),
        (((1, 12, 1), 1, 8), Constraints(apart=(Apart(experts=(1, 2)),), free=(Free(gpus=(0,)),))),
        (
            ((1, 64, 1), 2, 64),
            Constraints(
                pin=(Pin(experts=(0,), level="gpu", unit=63),),
                apart=(Apart(experts=(1, 2)),),
                free=(Free(gpus=(5,)),),
            ),
        ),
    ],
    ids=["GPU", "server", "pin", "apart", "groups", "GPUs", "slot", "64"],
)
def test_unusual_rules_leave_room_for_copies(case: tuple[Shape, int, int], rules: Constraints) -> None:
    made = posed(case, 0, rules, replica_choice="cover")
    result = solve(made, "auto", budget=QUICK)
    assert rules.check(result.placement) == []
    assert result.placement.has_copies


# -- load above the caps -----------------------------------------------------------------------------------------


def crowded(seed: int, *, bound: bool, fast: bool) -> tuple[Layer, Slots]:
    """A layer with a tight cap, and its experts with copies wherever rules let them stand, in random order."""
    rng = np.random.default_rng(seed)
    case = SHAPES[seed % len(SHAPES)]
    rules = drawn_rules(rng, *case) if bound else None
    try:
        layer = replace(posed(case, seed, rules, max_load=1.02).layer(0), copies=True)
    except (Infeasible, InvalidInput):
        layer = replace(posed(case, seed, None, max_load=1.02).layer(0), copies=True)
    if fast:
        layer = replace(layer, speeds=(2.0, *[1.0] * (layer.num_ranks - 1)))
    begun = layer.linear() if layer.rules is None else layer.rules.start
    slots = layer.slots(begun).reshape(layer.num_ranks, -1)
    for at in rng.permutation(np.flatnonzero(slots < 0))[: rng.integers(0, layer.num_slots)].tolist():
        gpu = at // layer.slots_per_rank
        expert = int(rng.integers(layer.num_experts))
        trial = slots.copy()
        trial[gpu, at % layer.slots_per_rank] = expert
        if expert not in slots[gpu] and (layer.rules is None or layer.rules.keeps(trial.ravel())):
            slots = trial
    return layer, ordered(slots)


def ordered(rows: Slots) -> Slots:
    return np.array([sorted(row, key=lambda e: (e < 0, e)) for row in rows.tolist()], np.int32).ravel()


def over(layer: Layer, slots: Slots) -> float:
    return layer.above_caps(layer.expected_load(slots))


def steps(layer: Layer, slots: Slots) -> Iterator[Slots]:
    """All ways to take one expert from a GPU above its cap: into a slot of its server to spare, or a copy for good."""
    number, each = np.bincount(slots[slots >= 0], minlength=layer.num_experts), layer.slots_per_rank
    hot = layer.expected_load(slots)[0] > layer.caps[0] - layer.idle(0)
    for at, expert in enumerate(slots.tolist()):
        if expert < 0 or not hot[at // each]:
            continue
        if number[expert] > 1:
            yield np.where(np.arange(len(slots)) == at, -1, slots).astype(np.int32)
        for to, other in enumerate(slots.tolist()):
            moved = slots.copy()
            moved[at], moved[to] = -1, expert
            near = at // each // layer.server_ranks == to // each // layer.server_ranks
            spare = other < 0 or (number[other] > 1 and other != expert)
            alone = expert not in slots[to // each * each : (to // each + 1) * each]
            if near and spare and alone and (layer.rules is None or layer.rules.keeps(moved)):
                yield moved


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), bound=st.booleans(), fast=st.booleans())
def test_lightening_takes_load_above_caps_until_no_step_does(seed: int, bound: bool, fast: bool) -> None:
    layer, before = crowded(seed, bound=bound, fast=fast)
    given_slots = before.copy()
    after = gpus.lightened(layer, before)
    assert np.array_equal(before, given_slots)
    left = over(layer, after)
    assert left <= min([over(layer, before), *(over(layer, step) for step in steps(layer, before))])
    assert all(over(layer, step) >= left - 1e-9 for step in steps(layer, after))
    assert {*after.tolist()} - {-1} == set(range(layer.num_experts))
    assert layer.rules is None or layer.rules.keeps(after)
    servers = [slots.reshape(layer.num_ranks // layer.server_ranks, -1) for slots in (before, after)]
    assert all({*row} - {-1} <= {*known} for known, row in zip(*(s.tolist() for s in servers), strict=True))
    assert np.array_equal(after, ordered(after.reshape(layer.num_ranks, -1)))
    for row in after.reshape(layer.num_ranks, -1).tolist():
        assert len({*row} - {-1}) == sum(e >= 0 for e in row)


def test_what_is_within_the_caps_is_left_as_it_is() -> None:
    for seed in range(20):
        layer, slots = crowded(seed, bound=True, fast=False)
        ample = replace(layer, max_load=None)
        assert gpus.lightened(ample, slots) is slots


def test_lightening_takes_away_half_of_the_load_above_caps_or_more_in_most_cases() -> None:
    """Of 20 random arrangements on six GPUs, each expert on one to three of them or more."""
    trace = noisy_trace(num_experts=12, top_k=3, tokens=300, layers=1)
    layer = replace(problem(trace, "1x2x3", slots_per_gpu=4, max_load=1.1).layer(0), copies=True)
    lighter = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(12).reshape(6, 2)
        more = np.array([rng.choice(np.setdiff1d(np.arange(12), row), 2, replace=False) for row in rows])
        slots = ordered(np.concatenate([rows, more], axis=1).astype(np.int32))
        ended = gpus.lightened(layer, slots)
        lighter += over(layer, ended) == 0.0 or over(layer, ended) < 0.5 * over(layer, slots)
        assert judged(layer, ended)[0][0] <= over(layer, slots) + 1e-6
    assert lighter >= 15
