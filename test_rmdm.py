"""python -m pytest -q test_rmdm.py    (under two minutes on two cores; no network, no GPU)"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

if "SPEED" not in os.environ:  # the models are tiny, and two threads beside a busy process crawl
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import rmdm
import sample
import train_countdown as countdown
import train_sudoku as sudoku
from rmdm import MASK, BadInput, Config, TrainConfig

HERE = Path(__file__).parent
rmdm.pick_device("cpu")  # sets up torch as the scripts do


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0, scale=1.0, **options):
    """A small model with random weights, none of them zero."""
    torch.manual_seed(seed)
    model = rmdm.RMDM(Config(**{"vocab": 4, "coords": 3, "width": 16, "heads": 2, "loops": 3} | options))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(scale * torch.randn_like(w) * 0.3)
    return model


# A distribution over three tokens from {1, 2}, far from independent, and its exact denoiser.
STATES = list(itertools.product((1, 2), repeat=3))
PROBS = torch.tensor([0.30, 0.02, 0.05, 0.13, 0.04, 0.21, 0.15, 0.10], dtype=torch.float64)
ENTROPY = -(PROBS * PROBS.log()).sum().item()


class Perfect(nn.Module):
    """p(x0^i | x_t) by Bayes, in the interface of RMDM."""

    config = Config(vocab=3, coords=3, loops=1)

    def forward(self, x_t, t, loops=None, read=None, grad_from=1):
        states = torch.tensor(STATES)
        agree = ((x_t[:, None] == states) | (x_t[:, None] == MASK)).all(2)  # (B, 8)
        joint = agree * PROBS
        p = torch.stack([(joint[:, :, None] * (states == v)).sum(1) for v in (1, 2)], 2)  # (B, 3, 2)
        return F.pad((p / p.sum(2, keepdim=True)).log(), (1, 0), value=-math.inf)[None]

    def infer(self, x_t, t, loops=None, eps=0.0):
        return self(x_t, t)[0], torch.ones(len(x_t), dtype=torch.long)


def exact_nelbo(model, x0):
    """Eq. (3) by enumeration: the integral over t of t^(m-1) (1-t)^(n-m) is (m-1)! (n-m)! / n!."""
    n, total = len(x0), 0.0
    for masked in itertools.product((False, True), repeat=n):
        if m := sum(masked):
            hide = torch.tensor(masked)
            log_p = model(torch.where(hide, MASK, x0)[None], torch.tensor([m / n]))[0, 0].log_softmax(-1)
            weight = math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
            total -= weight * log_p[torch.arange(n), x0][hide].sum().item()
    return total


# ---- schedule and loss ----


def test_times_are_stratified_and_never_zero(monkeypatch):
    t = rmdm.sample_t(1000, generator())
    assert t.min() > 0 and t.max() <= 1 and not torch.equal(t, t.sort(descending=True).values)
    assert sorted((t * 1000).ceil().int().tolist()) == list(range(1, 1001))
    near = [torch.rand(512).fill_(1 - 2**-24)]  # the largest number that rand returns, where rounding hits 0
    monkeypatch.setattr(torch, "rand", lambda *a, **k: near[0])
    assert rmdm.nelbo_weight(rmdm.sample_t(512)).isfinite().all()


def test_corrupt_masks_only_editable_tokens_at_rate_t():
    x0 = torch.full((2000, 50), 3)
    editable = torch.arange(50).expand(2000, 50) >= 10
    t = torch.full((2000,), 0.3)
    x_t, masked = rmdm.corrupt(x0, t, editable, generator())
    assert not masked[~editable].any() and (x_t[masked] == MASK).all() and (x_t[~masked] == 3).all()
    assert abs(masked[editable].double().mean() - 0.3) < 5 * (0.21 / 80_000) ** 0.5


def test_nelbo_estimate_equals_enumeration():
    model, x0 = tiny(), torch.tensor([1, 3, 2])
    draws = rmdm.nelbo(model, x0.expand(20_000, 3), torch.ones(20_000, 3, dtype=torch.bool), generator=generator())
    exact = exact_nelbo(model, x0)
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5
    assert draws.std() / len(draws) ** 0.5 < 0.02 * exact  # else the line above proves nothing


def test_nelbo_of_exact_conditionals_is_the_entropy():
    exact = sum(p * exact_nelbo(Perfect(), torch.tensor(x)) for p, x in zip(PROBS.tolist(), STATES))
    assert exact == pytest.approx(ENTROPY, abs=1e-6)
    x0 = torch.tensor(STATES)[torch.multinomial(PROBS, 40_000, True, generator=generator())]
    draws = rmdm.nelbo(Perfect(), x0, torch.ones_like(x0, dtype=torch.bool), generator=generator(1))
    assert abs(draws.mean() - ENTROPY) < 4 * draws.std() / len(draws) ** 0.5


def test_every_row_of_a_batch_gets_the_same_estimate():
    x0 = torch.tensor([[1, 3, 2], [1, 3, 2]])
    g, ones, model = generator(), torch.ones(2, 3, dtype=torch.bool), tiny()
    draws = torch.stack([rmdm.nelbo(model, x0, ones, generator=g) for _ in range(1500)])
    assert (draws[:, 0] - draws[:, 1]).mean().abs() < 4 * (draws[:, 0] - draws[:, 1]).std() / 1500**0.5


def test_a_kept_mask_does_not_spoil_the_loss():
    model, x0, editable = tiny(), torch.tensor([[1, 2, MASK]] * 4), torch.tensor([[True, True, False]] * 4)
    assert rmdm.loss(model, x0, editable, "elbo", generator=generator())[0].isfinite()
    assert rmdm.nelbo(model, x0, editable, generator=generator()).isfinite().all()


def test_supervised_loops_by_hand():
    loops = {name: rmdm.supervised(name, 4) for name in ("all", "final", "1", 2, "9")}
    expected = {"all": ([1, 2, 3, 4], 1), "final": ([4], 1), "1": ([4], 4), 2: ([3, 4], 3), "9": ([1, 2, 3, 4], 1)}
    assert {name: (list(read), grad_from) for name, (read, grad_from) in loops.items()} == expected


@pytest.mark.parametrize("supervise, prefix", [("2", 2), ("1", 3), ("final", 0), ("all", 0)])
def test_loops_before_the_supervised_ones_are_detached(supervise, prefix):
    m, g = tiny(loops=4, inject=True), generator(2)
    x0 = torch.randint(1, 4, (4, 3), generator=generator(1))
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    value, _ = rmdm.loss(m, x0, everywhere, "simple", supervise, generator=generator(2))
    value.backward()
    grads = {name: w.grad.clone() for name, w in m.named_parameters()}
    m.zero_grad()
    x_t, masked = rmdm.corrupt(x0, rmdm.sample_t(4, g), everywhere, g)
    h, c = m.encode(x_t, torch.ones(4))
    h0, losses = h, []
    for l in range(1, 5):
        h = m.recur(h, l, h0, c)
        h = h.detach() if l <= prefix else h
        losses.append(F.cross_entropy(m.decode(h)[masked], x0[masked], reduction="sum") / x0.numel())
    read = losses if supervise == "all" else losses[-1:] if supervise == "final" else losses[prefix:]
    (sum(read) / len(read)).backward()
    assert value.item() == pytest.approx(sum(read).item() / len(read), rel=1e-5)
    assert all(torch.allclose(w.grad, grads[name], atol=1e-5) for name, w in m.named_parameters())
    assert grads["loop.weight"].any(1).tolist() == [l > prefix for l in range(1, 5)]


@pytest.mark.parametrize("objective", ["simple", "elbo"])
@pytest.mark.parametrize("supervise", ["all", "final", "2"])
def test_loss_by_hand(objective, supervise):
    model, B, N, L = tiny(), 4, 3, 3
    x0 = torch.randint(1, 4, (B, N), generator=generator(1))
    editable = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    value, right = rmdm.loss(model, x0, editable, objective, supervise, generator=generator(2))
    g = generator(2)
    t = rmdm.sample_t(B, g)
    x_t, masked = rmdm.corrupt(x0, t, editable, g)
    (read, _), expected, hits = rmdm.supervised(supervise, L), 0.0, []
    for b, i, l in itertools.product(range(B), range(N), range(1, L + 1)):
        if masked[b, i]:
            log_p = model(x_t, t, L, read=(l,))[0, b, i].log_softmax(-1)
            weight = (l in read) / len(read) / (t[b].item() if objective == "elbo" else 1)
            expected -= weight * log_p[x0[b, i]].item()
            hits += [bool(log_p.argmax() == x0[b, i])] if l == L else []
    assert value.item() == pytest.approx(expected / 6, rel=1e-5)  # six editable tokens
    assert right.item() == pytest.approx(sum(hits) / len(hits))


def test_nothing_masked_costs_nothing():
    model, x0 = tiny(), torch.ones(2, 3, dtype=torch.long)
    nothing = torch.zeros_like(x0, dtype=torch.bool)
    assert rmdm.loss(model, x0, nothing)[0] == 0 and (rmdm.nelbo(model, x0, nothing) == 0).all()


# ---- model ----


def test_recursion_is_the_hand_written_unroll_of_rmdm():
    m = tiny(layers=2, loops=3, time=True)
    x, t = torch.tensor([[MASK, 2, MASK]]), torch.tensor([0.7])
    angle = torch.tensor([0.7 * math.pi * 2.0**k for k in range(-1, 7)])
    c = m.time(torch.cat([angle.sin(), angle.cos()]))
    h = m.token(x) + m.place[0].weight + c
    for v in (m.loop.weight[0], m.loop.weight[1], m.loop.weight[2], m.loop.weight[2]):  # the last repeats
        h = m.block[1](m.block[0](m.loop_norm(h + c + v)))
        last = m.unembed(m.norm(h))
    assert torch.allclose(m(x, t, loops=4)[0, ..., 1:], last, atol=1e-5)
    assert (m(x, t).softmax(-1)[..., MASK] == 0).all()


def test_recursion_is_the_hand_written_unroll_of_loopmdm():
    m = tiny(head_layers=1, layers=1, tail_layers=1, loop_embedding=False, loop_norm=False)
    x, t = torch.tensor([[MASK, 2, MASK]]), torch.tensor([0.7])
    h = m.head[0](m.token(x) + m.place[0].weight)
    h1 = m.block[0](h)
    h2 = m.block[0](h1)
    both = torch.stack([m.unembed(m.norm(m.tail[0](h))) for h in (h1, h2)])
    assert torch.allclose(m(x, t, loops=2, read=(1, 2))[..., 1:], both, atol=1e-5)


def test_layer_by_hand():
    m = tiny(width=8, coords=((0, 0), (1, 1), (0, 1)), coord_bias=True)
    assert rmdm.Layer(8, 2, 2).bias[..., 0, 0].tolist() == [[1, 1], [-1, -1]]  # one head looks there, one elsewhere
    row, col = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]), torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]])
    for layer, same in (m.block[0], m.same), (rmdm.Layer(8, 2), None):
        h = torch.randn(1, 3, 8, generator=generator())
        q, k, v = layer.qkv(layer.norm1(h))[0].split(8, dim=1)
        heads = []
        for i, s in enumerate((slice(0, 4), slice(4, 8))):
            bias = 0 if same is None else layer.bias[i, 0] * row + layer.bias[i, 1] * col
            heads.append((q[:, s] @ k[:, s].T / 2 + bias).softmax(1) @ v[:, s])
        mid = h[0] + layer.out(torch.cat(heads, 1))
        assert torch.allclose(layer(h, same)[0], mid + layer.down(F.gelu(layer.up(layer.norm2(mid)))), atol=1e-5)


def test_injection_adds_the_embedding_at_every_loop():
    m = tiny(inject=True)
    x, t = torch.tensor([[MASK, 2, MASK]]), torch.tensor([0.7])
    h0 = h = m.token(x) + m.place[0].weight
    for v in m.loop.weight:
        h = m.block[0](m.loop_norm(h + h0 + v))
    assert torch.allclose(m(x, t)[0, ..., 1:], m.unembed(m.norm(h)), atol=1e-5)


def test_coordinates_are_summed_over_their_axes():
    m = tiny(coords=((0, 1), (1, 0), (1, 1)))
    h, _ = m.encode(torch.tensor([[1, 2, 3]]), torch.ones(1))
    assert torch.allclose(h[0, 1], m.token.weight[2] + m.place[0].weight[1] + m.place[1].weight[0])


def test_adaptive_loops_stop_each_example_by_its_own_change():
    m = tiny(loops=12)
    x = torch.tensor([[MASK, 2, MASK], [1, 1, MASK], [MASK] * 3])
    logits, used = m.infer(x, torch.ones(3), 12, eps=0.2)
    assert used.min() < used.max() <= 12
    for b in range(3):
        h0, c = m.encode(x[b : b + 1], torch.ones(1))
        h = h0
        for l in range(1, 13):
            h, old = m.recur(h, l, h0, c), h
            if (h - old).norm() / h.norm() < 0.2:
                break
        assert used[b] == l and torch.allclose(logits[b], m.decode(h)[0], atol=1e-4)


def test_gradients_reach_every_parameter():
    added = dict(time=True, inject=True, coord_bias=True, coords=((0, 0), (1, 1), (0, 1)))
    m = tiny(head_layers=1, layers=2, tail_layers=1, **added)
    x0 = torch.tensor([[1, 2, 3]] * 8)
    rmdm.loss(m, x0, torch.ones_like(x0, dtype=torch.bool), generator=generator())[0].backward()
    for name, w in m.named_parameters():
        assert w.grad is not None and w.grad.abs().sum() > 0, name


def test_flops_are_those_that_torch_counts():
    m = tiny(coords=7, head_layers=1, layers=2, tail_layers=1)
    with FlopCounterMode(display=False) as counter:
        m(torch.ones(5, 7, dtype=torch.long), torch.ones(5), 3, (1, 3))
    assert counter.get_total_flops() == 5 * m.flops(3, reads=2)


# ---- sampler ----


def chi_square(x, law):
    counts = torch.tensor([(x == torch.tensor(s)).all(1).sum() for s in STATES], dtype=torch.float64)
    expected = law * len(x)
    return ((counts - expected) ** 2 / expected).sum().item()


LIMIT = 24.3  # chi-square with 7 degrees of freedom exceeds this once in a thousand


def law(steps, ancestral, x=(MASK,) * 3):
    """The exact distribution of what `sample` returns with the perfect denoiser, by enumeration."""
    masked = [i for i in range(3) if x[i] == MASK]
    if not masked:
        return torch.tensor([float(x == s) for s in STATES], dtype=torch.float64)
    p = Perfect()(torch.tensor([x]), torch.ones(1))[0, 0].exp()
    total, share = torch.zeros(8, dtype=torch.float64), -(-len(masked) // steps)
    for reveal in itertools.chain.from_iterable(itertools.combinations(masked, k) for k in range(len(masked) + 1)):
        if ancestral:
            weight = (1 / steps) ** len(reveal) * (1 - 1 / steps) ** (len(masked) - len(reveal))
        else:
            weight = (len(reveal) == share) / math.comb(len(masked), share)
        if weight:
            for tokens in itertools.product((1, 2), repeat=len(reveal)):
                y = list(x)
                for i, token in zip(reveal, tokens):
                    y[i] = token
                    weight_y = weight * math.prod(p[i, v].item() for i, v in zip(reveal, tokens))
                total += (weight_y if reveal else weight) * law(steps - 1, ancestral, tuple(y))
    return total


@pytest.mark.parametrize(
    "order, steps", [("random", 3), ("random", 2), ("random", 1), ("ancestral", 2), ("ancestral", 8)]
)
def test_samples_follow_the_exact_law(order, steps):
    start = torch.zeros(30_000, 3, dtype=torch.long)
    out = rmdm.sample(Perfect(), start, steps=steps, order=order, temperature=1.0, generator=generator())
    expected = law(steps, order == "ancestral")
    assert expected.sum() == pytest.approx(1)
    assert chi_square(out.x, expected) < LIMIT
    if (order, steps) == ("random", 3):  # one token a step: the model's own distribution
        assert torch.allclose(expected, PROBS)
    else:
        assert chi_square(out.x, PROBS) > LIMIT  # the test can tell the two apart


class Fixed(nn.Module):
    """The same probabilities whatever it sees: (N, V - 1)."""

    def __init__(self, p):
        super().__init__()
        self.logits = F.pad(torch.tensor(p).log(), (1, 0), value=-math.inf)

    def infer(self, x_t, t, loops=None, eps=0.0):
        return self.logits.expand(len(x_t), -1, -1), torch.full((len(x_t),), 5)


@pytest.mark.parametrize("order, first", [("confidence", 0), ("margin", 1), ("entropy", 2)])
def test_each_order_reveals_its_own_favorite_first(order, first):
    p = [[0.51, 0.47, 0.01, 0.01], [0.46, 0.18, 0.18, 0.18], [0.499, 0.499, 0.001, 0.001], [0.3, 0.3, 0.2, 0.2]]
    out = rmdm.sample(Fixed(p), torch.zeros(1, 4, dtype=torch.long), steps=4, order=order, trace=True)
    assert out.trace[0]["revealed"].nonzero().tolist() == [[0, first]]
    assert out.passes.tolist() == [4] and out.nfe.tolist() == [20]


def test_threshold_reveals_all_that_is_sure_and_at_least_one():
    p = [[0.95, 0.05], [0.91, 0.09], [0.7, 0.3], [0.6, 0.4]]
    out = rmdm.sample(Fixed(p), torch.zeros(1, 4, dtype=torch.long), steps=4, threshold=0.9, trace=True)
    assert [step["revealed"].sum().item() for step in out.trace] == [2, 1, 1]


@pytest.mark.parametrize("order", rmdm.ORDERS)
@pytest.mark.parametrize("how", [{}, {"temperature": 1.5}, {"eps": 0.3}, {"threshold": 0.5}, {"loops": 1, "steps": 2}])
def test_clues_survive_every_setting(order, how):
    if order == "ancestral" and "threshold" in how:
        pytest.skip("refused; see test_bad_sampler_settings")
    model = tiny(coords=9)
    x = torch.randint(0, 4, (6, 9), generator=generator(3))
    editable = torch.rand(6, 9, generator=generator(4)) < 0.6
    editable[0], x[1, 0], editable[1, 0] = False, MASK, False  # an example with nothing to do, a MASK to keep
    out = rmdm.sample(model, x, editable, **{"steps": 4, "order": order, "generator": generator()} | how, trace=True)
    assert (out.x[~editable] == x[~editable]).all() and (out.x[editable] != MASK).all()
    assert out.passes[0] == 0 and out.nfe[0] == 0 and (out.passes[1:] > 0).all()
    assert (sum(step["revealed"].long() for step in out.trace) == editable).all()
    assert (out.passes <= how.get("steps", 4)).all() and (out.nfe <= out.passes * 3).all()


def test_a_finished_example_costs_no_further_passes():
    seen = []
    model = tiny(coords=9)
    infer = model.infer
    model.infer = lambda x, *a: seen.append(len(x)) or infer(x, *a)
    x = torch.ones(3, 9, dtype=torch.long)
    x[1, :2] = x[2, :] = MASK
    out = rmdm.sample(model, x, steps=9)
    assert out.passes.tolist() == [0, 2, 9] and seen == [2, 2] + [1] * 7


def test_bad_sampler_settings():
    ancestral = {"order": "ancestral", "threshold": 0.5}
    for how in ({"order": "best"}, {"steps": 0}, {"loops": 0}, ancestral, {"temperature": -1}):
        with pytest.raises(ValueError):
            rmdm.sample(tiny(), torch.zeros(1, 3, dtype=torch.long), **how)


# ---- Sudoku ----


def count_solutions(board):
    """An independent solver: plain backtracking, at most 2."""
    board = [int(d) for d in board]

    def options(i):
        r, c = divmod(i, 9)
        near = set(board[r * 9 : r * 9 + 9]) | set(board[c::9])
        near |= {board[(r // 3 * 3 + a) * 9 + c // 3 * 3 + b] for a in range(3) for b in range(3)}
        return set(range(1, 10)) - near

    blanks = [i for i in range(81) if not board[i]]
    if not blanks:
        return 1
    i = min(blanks, key=lambda i: len(options(i)))
    total = 0
    for digit in options(i):
        board[i] = digit
        total += count_solutions(board)
        if total > 1:
            return 2
    return total


@pytest.fixture(scope="session")
def puzzles(tmp_path_factory):
    return sudoku.generated(300, 7, tmp_path_factory.mktemp("data"))


def test_generated_puzzles_have_one_solution_and_no_clue_too_many(puzzles):
    for puzzle, solution in list(zip(*puzzles))[:25]:
        assert count_solutions(puzzle) == 1 and count_solutions(solution) == 1
        assert ((puzzle == MASK) | (puzzle == solution)).all()
    assert sudoku.valid(puzzles[1]).all()
    odd = "...8..7....2....34..45..28...9672..3..........4......13.....4...5...8....8.15...."
    removable = np.array([int(c) for c in odd.replace(".", "0")], np.uint8)  # all clues but one are needed
    for puzzle, needless in [(puzzles[0][0], []), (puzzles[0][1], []), (removable, [30])]:
        c = np.where(puzzle == MASK, 511, 1 << puzzle.astype(np.uint16) >> 1).astype(np.uint16)
        clues = np.flatnonzero(puzzle)
        without = np.repeat(c[:, None], len(clues), 1)  # one clue given up in each column, its digit excluded
        without[clues, np.arange(len(clues))] = 511 & ~c[clues]
        assert clues[(sudoku.search(without)[0] == 0).all(0)].tolist() == needless
        clue = clues[-1]
        assert count_solutions(np.where(np.arange(81) == clue, MASK, puzzle)) == 2


def singles_solve(board, hidden):
    """Naked and hidden singles, one cell at a time: an independent version."""
    near = [set(np.concatenate([unit for unit in sudoku.UNITS if i in unit])) - {i} for i in range(81)]
    board, found = board.copy(), True
    while found:
        can = [set() if board[i] else set(range(1, 10)) - {board[j] for j in near[i]} for i in range(81)]
        found = [(i, d) for i in range(81) for d in can[i] if len(can[i]) == 1]
        if hidden:
            found += [(i, d) for u in sudoku.UNITS for i in u for d in can[i] if sum(d in can[j] for j in u) == 1]
        for i, d in found:
            board[i] = d
    return (board != MASK).all()


def test_classical_solvers(puzzles):
    more = np.random.default_rng(0).random((20, 81)) < np.linspace(0, 0.3, 20)[:, None]  # clues, so some are easy
    some = np.where(more, puzzles[1][:20], puzzles[0][:20])
    naked, both, guesses = sudoku.classical(some)
    assert naked.tolist() == [singles_solve(puzzle, False) for puzzle in some] and 0 < naked.sum() < 20
    assert both.tolist() == [singles_solve(puzzle, True) for puzzle in some] and naked.sum() < both.sum() < 20
    assert ((guesses == 0) == both).all() and (guesses >= 0).all()
    c = np.where(puzzles[0] == MASK, 511, 1 << puzzles[0].astype(np.uint16) >> 1).T.astype(np.uint16)
    for depth_first in (True, False):
        assert (sudoku.search(c, depth_first)[0] == 1 << puzzles[1].T.astype(int) >> 1).all()
    crossed = next(s for s in puzzles[1] if (s[[0, 3]] == s[[12, 9]]).all()).copy()
    crossed[[0, 3, 9, 12]] = MASK  # two digits, in either order: one guess, and both ways are right
    assert sudoku.classical(crossed[None])[:, 0].tolist() == [0, 0, 1]
    crossed[80] = crossed[79]
    assert sudoku.classical(crossed[None])[2, 0] == -1


def test_no_held_out_grid_in_training_not_even_relabeled(puzzles):
    p, s = puzzles
    names = np.array([0, 4, 2, 9, 1, 3, 8, 7, 5, 6], np.uint8)
    p, s = np.concatenate([names[p[-3:]], p]), np.concatenate([names[s[-3:]], s])
    (_, seen), (_, secret) = sudoku.split(p, s, 20)
    assert len(seen) == 280 and len(secret) == 20  # the three relabeled ones are gone

    def pattern(grid):  # independent of the digits' names: for each digit its set of cells
        return frozenset(tuple(np.flatnonzero(grid == d)) for d in range(1, 10))

    assert not {pattern(g) for g in seen} & {pattern(g) for g in secret}


def test_the_cache_is_used_and_a_damaged_one_is_made_again(tmp_path, capsys):
    first = sudoku.generated(5, 1, tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    again = sudoku.generated(5, 1, tmp_path)
    assert "damaged" in capsys.readouterr().out and path.read_bytes() == before
    assert (first[0] == again[0]).all() and [f.name for f in tmp_path.iterdir()] == [path.name]
    edited = np.load(path)
    edited[1, 0, 0] = edited[1, 0, 1]
    np.save(path, edited)
    sudoku.generated(5, 1, tmp_path)
    assert path.read_bytes() == before


def test_augmentation_keeps_puzzles_valid_and_moves_everything(puzzles):
    both = torch.from_numpy(np.stack(puzzles)).long()
    p, s = sudoku.augment(both, generator()).numpy()
    assert sudoku.valid(s).all() and ((p == MASK) | (p == s)).all()
    assert ((p != MASK).sum(1) == (puzzles[0] != MASK).sum(1)).all()
    assert not (s == puzzles[1]).all(1).any()
    assert all(count_solutions(x) == 1 for x in p[:5])
    # a fixed grid reaches every digit in every cell
    many = sudoku.augment(both[1:, :1].expand(1, 2000, 81), generator(1))[0]
    assert all(len(set(many[:, i].tolist())) == 9 for i in range(81))


def test_rules():
    easy = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    board = sudoku.parse(easy)
    assert sudoku.parse("\n".join(sudoku.draw([sudoku.CHARS[d] for d in board]))).tolist() == board.tolist()
    assert sudoku.parse(easy.replace(".", "_")).tolist() == sudoku.parse(easy.replace(".", "0")).tolist()
    for bad, says in [
        (easy[:-1], "this one 80"),
        (easy.replace("7", "x"), "'x' at cell 5"),
        ("5" + easy[:4] + "5" + easy[6:], "row 1 has the digit 5 twice"),
        ("." * 10 + "1" + "." * 17 + "1" + "." * 52, "column 2 has the digit 1 twice"),
        ("1" + "." * 9 + "1" + "." * 70, "box 1 has the digit 1 twice"),
    ]:
        with pytest.raises(BadInput, match=re.escape(says)):
            sudoku.parse(bad)


def test_published_formats(puzzles, tmp_path):
    p, s = (part[:3] for part in puzzles)
    q, a = (["".join(map(str, row)) for row in part] for part in (p, s))
    shah = np.zeros((3, 325), np.int64)
    for n in range(3):
        order = np.argsort(p[n] == 0, kind="stable")
        shah[n, 0] = (p[n] > 0).sum()
        shah[n, 1:] = np.stack([order // 9, order % 9, s[n][order], 0 * order], 1).ravel()
    np.save(tmp_path / "shah.npy", shah)


    def rows(pattern):
        return "".join(pattern.format(q=x, dots=x.replace("0", "."), a=y) for x, y in zip(q, a))

    files = {
        "kaggle1m.csv": "quizzes,solutions\n" + rows("{q},{a}\n"),
        "kaggle3m.csv": "\ufeffid,puzzle,solution,clues,difficulty\n" + rows("7,{dots},{a},24,1.5\n"),
        "extreme.csv": "source,question,answer,rating\r\n" + rows("hard,{dots},{a},9\r\n"),
        "backwards.csv": rows("{a},{q}\n"),
        "plain.txt": "# a comment\n\n" + rows("{dots}\n"),
        "shah.npy": None,
    }
    for name, text in files.items():
        if text:
            (tmp_path / name).write_text(text, encoding="utf-8")
        ((puzzle, solution, labels),) = sudoku.read_file(tmp_path / name)
        assert (puzzle == p).all() and labels == [""] * 3, name
        assert (solution == (0 if name == "plain.txt" else s)).all(), name
    assert [len(x) for x, _, _ in sudoku.read_file(tmp_path / "plain.txt", 2)] == [2, 1]
    assert next(sudoku.read_file(tmp_path / "extreme.csv", label="source"))[2] == ["hard"] * 3
    bad = tmp_path / "bad.csv"
    with pytest.raises(BadInput, match="line 1: expected 81"):
        bad.write_text(f"{q[0][:-1]}\n{q[1]}\n")
        list(sudoku.read_file(bad))
    with pytest.raises(BadInput, match="line 1: row 1 has the digit 5 twice"):
        bad.write_text("55" + "." * 79)
        list(sudoku.read_file(bad))
    for line, says in [("short,row", "line 3: expected 81"), (f"{q[0]},{a[1]}", "line 3: the solution contradicts")]:
        bad.write_text(f"quizzes,solutions\n{q[0]},{a[0]}\n{line}\n")
        with pytest.raises(BadInput, match=says):
            list(sudoku.read_file(bad))
    with pytest.raises(BadInput, match="no such file"):
        list(sudoku.read_file(tmp_path / "none.csv"))


# ---- Countdown ----


def every_solution(numbers, target=None):
    """An independent solver: {target: the answers as text}, by recursion over all pairs, without limits."""
    found = {}

    def go(values, steps):
        if len(values) == 1 and 10 <= values[0] <= 100:
            found.setdefault(values[0], []).append(",".join(steps))
        for i, j in itertools.permutations(range(len(values)), 2):
            a, b, rest = values[i], values[j], [v for k, v in enumerate(values) if k not in (i, j)]
            for op, c in (("+", a + b), ("-", a - b), ("*", a * b), ("/", Fraction(a, b) if b else -1)):
                if c >= 0 and c == int(c):
                    go([*rest, int(c)], [*steps, f"{a}{op}{b}={int(c)}"])

    go([int(x) for x in numbers], [])
    return found


def largest(answer):
    return max(int(c) for c in re.findall("=([0-9]+)", answer))


def test_generated_problems_are_those_that_brute_force_finds():
    rng = np.random.default_rng(0)
    draws = [*rng.integers(1, 100, (12, 3)), *rng.integers(1, 100, (3, 4)), [1, 1, 1], [99, 99, 99, 98], [2, 50, 7, 7]]
    for numbers in draws:
        problems, equations = countdown.solutions(np.array([numbers]))
        truth = every_solution(numbers)
        assert sorted(truth) == problems[:, -1].tolist()
        for problem, tokens in zip(problems, countdown.encode(problems, equations)):
            answer = countdown.decode(tokens)
            assert countdown.check(problem, answer) is None and answer in truth[problem[-1]]
            assert largest(answer) == min(map(largest, truth[problem[-1]]))


def test_the_limits_on_numbers_lose_no_target(monkeypatch):
    numbers = np.array([[99, 99, 99, 99, 98], [97, 3, 89, 96, 5]])
    limited = countdown.solutions(numbers)[0].tolist()
    monkeypatch.setattr(countdown, "limits", lambda n: [(10**10,) * 3] * (n - 1))
    assert countdown.solutions(numbers)[0].tolist() == limited and len(limited) > 80


@pytest.mark.parametrize(
    "answer, says",
    [
        ("87/29=3,32*3=96", None),
        ("32*87=2784,2784/29=96", None),
        ("87/29=3", "number left over: 32"),
        ("", "syntax of equation 1"),
        ("87/29=3,32*3=96,", "syntax of equation 3"),
        ("87/29=3,32*3=96\n", "syntax of equation 2"),
        ("87/29=3, 32*3=96", "syntax of equation 2"),
        ("87/29=03,32*3=96", "syntax of equation 1"),
        ("87//29=3,32*3=96", "syntax of equation 1"),
        ("87/29=3,32**3=96", "syntax of equation 2"),
        ("-87/29=-3,32*3=96", "syntax of equation 1"),
        ("(87/29)=3,32*3=96", "syntax of equation 1"),
        ("\uff18\uff17/29=3,32*3=96", "syntax of equation 1"),  # digits, but not ASCII
        ("__import__('os').abort()", "syntax of equation 1"),
        ("87+29=" + "9" * 5000, "syntax of equation 1"),
        ("87/0=0,32*3=96", "number not available in equation 1: 0"),
        ("87-87=0,32*3=96", "number not available in equation 1: 87"),
        ("87/32=2,29*3=96", "false equation 1"),
        ("87/29=3,32*3=95", "false equation 2: 32*3=95"),
        ("29-87=0,32*3=96", "false equation 1"),
        ("87/29=3,96+0=96", "number not available in equation 2: 96"),
        ("87/29=3,32*3=96,96+0=96", "number not available in equation 3: 0"),
        ("29*29=841,32*3=96", "number not available in equation 1: 29"),
        ("87/29=3,32+3=35", "wrong target: 35, not 96"),
        ("3*32=96,87+29=116", "number not available in equation 1: 3"),
        ("87-29=58,58+32=90", "wrong target"),
        ("87+29=116,32*3=96", "number not available in equation 2: 3"),
    ],
)
def test_the_checker_names_what_is_wrong(answer, says):
    wrong = countdown.check(countdown.parse("87,29,32,96"), answer)
    assert wrong is says if says is None else wrong.startswith(says) and wrong.startswith(countdown.mistakes(3))


def test_nothing_is_divided_by_zero_or_taken_from_less():
    assert countdown.check([5, 5, 7, 10], "5-5=0,7/0=0").startswith("false equation 2")
    assert countdown.check([5, 5, 7, 10], "5-5=0,0/7=0").startswith("wrong target")
    assert all(countdown.calculate(*side) is None for side in [(7, "/", 0), (7, "/", 2), (2, "-", 7)])


def test_begins_well_judges_the_first_choice_by_brute_force():
    random, verdicts = np.random.default_rng(2), []
    for _ in range(20):
        numbers = random.integers(1, 13, 3).tolist()
        for target, answers in every_solution(numbers).items():
            sides = {answer.partition("=")[0] for answer in answers}
            for _ in range(9):
                a, b = random.choice(numbers, 2, replace=False)
                side, result = f"{a}{random.choice(list('+-*/'))}{b}", random.integers(100)
                verdicts.append(countdown.begins_well([*numbers, target], f"{side}={result},1+1=2"))
                assert verdicts[-1] == (side in sides), (numbers, target, side)
    assert 100 < sum(verdicts) < len(verdicts) - 100
    assert countdown.begins_well([87, 29, 32, 96], "87/29=")  # what is written behind it does not count
    assert not countdown.begins_well([87, 29, 32, 96], "29+29=58,58+32=90")  # 29 is there once
    assert not countdown.begins_well([87, 29, 32, 96], "no answer at all")


def test_the_checker_agrees_with_brute_force_on_spoiled_answers():
    random = np.random.default_rng(1)
    verdicts = []
    for _ in range(30):
        numbers = random.integers(1, 13, 3).tolist()
        for target, answers in every_solution(numbers).items():
            for answer in {*answers}:
                spoiled = list(answer)
                spoiled[random.integers(len(spoiled))] = str(random.choice(list("0123456789+-*/=, ")))
                for text in (answer, "".join(spoiled)):
                    verdicts.append(countdown.check([*numbers, target], text) is None)
                    assert verdicts[-1] == (text in answers), (numbers, target, text)
    assert 1000 < sum(verdicts) < len(verdicts) - 1000


def test_countdown_tokens():
    problems, equations = countdown.generate(4, 100, 99, 0)
    tokens = countdown.encode(problems, equations)
    assert tokens.shape[1] == len(countdown.COORDS[4]) and (tokens != MASK).all()
    prompt, answer = countdown.draw([countdown.CHARS[i] for i in tokens[0]])[0].split("  ->  ")
    assert [int(x) for x in prompt.split(",")] == problems[0].tolist()
    assert answer.replace(" ", "") == countdown.decode(tokens[0])
    places = countdown.COORDS[4]
    spoiled = tokens[0].copy()
    i = next(i for i in np.flatnonzero(countdown.editable(len(spoiled))) if spoiled[i] == countdown.CHARS.index(" "))
    assert places[i][2] > 0  # a blank is in front of a number
    spoiled[i + 1], spoiled[i] = spoiled[i], 2
    assert "syntax" in countdown.check(problems[0], countdown.decode(spoiled))  # a blank behind a digit is not
    x, editable = countdown.start(tiny(vocab=18, coords=places), problems)
    assert (x == torch.where(editable, MASK, torch.from_numpy(tokens).long())).all()
    shuffled = np.column_stack([problems[:, [2, 0, 3, 1]], problems[:, 4]])
    assert torch.equal(countdown.start(tiny(vocab=18, coords=places), shuffled)[0], x)


def test_what_is_held_out_of_countdown_training():
    published = [22, 24, 25, 30, 32, 50, 65, 67, 96]  # of the test file
    assert sorted(countdown.held_out_targets(3)) == published
    (seen, equations), (operands, _), (targets, _) = countdown.split(*countdown.generate(3, 20_000, 30, 0), 0)
    multisets = lambda problems: set(map(tuple, np.sort(problems[:, :3], 1).tolist()))  # noqa: E731
    assert not multisets(seen) & multisets(operands) and len(multisets(operands)) > 200
    assert not set(seen[:, 3]) & set(targets[:, 3]) and set(targets[:, 3]) == set(countdown.held_out_targets(3))
    assert len(set(operands[:, 3])) > 75 and not set(operands[:, 3]) & set(targets[:, 3])
    x0, editable = countdown.batches(seen, equations, "cpu")(20_000, generator())
    text = ["".join(countdown.CHARS[i] for i in row) for row in x0.tolist()]
    counts = np.bincount([int(row[9:12]) for row in text], minlength=101)
    wanted = np.isin(np.arange(101), seen[:, 3])
    assert wanted.sum() == 82 and counts[~wanted].sum() == 0 and counts[wanted].min() > 150  # 244 on average
    assert all(countdown.check(countdown.parse(row[:12]), countdown.decode(x)) is None for row, x in zip(text[:99], x0))
    assert not editable[:, :12].any() and editable[:, 12:].all()


def test_published_countdown_files(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"input": "1,35,14,22", "output": "35-14=21,1+21=22", "k": 5}\n\n'
                    '{"input": "87,29,32", "output": "96", "k": "a"}\n', encoding="utf-8")  # fmt: skip
    ((problems, equations, labels),) = countdown.read_file(path, label="k")
    assert problems.tolist() == [[1, 35, 14, 22], [87, 29, 32, 96]] and labels.tolist() == ["5", "a"]
    assert equations.tolist() == [[[35, 1, 14, 21], [21, 0, 1, 22]], [[0] * 4] * 2]
    for row, says in [
        ('{"input": "1,35,14,22"}', "line 2: not a JSON object with input, output"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"input": "1,35,14,22", "output": "35-14=21,22+0=22"}', "line 2: the solution is wrong, number not avail"),
        ('{"input": "1,35,14,222", "output": ""}', "expected 3 to 5"),
        ('{"input": "1,35,14", "output": "9"}', "the target from 10 to 100"),
        ('{"input": "1,35,14,3", "output": "90"}', "another number of operands"),
    ]:
        path.write_text('{"input": "87,29,32", "output": "96"}\n' + row)
        with pytest.raises(BadInput, match=says):
            list(countdown.read_file(path))


# ---- training ----


def toy_batch(n, g):
    """Sequences of four equal tokens."""
    x0 = torch.randint(1, 4, (n, 1), generator=g).expand(n, 4).contiguous()
    return x0, torch.ones_like(x0, dtype=torch.bool)


def toy_model(**kwargs):
    torch.manual_seed(0)
    return rmdm.RMDM(Config(vocab=4, coords=4, width=16, **{"loops": 2} | kwargs))


def test_a_resumed_run_ends_bit_identical(tmp_path):
    config = TrainConfig(steps=24, batch=4, warmup=5, eval_every=10, save_every=10, loops_min=1, supervise="1")
    rmdm.train(toy_model(inject=True), config, toy_batch, lambda m: {"done": 1}, tmp_path / "whole")
    calls = []

    def stopping(n, g):
        calls.append(n)
        if len(calls) == 13:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the middle of step 13
        return toy_batch(n, g)

    with pytest.raises(KeyboardInterrupt):
        rmdm.train(toy_model(inject=True), config, stopping, lambda m: {"done": 1}, tmp_path / "cut")
    half = rmdm.read_checkpoint(tmp_path / "cut")
    assert half["step"] == 13
    rmdm.train(toy_model(inject=True), config, toy_batch, lambda m: {"done": 1}, tmp_path / "cut", resume=half)
    whole, cut = (rmdm.read_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    for part in ("model", "ema"):
        assert all(torch.equal(w, cut[part][name]) for name, w in whole[part].items())
    assert torch.equal(whole["rng"], cut["rng"]) and whole["flops"] == cut["flops"]
    assert not torch.equal(half["ema"]["token.weight"], cut["ema"]["token.weight"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert steps == [0, 10, 13, 20, 24]


def test_loops_are_drawn_and_their_cost_is_counted(tmp_path):
    """The FLOPs in the log are those that torch counts, and the loops those of loops_min."""
    for k, (loops_min, supervise, expected) in enumerate([(2, "2", {2, 3, 4}), (9, "all", {4}), (0, "final", {4})]):
        seen, count, model = [], [], toy_model(loops=4, inject=True)
        model.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
        with FlopCounterMode(display=False) as counter:
            config = TrainConfig(steps=30, batch=2, loops_min=loops_min, supervise=supervise)
            look = lambda m: count.append(counter.get_total_flops()) or {}  # noqa: E731
            rmdm.train(model, config, toy_batch, look, tmp_path / str(k))
        assert set(seen) == expected and len(seen) == 30
        muon = 30 * sum(5 * (4 * a * a * b + 2 * a**3) for a, b in ((16, 48), (16, 16), (16, 64), (16, 64)))
        logged = json.loads((tmp_path / str(k) / "log.jsonl").read_text().splitlines()[-1])["flops"]
        assert count[0] - muon == logged


def test_by_noise_prints_the_cross_entropy_of_each_loop(capsys):
    model, x0 = tiny(loops=3), torch.randint(1, 4, (500, 3), generator=generator())
    rmdm.by_noise(model, x0, torch.ones_like(x0, dtype=torch.bool))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    for l, row in enumerate(rows, 1):
        log_p = model(torch.zeros_like(x0), torch.ones(500), 3, read=(l,))[0].log_softmax(-1)
        at_t1 = F.nll_loss(log_p.flatten(0, 1), x0.flatten()).item()
        assert row[0] == f"L={l}" and float(row[-1]) == pytest.approx(at_t1, abs=6e-4)
        assert float(row[1]) == pytest.approx(at_t1, rel=0.4)  # at t = 0.1 as many nats a token, not a tenth


def test_a_prefix_without_gradient_needs_injection(tmp_path):
    with pytest.raises(BadInput, match="supervise=1 of 2 loops needs inject=true"):
        rmdm.train(toy_model(), TrainConfig(supervise="1"), toy_batch, lambda m: {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_from_another_program(tmp_path):
    """From a thread, with NumPy's numbers; a folder that is taken and another model's run are refused."""
    config = TrainConfig(steps=2, batch=2)
    coords = np.array([[0], [1], [2], [3]])
    results, run = [], tmp_path / "run"

    def work():
        model = rmdm.RMDM(Config(vocab=4, coords=coords, width=16, loops=2))
        results.append(rmdm.train(model, config, toy_batch, lambda m: {"score": np.float32(0.5)}, run))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    x = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(rmdm.load(run)(x, torch.ones(1)), results[0](x, torch.ones(1)))
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["score"] == 0.5
    with pytest.raises(BadInput, match="already holds a run"):
        rmdm.train(toy_model(), config, toy_batch, lambda m: {}, run)
    old = rmdm.read_checkpoint(run)
    del old["config"]["coord_bias"]  # from before the field was there
    model = rmdm.RMDM(Config(vocab=4, coords=4, width=16, loops=2))
    rmdm.train(model, config, toy_batch, lambda m: {}, run, resume=old)
    with pytest.raises(BadInput, match="another model"):
        other = rmdm.RMDM(Config(vocab=4, coords=4, width=16, loops=2, inject=True))
        rmdm.train(other, config, toy_batch, lambda m: {}, run, resume=rmdm.read_checkpoint(run))


def test_bad_coordinates():
    for coords in (0, -1, [[0, 1], [0]], [[0.5]], [[-1]], [1, 2], "x", [], None):
        with pytest.raises(BadInput, match="coords needs"):
            Config(vocab=4, coords=coords)
    assert Config(vocab=4, coords=np.int64(2)).coords == Config(vocab=4, coords=torch.tensor([[0], [1]])).coords


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = TrainConfig(steps=20, batch=4, save_every=5, eval_every=5)

    class Spoiled(rmdm.RMDM):
        def decode(self, h):
            return super().decode(h) * (math.nan if (tmp_path / "checkpoint.pt").exists() else 1)

    torch.manual_seed(0)
    with pytest.raises(BadInput, match="the loss became nan, its gradient nan, by step 10"):
        rmdm.train(Spoiled(toy_model().config), config, toy_batch, lambda m: {}, tmp_path)
    assert rmdm.read_checkpoint(tmp_path)["step"] == 5


def test_a_four_by_four_board_is_learned(tmp_path):
    rows = list(itertools.permutations((1, 2, 3, 4)))
    grids = [
        sum(g, ())
        for g in itertools.product(rows, repeat=4)
        if all(len(set(col)) == 4 for col in zip(*g))
        and all(len({g[r][c], g[r][c + 1], g[r + 1][c], g[r + 1][c + 1]}) == 4 for r in (0, 2) for c in (0, 2))
    ]
    assert len(grids) == 288
    grids = torch.tensor(grids)
    boards = grids[torch.randperm(288, generator=generator())]

    def batch(n, g):  # clues where any grid of all 288 could still differ are fine: half the cells are clues
        x0 = boards[torch.randint(0, 200, (n,), generator=g)]
        return x0, torch.rand(x0.shape, generator=g) < 0.6

    torch.manual_seed(0)
    coords = tuple((i // 4, i % 4, i // 8 * 2 + i % 4 // 2) for i in range(16))
    model = rmdm.RMDM(Config(vocab=5, coords=coords, width=32, heads=2, loops=4))
    config = TrainConfig(steps=400, batch=64, eval_every=1000, save_every=1000)
    model = rmdm.train(model, config, batch, lambda m: {}, tmp_path)
    unique = []  # puzzles from grids not trained on, with exactly one solution
    for grid, u in zip(boards[200:], torch.rand(88, 16, generator=generator(5))):
        clues = u < 0.5
        if ((grids == grid) | ~clues).all(1).sum() == 1:
            unique.append(torch.where(clues, grid, MASK))
    unique = torch.stack(unique)
    solved = rmdm.sample(model, unique, steps=16).x
    assert len(unique) > 40 and all(tuple(x) in set(map(tuple, grids.tolist())) for x in solved.tolist())


# ---- checkpoints and commands ----


def test_checkpoints_from_strangers(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"config": Evil(), "ema": {}}))
    with pytest.raises(BadInput, match="not an rmdm checkpoint"):
        rmdm.load(path)
    torch.save({"config": Evil(), "ema": {}}, path)
    with pytest.raises(BadInput, match="not an rmdm checkpoint"):
        rmdm.load(path)
    assert not (tmp_path / "owned").exists()
    for wrong in ({"config": {}, "ema": {}}, {"config": {"vocab": 3, "coords": 3}, "ema": {}}, [1, 2], torch.ones(3)):
        rmdm.save(path, wrong)
        with pytest.raises(BadInput):
            rmdm.load(path)
    rmdm.save(path, {"config": {}, "ema": {}, "task": "sudoku"})
    with pytest.raises(BadInput, match="made for sudoku, not for countdown"):
        rmdm.load(path, task="countdown")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match="damaged"):
        rmdm.load(path)
    with pytest.raises(BadInput, match="no such file"):
        rmdm.load(tmp_path / "none.pt")


KILLED = """
import sys, torch, rmdm
rmdm.pick_device("cpu")
torch.manual_seed(0)
model = rmdm.RMDM(rmdm.Config(vocab=4, coords=4, width=64, loops=2))
def batch(n, g):
    x0 = torch.randint(1, 4, (n, 1), generator=g).expand(n, 4).contiguous()
    return x0, torch.ones_like(x0, dtype=torch.bool)
config = rmdm.TrainConfig(steps=400, batch=4, save_every=1, eval_every=50)
resume = rmdm.read_checkpoint(sys.argv[1]) if len(sys.argv) > 2 else None
rmdm.train(model, config, batch, lambda m: {}, sys.argv[1], resume=resume)
"""


def test_a_training_killed_five_times_ends_as_if_never_killed(tmp_path):
    """kill -9 at random moments; with save_every=1 most of them fall into the writing of a checkpoint."""

    def start(*argv):
        return subprocess.Popen([sys.executable, "-c", KILLED, *argv], cwd=HERE, stderr=subprocess.DEVNULL)

    whole = start(str(tmp_path / "whole"))
    pause, steps = np.random.default_rng(0), [0]
    for _ in range(5):
        cut = start(str(tmp_path / "cut"), *["resume"] * (steps[-1] > 0))
        path, deadline = tmp_path / "cut" / "checkpoint.pt", time.monotonic() + 60
        while time.monotonic() < deadline and cut.poll() is None:
            if path.exists() and rmdm.read_checkpoint(path)["step"] > steps[-1]:  # whole at every moment
                break
        time.sleep(pause.random() * 0.1)
        cut.kill()
        assert cut.wait() == -signal.SIGKILL  # it was still running
        steps.append(rmdm.read_checkpoint(path)["step"])
    assert start(str(tmp_path / "cut"), "resume").wait(60) == whole.wait(60) == 0
    assert steps == sorted(set(steps)) and steps[-1] < 400
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert a["step"] == b["step"] == 400 and torch.equal(a["rng"], b["rng"])
    for part in ("model", "ema"):
        assert all(torch.equal(w, b[part][name]) for name, w in a[part].items())
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    first, second = ([(json.loads(line)["step"], json.loads(line).get("loss")) for line in log] for log in logs)
    assert [step for step, _ in second if step % 50 == 0] == [step for step, _ in first if step % 50 == 0]
    rmdm.load(tmp_path / "cut" / "model.pt")


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    config = TrainConfig(steps=20, batch=4, save_every=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batch(n, g):
        if (tmp_path / "checkpoint.pt").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return toy_batch(n, g)

    try:
        with pytest.raises(BadInput, match="cannot write to .*; what was saved there before is whole"):
            rmdm.train(toy_model(), config, batch, lambda m: {}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rmdm.read_checkpoint(tmp_path)["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for name in ("a", "b"):
        rmdm.train(toy_model(), TrainConfig(steps=30, batch=4), toy_batch, lambda m: {}, tmp_path / name)
    a, b = (rmdm.read_checkpoint(tmp_path / name) for name in ("a", "b"))
    assert all(torch.equal(w, b["model"][name]) for name, w in a["model"].items())


def test_prefixes_of_wrapped_models_load(tmp_path):
    rmdm.train(toy_model(), TrainConfig(steps=2, batch=4), toy_batch, lambda m: {}, tmp_path)
    ckpt = rmdm.read_checkpoint(tmp_path)
    plain = rmdm.load(tmp_path).state_dict()
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        rmdm.save(tmp_path / "x.pt", ckpt | {"ema": {prefix + name: w for name, w in ckpt["ema"].items()}})
        assert all(torch.equal(w, plain[name]) for name, w in rmdm.load(tmp_path / "x.pt").state_dict().items())
    missing = {name: w for name, w in ckpt["ema"].items() if name != "unembed.weight"}
    longer = ckpt["ema"] | {"unembed.weight": torch.ones(9, 16)}
    for wrong, says in [
        ({"ema": missing}, "unembed.weight"),
        ({"ema": longer}, "size mismatch for unembed"),
        ({"ema": {"token.weight": 3}}, ""),
        ({"config": ckpt["config"] | {"width": 2**40}}, "other sizes"),
        ({"config": ckpt["config"] | {"layers": 2**40}}, "more layers"),
        ({"config": ckpt["config"] | {"depth": 3}}, "depth"),
    ]:
        rmdm.save(tmp_path / "x.pt", ckpt | wrong)
        with pytest.raises(BadInput, match=f"do not fit the configuration .*{says}"):
            rmdm.load(tmp_path / "x.pt")


def run(capsys, monkeypatch, module, *argv):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        rmdm.cli(module.main)
    return stop.value.code or 0, *capsys.readouterr()


FUZZ = int(os.environ.get("FUZZ", 150))  # inputs to each parser; the long run: FUZZ=10000 pytest -k hostile
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ROW = '{"input": "87,29,32,96", "output": "87/29=3,32*3=96"}\n'
ODD = [*"0123456789.,-+*/=_{}[]|#\x00\r\n\t \"'%", "\ufeff", "\u0663", "\uff11", "\ud800", "null", "-1", "1e9"]
ODD += ["9" * 400, "[" * 3000]


def spoil(data, random):
    """A copy of a str or bytes with one to three random edits: cut, repeat, replace, insert."""
    for _ in range(random.integers(1, 4)):
        i, j = sorted(random.integers(0, len(data) + 1, 2))
        j = min(j, i + 2) if random.random() < 0.7 else j
        new = ODD[random.integers(len(ODD))]
        new = new.encode("utf-8", "surrogatepass") if isinstance(data, bytes) else new
        data = data[:i] + (data[i:j] * 2 if random.random() < 0.2 else new * (random.random() < 0.8)) + data[j:]
    return data


def hostile_files(tmp_path, puzzles):
    """name -> (the bytes of a good file, what reads it)"""
    rmdm.train(toy_model(), TrainConfig(steps=1, batch=4), toy_batch, lambda m: {}, tmp_path)
    text = ["".join(map(str, row)) for part in puzzles for row in part[:2]]
    np.save(tmp_path / "shah.npy", np.zeros((2, 325), np.int64))
    return {
        "x.csv": (f"id,question,answer\n1,{text[0]},{text[2]}\n2,{text[1]},{text[3]}\n".encode(), sudoku.read_file),
        "x.txt": (f"# two\n{EASY}\n{text[0]}\n".encode(), sudoku.read_file),
        "x.npy": ((tmp_path / "shah.npy").read_bytes(), sudoku.read_file),
        "x.jsonl": (ROW.encode() * 3, countdown.read_file),
        "x.pt": ((tmp_path / "model.pt").read_bytes(), lambda path: [rmdm.load(path)]),
    }


def test_hostile_files_are_read_or_refused_in_one_line(tmp_path, puzzles):
    random, refused = np.random.default_rng(0), 0
    for name, (good, read) in hostile_files(tmp_path, puzzles).items():
        for _ in range(FUZZ):
            (tmp_path / name).write_bytes(spoil(good, random))
            try:
                list(read(tmp_path / name))
            except BadInput as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 1000
    assert FUZZ < refused < 5 * FUZZ


def test_hostile_texts_are_read_or_refused_in_one_line():
    random, truth = np.random.default_rng(0), set(every_solution((87, 29, 32))[96])
    right = sorted(truth)
    configs = rmdm.Config(4, 3), TrainConfig()
    for _ in range(FUZZ):
        for parse, good in ((sudoku.parse, EASY), (countdown.parse, "87,29,32,96"), (float, "")):
            try:
                found = parse(spoil(good, random))
            except BadInput as e:
                assert len(str(e)) < 300 and "\n" not in str(e)
            except ValueError:
                assert parse is float
            else:
                assert parse is not sudoku.parse or sudoku.conflict(found) is None and len(found) == 81
        answer = spoil(right[random.integers(len(right))], random)
        assert (countdown.check([87, 29, 32, 96], answer) is None) == (answer in truth), answer
        pair = spoil(["steps=30", "lr=0.1", "supervise=all", "inject=true", "width=64"][random.integers(5)], random)
        with contextlib.suppress(BadInput):
            rmdm.configure([pair], *configs)


def test_hostile_options_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    options = "steps loops eps order threshold temperature seed data by set out json sweep device checkpoint preset"
    options = [f"--{name}" for name in f"{options} resume top numbers problems puzzles".split()]
    values = "3 -1 nan inf 1e400 none.csv cpu x=y steps=0 lr=nan batch=-1 loops=2.5 width=7".split() + [""]
    for _ in range(FUZZ):
        argv = [str(random.choice(options if random.random() < 0.5 else values)) for _ in range(random.integers(1, 5))]
        for module in (sample, countdown, sudoku):
            task = ["sudoku", "1" * 81] if module is sample else ["--data", "none.csv"]  # an error at the latest here
            code, _, err = run(capsys, monkeypatch, module, *argv, *task)
            assert code == 2 and "Traceback" not in err and err.count("\n") == 1, (module, argv, err)


def test_the_sudoku_commands_end_to_end(tmp_path, monkeypatch, capsys, puzzles):
    monkeypatch.chdir(tmp_path)
    small = "steps=3 batch=4 width=8 heads=1 loops=2 loops_min=1 supervise=1 warmup=1".split()
    run_sudoku = lambda *argv: run(capsys, monkeypatch, sudoku, *argv)  # noqa: E731
    run_sample = lambda *argv: run(capsys, monkeypatch, sample, *argv)  # noqa: E731
    monkeypatch.setattr(sudoku, "HELD_OUT", 4)
    batches, calls = sudoku.batches, []

    def interrupting(*data):
        batch = batches(*data)
        return lambda *a: (calls.append(1) or len(calls) == 2) and signal.raise_signal(signal.SIGINT) or batch(*a)

    monkeypatch.setattr(sudoku, "batches", interrupting)
    code, out, err = run_sudoku("--puzzles", 8, "--device", "cpu", "--set", *small)
    assert code == 130 and "--resume runs/sudoku" in err and rmdm.read_checkpoint("runs/sudoku")["step"] == 2
    code, out, _ = run_sudoku("--resume", "runs/sudoku")
    assert code == 0 and "from step 2" in out and "T=81" in out and len(calls) == 3
    command = re.search(r"python sample.py (sudoku --checkpoint \S+ \S{81})", out)[1]
    code, out, _ = run_sample(*command.split())
    assert code == 1 and "not solved: " in out and out.count("|") == 36
    p, s = (["".join(map(str, row)) for row in part[:6]] for part in puzzles)
    rows = "".join(f"{x},{y},{i % 2}\n" for i, (x, y) in enumerate(zip(p, s)))
    (tmp_path / "p.csv").write_text("puzzle,solution,level\n" + rows)
    model = ("--checkpoint", "runs/sudoku")
    code, out, _ = run_sample("sudoku", *model, "--data", "p.csv", "--steps", "1,2", "--by", "level", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["steps"] for r in rows] == [1, 1, 1, 2, 2, 2] and isinstance(rows[0]["n"], int)
    assert rows[0]["loops"] == 2 and rows[0]["order"] == "confidence" and rows[0]["checkpoint"] == model[1]
    assert [(r["group"], r["n"]) for r in rows[:3]] == [("0", 3), ("1", 3), ("all", 6)]
    assert rows[0]["nfe"] == rows[0]["layer_passes"] == 2 and 0 < rows[2]["cell"] < 1
    code, out, _ = run_sample("sudoku", *model, "--data", "p.csv", *"--steps 1 --loops 9 --eps 99 --json".split())
    assert code == 0 and json.loads(out)["nfe"] == 1 and json.loads(out)["eps"] == 99  # stops at once
    code, out, _ = run_sample("sudoku", "--data", "p.csv", "--classical")
    row = json.loads(out)
    assert code == 0 and row["n"] == 6 and row["search"] == 1 and row["mean"] > 0
    code, again, _ = run_sudoku("--resume", "runs/sudoku")  # a finished run reports once more
    assert code == 0 and len(calls) == 3 and command in again
    kept = Path("runs/sudoku/checkpoint.pt").read_bytes()
    monkeypatch.setattr(sudoku, "HELD_OUT", 6)  # as many as p.csv has
    whole = rmdm.read_checkpoint("runs/sudoku")
    for name, change in (("odd1", {"optimizers": 3}), ("odd2", {"train": {"stepz": 3}}), ("odd3", {"model": {}})):
        Path(name).mkdir()
        rmdm.save(f"{name}/checkpoint.pt", whole | change)
        Path(f"{name}/log.jsonl").write_text('{"step": 0}\n')
    for argv, says in [
        ([], "already holds a run"),
        (["--resume", "odd1"], "cannot go on from this checkpoint"),
        (["--resume", "odd2"], "damaged, or made by another version"),
        (["--resume", "odd3"], "cannot go on from this checkpoint"),
        (["--seed", "-1"], "argument --seed"),
        (["--seed", "9" * 5000], "argument --seed"),
        (["--out", "b", "--puzzles", "8", "--set", "steps=1", "--set", "width=1000000000"], "no room for this model"),
        (["--out", "b", "--set", "ema=1"], "ema from 0 to below 1"),
        (["--out", "b", "--set", "lr=nan"], "lr, lr_rest and clip are above 0"),
        (["--out", "b", "--set", "lr_rest=nan"], "lr, lr_rest and clip are above 0"),
        (["--resume", "nowhere"], "no such file"),
        (["--resume", "runs/sudoku/model.pt"], "weights only"),
        (["--resume", "runs/sudoku", "--set", "steps=9"], "leave out --set"),
        (["--out", "b", "--puzzles", "0"], "argument --puzzles"),
        (["--out", "b", "--device", "mps"], "no mps device"),
        (["--out", "b", "--set", "stepz=3"], "no field 'stepz'"),
        (["--out", "b", "--set", "steps=many"], "steps must be of type int"),
        (["--out", "b", "--set", "heads=3"], "heads"),
        (["--out", "b", "--set", "supervise=some"], "supervise"),
        (["--out", "b", "--set", "inject=false"], "supervise=8 of 16 loops needs inject=true"),
        (["--out", "b", "--data", "p.csv"], "more than"),
        (["--out", "b", "--data", "p.csv", "--puzzles", "8"], "leave out --puzzles"),
    ]:
        code, out, err = run_sudoku(*argv)
        assert code == 2 and says in err.splitlines()[-1] and "Traceback" not in err, argv
    (tmp_path / "many.txt").write_text("# two\n" + "\n".join(p[:2]) + "\n")
    code, out, _ = run_sample("sudoku", "many.txt", "--checkpoint", "runs/sudoku", "--show", "--steps", "2")
    assert "of 2 right" in out and "loop 2: " in out and "step 2 of 2, 2 loops" in out and "\033" not in out
    code, out, _ = run_sample("sudoku", p[0], "--checkpoint", "runs/sudoku", "--show", "--steps", "1", "--loops", "16")
    pictures = re.findall(r"loop (\d+): ", out)  # every second one, none twice, and no blank lines for the others
    assert [int(l) for l in pictures] == list(range(2, 17, 2)) and "\n\n\n" not in out
    drawn = "\n".join(sudoku.draw([sudoku.CHARS[d] for d in puzzles[1][0]]))  # nothing left to fill in
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(("\ufeff" + drawn).encode())))
    code, out, _ = run_sample("sudoku", "--checkpoint", "runs/sudoku")
    assert code == 0 and "right, checked by the rules (0 steps, 0 loops)" in out
    code, out, _ = run_sample("sudoku", "--checkpoint", "runs/sudoku", "--data", "p.csv", "--sweep")
    assert code == 0 and re.findall(r"L=(\d+)", out) == ["1", "2", "3", "4"]
    (tmp_path / "short.txt").write_text(p[0] + "\n" + p[1] + "5\n")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    for argv, says in [
        (["sudoku", "123"], "this one 3"),
        (["sudoku", "55" + "." * 79], "row 1 has the digit 5 twice"),
        (["sudoku", "many.txt", "--checkpoint", "nowhere"], "nowhere: no such file"),
        (["sudoku", "many.txt", "--checkpoint", "noise.bin"], "not an rmdm checkpoint"),
        (["sudoku", "none.txt"], "none.txt: No such file"),
        (["sudoku", "short.txt"], "short.txt, line 2: a puzzle has 81 cells, this one 82"),
        (["sudoku", "noise.bin"], "not a text file"),
        (["sudoku", "many.txt", "--steps", "0"], "--steps is a number from 1"),
        (["sudoku", "many.txt", "--loops", "few"], "--loops is a number from 1 to 999 or `adaptive`"),
        (["sudoku", "many.txt", "--threshold", "2"], "argument --threshold"),
        (["sudoku", "many.txt", "--order", "best"], "argument --order"),
        (["sudoku", "many.txt", "--order", "ancestral", "--threshold", "0.9"], "threshold needs an order"),
        (["chess"], "argument task"),
        (["sudoku", "nosuch"], "nosuch: No such file"),
        (["sudoku", "many.txt", "--json"], "need --data"),
        (["sudoku", "many.txt", "--steps", "1,5"], "several --steps need --data"),
        (["sudoku", "many.txt", "--loops", "9" * 5000], "--loops is a number"),
        (["sudoku", "--data", "p.csv", "--sweep", "--json"], "its own table"),
        (["sudoku", "x" + "." * 80], "'x' at cell 1"),
        (["sudoku", "--data", "nothing.csv"], "no such file"),
        (["sudoku", "many.txt", "--classical"], "need --data"),
        (["sudoku", "--data", "nothing.csv", "--classical"], "no such file"),
        (["countdown", "--data", "p.csv", "--classical"], "--classical is for Sudoku"),
        (["sudoku", "--data", "noise.bin"], "noise.bin"),
        (["sudoku", "--data", "p.csv", "--by", "color"], "no column 'color'"),
    ]:
        if "--checkpoint" not in argv:
            argv = [*argv, "--checkpoint", "runs/sudoku"]
        code, out, err = run_sample(*argv)
        assert code == 2 and says in err and err.splitlines()[-1].startswith("sample.py: "), argv
        assert "Traceback" not in err and out == "", argv
    assert Path("runs/sudoku/checkpoint.pt").read_bytes() == kept and not Path("b").exists()


def test_the_countdown_commands_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(countdown, "TEST", 8)
    small = "steps=3 batch=4 width=8 heads=1 loops=2 loops_min=1 supervise=1 warmup=1".split()
    train = lambda *argv: run(capsys, monkeypatch, countdown, *argv)  # noqa: E731
    use = lambda *argv: run(capsys, monkeypatch, sample, "countdown", "--checkpoint", "runs/countdown", *argv)  # noqa: E731
    code, out, _ = train("--problems", 1000, "--device", "cpu", "--set", *small)
    assert code == 0 and "CD3" in out and "held-out operands, 8 problems" in out and "held-out targets" in out
    code, out, _ = use(re.search(r"sample.py countdown --checkpoint \S+ (\S+)", out)[1], "--show", "--steps", "2")
    assert code == 1 and "not solved: " in out and "step 2 of 2, 2 loops" in out and "loop 2: " in out
    rows = [{"input": "20,4,7,87", "output": "20*4=80,7+80=87"}, {"input": "7,8,9", "output": "24"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = use("--data", "p.jsonl", "--steps", "1,34", "--json")
    score = json.loads(out.splitlines()[1])
    assert code == 0 and score["n"] == 2 and score["steps"] == 34 and score["nfe"] == score["layer_passes"] == 44
    assert score["solved"] + sum(score[mistake] for mistake in countdown.mistakes(3)) == 1
    code, out, _ = use("--data", "p.jsonl", "--sweep")
    assert code == 0 and re.findall(r"L=(\d+)", out) == ["1", "2", "3", "4"]
    rows = [dict(rows[0], input=f"20,4,7,{t}", output=f"{t}") for t in range(10, 90)]
    Path("no.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    held = json.dumps({"input": "20,4,16,96", "output": "20*4=80,80+16=96"})  # 96 is a held-out target
    Path("held.jsonl").write_text("\n".join([held] * 200))
    for argv, says in [
        (["--out", "b", "--top", "100"], "argument --top"),
        (["--out", "b", "--numbers", "6"], "argument --numbers"),
        (["--out", "b", "--problems", "1"], "argument --problems"),
        (["--out", "b", "--data", "p.jsonl"], "at least 100 problems"),
        (["--out", "b", "--data", "p.jsonl", "--numbers", "4"], "problems with 3 operands, not 4"),
        (["--out", "b", "--data", "no.jsonl"], "a solution for every problem"),
        (["--out", "b", "--data", "held.jsonl"], "nothing left to train or test on"),
        (["--out", "b", "--data", "none.jsonl"], "none.jsonl"),
    ]:
        code, _, err = train(*argv)
        assert code == 2 and says in err.splitlines()[-1] and "Traceback" not in err, argv
    assert not Path("b").exists()
    for argv, says in [
        (["1,2,3,4,50"], "the model is for 3 operands, not 4"),
        (["1,2,3"], "expected 3 to 5 operands"),
        (["1,2,100,50"], "operands are from 1 to 99"),
        (["1,2,3,9" + "9" * 5000], "expected 3 to 5"),
        (["no.jsonl"], "no.jsonl, line 1: expected"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--data", "p.jsonl", "--by", "level"], "line 1: not a JSON object with input, output, level"),
    ]:
        code, out, err = use(*argv)
        assert code == 2 and says in err and "Traceback" not in err and out == "", argv


def test_the_links_from_equations_to_code_hit():
    links = re.findall(r"\[`(\w+)`\]\(rmdm.py#L(\d+)\)", (HERE / "README.md").read_text())
    code = (HERE / "rmdm.py").read_text().splitlines()
    assert len(links) >= 10
    for name, line in links:
        assert re.match(rf"\s*(def|class) {name}\b", code[int(line) - 1]), f"{name} is not at line {line}"


def test_rmdm_alone_in_an_empty_folder_runs_the_readme_example(tmp_path):
    code = re.search(r"```python\n(# Use rmdm.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    (tmp_path / "rmdm.py").write_bytes((HERE / "rmdm.py").read_bytes())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "[[1, 2, 3, 4, 5, 6, 7, 8]]" in done.stdout


# ---- speed, measured side by side: in turns, so that a noisy machine is equally unkind to all; medians ----


class Plain(rmdm.RMDM):
    """An ordinary transformer of depth K x L, with the same read-offs after every K layers."""

    def __init__(self, config):
        plain = dict(layers=config.layers * config.loops, loop_embedding=False, loop_norm=False, inject=False)
        super().__init__(replace(config, **plain))

    def recur(self, h, l, h0, c):
        K = len(self.block) // self.config.loops
        for layer in self.block[K * (l - 1) : K * l]:
            h = layer(h, self.same)
        return h


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's own layer in place of ours."""

    def __init__(self, width, heads, axes):
        how = dict(dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
        super().__init__(width, heads, 4 * width, **how)

    def forward(self, h, same):
        return super().forward(h)


def in_turns(rounds, **jobs):
    """{name: median seconds}"""
    seconds = {name: [] for name in jobs}
    for i in range(rounds + 2):  # two to warm up
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(s[2:])) for name, s in seconds.items()}


def training_step(model, size, precision="medium", **how):
    """A job for in_turns: a step as in rmdm.train, with `size` examples; `how` is for rmdm.loss."""
    c, g, optimizers = model.config, generator(), rmdm.make_optimizers(model, TrainConfig())
    x0 = torch.randint(1, c.vocab, (size, len(c.coords)), generator=g)

    def job():
        torch.set_float32_matmul_precision(precision)
        rmdm.loss(model, x0, torch.ones_like(x0, dtype=torch.bool), generator=g, **how)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return job


def saved_mebibytes(job):
    """What a training step keeps for its backward pass."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        job()
    return sum(sizes.values()) / 2**20


@pytest.mark.skipif("SPEED" not in os.environ, reason="minutes of measuring, on an idle machine: SPEED=1")
def test_speed(monkeypatch):
    rmdm.pick_device("cpu")
    tasks = (sudoku, argparse.Namespace(data=None)), (countdown, argparse.Namespace(data=None, numbers=3, preset="cpu"))
    print(f"\n\n{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| one training step | ms | GFLOP/s | of the time of ours |\n|---|---|---|---|")
    for task, args in tasks:
        config, training, _ = task.presets(args)["cpu"]
        config = replace(config, loops=min(config.loops, 8))  # every loop with gradient, as a plain layer has
        ours, size = rmdm.RMDM(config), training.batch
        with monkeypatch.context() as patch:
            patch.setattr(rmdm, "Layer", EncoderLayer)
            theirs = rmdm.RMDM(config)
        square, out = torch.randn(2, 1024, 1024), torch.empty(1024, 1024)
        jobs = {
            "rmdm": training_step(ours, size),
            "rmdm with nn.TransformerEncoderLayer": training_step(theirs, size),
            "the same, torch's default precision": training_step(theirs, size, "highest"),
            f"plain transformer, {config.layers * config.loops} layers": training_step(Plain(config), size),
            "matrix product, 1024 x 1024": lambda: torch.mm(*square, out=out),
        }
        times = in_turns(30, **jobs)
        for name, seconds in times.items():
            flops = 2 * 1024**3 if "product" in name else 3 * size * ours.flops(config.loops, config.loops)
            ratio = f"{seconds / times['rmdm']:.2f}" if "product" not in name else ""
            where = f"{task.__name__.removeprefix('train_')}: {name}"
            print(f"| {where} | {1000 * seconds:.1f} | {flops / seconds / 1e9:.0f} | {ratio} |", flush=True)

    preset, training, _ = sudoku.presets(tasks[0][1])["cpu"]
    config = replace(preset, loops=8)
    changes = [dict(), dict(loops=4), dict(loops=16), dict(batch=16), dict(batch=64), dict(width=32), dict(width=128)]
    jobs = {}
    for change in changes:
        model = rmdm.RMDM(replace(config, **{k: v for k, v in change.items() if k != "batch"}))
        name = ", ".join(f"{k} {v}" for k, v in change.items()) or "Sudoku: loops 8, batch 32, width 64"
        jobs[name] = training_step(model, change.get("batch", training.batch))
    how = dict(loops=12, supervise=training.supervise)
    jobs["the preset, 12 loops, the last 8 with gradient"] = training_step(rmdm.RMDM(preset), training.batch, **how)
    memory = {name: saved_mebibytes(job) for name, job in jobs.items()}
    print("\n| one training step | ms | MiB kept for the backward pass |\n|---|---|---|")
    for name, seconds in in_turns(20, **jobs).items():
        print(f"| {name} | {1000 * seconds:.0f} | {memory[name]:.0f} |", flush=True)

    model, puzzles, costs = rmdm.load(HERE / "weights" / "sudoku-small.pt"), sudoku.generate(256, 9), {}
    hows = {f"T={T}": dict(steps=T) for T in (1, 5, 20, 81)}
    hows |= {f"T=20, {key}={value}": {"steps": 20, key: value} for key, value in (("batch", 32), ("batch", 256))}
    hows |= {"T=20, L=8": dict(steps=20, loops=8), "T=20, adaptive, eps 0.3": dict(steps=20, eps=0.3)}
    hows |= {"T=81, threshold 0.99": dict(steps=81, threshold=0.99)}

    def solve(name, how):
        costs[name] = sudoku.evaluate(model, *puzzles, **how)

    print("\n| sampling | puzzles/s | loops a puzzle | exact, % |\n|---|---|---|---|")
    for name, seconds in in_turns(3, **{name: partial(solve, name, how) for name, how in hows.items()}).items():
        print(f"| {name} | {256 / seconds:.0f} | {costs[name]['nfe']:.0f} | {100 * costs[name]['exact']:.1f} |")
