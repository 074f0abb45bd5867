"""python -m pytest -q test_rmdm.py    (about a minute of one core; no network, no GPU needed)

1 schedule and loss, 2 model and recursion, 3 sampler, 4 restarts, 5 Sudoku, 6 Countdown, 7 training and commands,
8 README and evidence, 9 trust"""

import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and two threads beside a busy process crawl

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import rmdm
import sample
import train_countdown as countdown
import train_sudoku as sudoku
from rmdm import MASK, BadInput, Config, TrainConfig

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(**options):
    """A small model with random weights, none of them zero."""
    torch.manual_seed(0)
    model = rmdm.RMDM(Config(**{"vocab": 4, "coords": 3, "width": 16, "loops": 3} | options))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(torch.randn_like(w) * 0.3)
    return model


X, T = torch.tensor([[MASK, 2, MASK], [1, 1, MASK], [MASK] * 3]), torch.tensor([0.7, 0.3, 1.0])
GRID = ((0, 0), (1, 1), (0, 1))
OURS = dict(time=True, inject=True, coord_bias=True, coords=GRID)
LOOPMDM = dict(head_layers=1, layers=2, tail_layers=2, time=False)
SMALL = "steps=2 batch=4 width=8 heads=1 loops=2 warmup=1 loops_min=1 grad_loops=1 carry=0".split()
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
BOXES = str.maketrans("|-+", "\u2502\u2500\u253c")


def refuses(call, *args, says=".", **how):
    """BadInput, in one line that is not long."""
    with pytest.raises(BadInput, match=says) as e:
        call(*args, **how)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


# ---- 1. schedule and loss ----

@pytest.fixture(params=["linear", "cosine"])
def schedule(request, monkeypatch):
    """(alpha, its inverse) on numbers; rmdm's own are the same on tensors, for the cosine put in their place."""
    if request.param == "linear":
        return lambda t: 1 - t, lambda a: 1 - a
    half = math.pi / 2
    monkeypatch.setattr(rmdm, "alpha", lambda t: torch.cos(half * t))  # rounds to 1 for small t
    monkeypatch.setattr(rmdm, "alpha_prime", lambda t: -half * torch.sin(half * t))
    monkeypatch.setattr(rmdm, "alpha_inverse", lambda a: torch.acos(a) / half)
    return lambda t: math.cos(half * t), lambda a: math.acos(a) / half


# A distribution over three tokens from {1, 2}, far from independent, and its exact denoiser.
STATES = list(itertools.product((1, 2), repeat=3))
PROBS = torch.tensor([0.30, 0.02, 0.05, 0.13, 0.04, 0.21, 0.15, 0.10], dtype=torch.float64)
ENTROPY = -(PROBS * PROBS.log()).sum().item()


class Perfect(nn.Module):
    """p(x0^i | x_t) by Bayes, in the interface of RMDM."""

    states, values, config = torch.tensor(STATES), (1, 2), Config(3, 3)

    def joint(self, x_t, t):
        """p(x0, x_t) up to a factor, for all x0: (B, 8, 1)."""
        return PROBS[:, None] * ((x_t[:, None] == self.states) | (x_t[:, None] == MASK)).all(2, keepdim=True)

    def forward(self, x_t, t, **how):
        joint = self.joint(x_t, t)
        p = torch.stack([(joint * (self.states == v)).sum(1) for v in self.values], 2)  # (B, 3, 2)
        return F.pad((p / p.sum(2, keepdim=True)).log(), (1, 0), value=-math.inf)[None], joint

    def infer(self, x_t, t, *how):
        return self(x_t, t)[0][0], None, torch.ones(len(x_t), dtype=torch.long)


@torch.no_grad()
def exact_nelbo(model, x0, inverse):
    """Eq. (3) by enumeration of the masks. With u = 1 - alpha_t the integral over t is one over u, of weight 1/u."""
    n, total = len(x0), 0.0
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(200))
    u, weights = (nodes + 1) / 2, weights / 2
    t = torch.tensor([inverse(1 - share) for share in u.tolist()])
    for masked in itertools.product((False, True), repeat=n):
        if m := sum(masked):
            hide = torch.tensor(masked)
            log_p = model(torch.where(hide, MASK, x0).expand(len(t), n), t)[0][0].log_softmax(-1)
            nll = -log_p[:, torch.arange(n), x0][:, hide].sum(1)
            total += (weights * u ** (m - 1) * (1 - u) ** (n - m) * nll).sum().item()
    return total


def test_the_schedule_is_one_function_its_derivative_and_its_inverse(schedule):
    alpha, inverse = schedule
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    a = rmdm.alpha(t)
    assert a.tolist() == pytest.approx([alpha(x) for x in t.tolist()])
    assert torch.allclose(rmdm.alpha_prime(t), torch.autograd.grad(a.sum(), t)[0])
    assert torch.allclose(rmdm.alpha_inverse(a), t) and inverse(alpha(0.3)) == pytest.approx(0.3)


def test_times_are_stratified_uniform_in_every_row_and_never_zero(monkeypatch):
    t, g = rmdm.sample_t(1000, generator()), generator()
    assert t.min() > 0 and sorted((t * 1000).ceil().int().tolist()) == list(range(1, 1001))
    rows = torch.stack([rmdm.sample_t(2, g) for _ in range(4000)])
    assert ((rows.mean(0) - 0.5).abs() < 4 / (12 * 4000) ** 0.5).all()
    near = torch.rand(512).fill_(1 - 2**-24)  # the largest number that rand returns, where rounding hits 0
    monkeypatch.setattr(torch, "rand", lambda *a, **k: near)
    assert rmdm.nelbo_weight(rmdm.sample_t(512)).isfinite().all()


def test_only_editable_tokens_are_masked_at_the_rate_of_the_schedule_and_cost_anything(schedule):
    x0, editable = torch.full((2000, 50), 3), torch.arange(50).expand(2000, 50) >= 10
    x_t, masked = rmdm.corrupt(x0, torch.full((2000,), 0.3), editable, generator())
    assert not masked[~editable].any() and (x_t[masked] == MASK).all() and (x_t[~masked] == 3).all()
    rate = 1 - schedule[0](0.3)
    assert abs(masked[editable].double().mean() - rate) < 5 * (rate * (1 - rate) / 80_000) ** 0.5
    given = torch.tensor([[1, 2, MASK]] * 4), torch.zeros(4, 3, dtype=torch.bool)  # a MASK that is given is no mistake
    assert rmdm.loss(tiny(), *given, "elbo", generator=generator())[0] == 0
    assert not rmdm.nelbo(tiny(), *given, generator=generator()).any()


@pytest.mark.parametrize("time", [False, True])
def test_nelbo_estimate_equals_enumeration(schedule, time):
    model, x0 = tiny(time=time), torch.tensor([1, 3, 2])
    draws = rmdm.nelbo(model, x0.expand(20_000, 3), torch.ones(20_000, 3, dtype=torch.bool), generator=generator())
    exact, error = exact_nelbo(model, x0, schedule[1]), draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact) < 4 * error and error < 0.02 * exact  # else the test would prove nothing
    if not time:  # then it is the same for all schedules
        assert exact == pytest.approx(exact_nelbo(model, x0, lambda a: 1 - a))


def test_nelbo_of_exact_conditionals_is_the_entropy(schedule):
    exact = sum(p * exact_nelbo(Perfect(), torch.tensor(x), schedule[1]) for p, x in zip(PROBS.tolist(), STATES))
    assert exact == pytest.approx(ENTROPY, abs=1e-6)
    x0 = torch.tensor(STATES)[torch.multinomial(PROBS, 40_000, True, generator=generator())]
    draws = rmdm.nelbo(Perfect(), x0, torch.ones_like(x0, dtype=torch.bool), generator=generator(1))
    assert abs(draws.mean() - ENTROPY) < 4 * draws.std() / len(draws) ** 0.5


def attend(m, layer, h):
    """The attention of a layer called with h, (B, heads, N, N), and the values that it weights."""
    q, k, v = (x.unflatten(2, (layer.heads, -1)).transpose(1, 2) for x in layer.qkv(layer.norm1(h)).chunk(3, 2))
    bias = 0
    for axis, at in enumerate(torch.tensor(m.config.coords).T if m.config.coord_bias else ()):
        bias = bias + layer.bias[:, axis] * (at == at[:, None])
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + bias).softmax(3), v


def through(m, layers, h):
    """Pre-norm transformer layers as they are written."""
    for layer in layers:
        a, v = attend(m, layer, h)
        h = h + layer.out((a @ v).transpose(1, 2).flatten(2))
        h = h + layer.down(F.gelu(layer.up(layer.norm2(h))))
    return h


def unroll(m, x, t, loops, grad_loops=0, noise=0):
    """h^0 .. h^loops: eqs. (2), (7) and (8) as they are written, injection, and truncated backpropagation, eq. (5)."""
    angle = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 7)
    c = m.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None] if m.config.time else 0
    h = m.token(x) + sum(table.weight[list(axis)] for table, axis in zip(m.position, zip(*m.config.coords))) + c
    states = [through(m, m.head, h) + noise]
    for l in range(loops):
        v = m.v.weight[min(l, m.config.loops - 1)]  # beyond training the last repeats
        h = m.loop_norm(states[-1] + v + c + (states[0] if m.config.inject else 0))
        h = through(m, m.block, h)
        states.append(h.detach() if grad_loops and l < loops - grad_loops else h)
    return states


def read_off(m, h):
    return F.pad(m.unembed(m.norm(through(m, m.tail, h))), (1, 0), value=-math.inf)


@pytest.mark.parametrize("objective, supervise, grad_loops", [
    ("simple", "all", 0), ("elbo", "all", 0), ("simple", "final", 0), ("simple", "all", 2), ("elbo", "final", 2),
    ("simple", "all", 1), ("simple", "all", 9),
])  # fmt: skip
def test_loss_and_gradients_by_hand(objective, supervise, grad_loops):
    model, B, N, L, g = tiny(**OURS, head_layers=1, tail_layers=1, loops=4), 4, 3, 4, generator(2)
    x0 = torch.randint(1, 4, (B, N), generator=generator(1))
    editable = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    value, right = rmdm.loss(model, x0, editable, objective, supervise, grad_loops, generator=generator(2))
    value.backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters()}
    model.zero_grad()
    t = rmdm.sample_t(B, g)
    x_t, masked = rmdm.corrupt(x0, t, editable, g)
    states, by_hand, hits = unroll(model, x_t, t, L, grad_loops), 0.0, []
    back = min(grad_loops or L, L)
    loops = [L] if supervise == "final" else range(L - back + 1, L + 1)
    for b, i, l in itertools.product(range(B), range(N), range(1, L + 1)):
        if masked[b, i]:
            log_p = read_off(model, states[l])[b, i].log_softmax(-1)
            weight = (l in loops) / len(loops) / (t[b].item() if objective == "elbo" else 1)
            by_hand -= weight * log_p[x0[b, i]] / 6  # six editable tokens
            hits += [bool(log_p.argmax() == x0[b, i])] if l == L else []
    by_hand.backward()
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-5) and right.item() == pytest.approx(np.mean(hits))
    assert all(torch.allclose(w.grad, grads[name], atol=1e-5) and w.grad.any() for name, w in model.named_parameters())
    assert grads["v.weight"].any(1).tolist() == [l > L - back for l in range(1, L + 1)]


@pytest.mark.parametrize("inject", [True, False])
def test_carried_examples_stay_with_their_state_until_right_or_spent(inject):
    model, carried, g = tiny(**OURS | dict(inject=inject, loops=6)), {}, generator()
    editable, ages = torch.ones(32, 3, dtype=torch.bool), []
    for call in range(8):
        before = dict(carried)
        x0 = torch.randint(1, 4, (32, 3), generator=g)
        model.zero_grad()
        value, _ = rmdm.carried_loss(model, x0, editable, carried, oldest=6, grad_loops=2, generator=g)
        value.backward()
        x_t, l, now = carried["x_t"], carried["l"], carried["x0"]
        stayed = before["l"] > 0 if before else torch.zeros(32, dtype=torch.bool)
        assert torch.equal(now, torch.where(stayed[:, None], before.get("x0", now), x0))
        assert not before or torch.equal(x_t[stayed], before["x_t"][stayed]) and stayed.any() and not stayed.all()
        ages.append(torch.where(stayed, before.get("l", l), 0) + 2)
        for b in range(32):  # each alone, from h^0 on where it is new, and from the state that was kept where it is not
            start = (before["h"][b : b + 1], before["l"][b : b + 1]) if stayed[b] else None
            logits, h = model(x_t[b : b + 1], carried["t"][b : b + 1], loops=2, supervise="all", start=start)
            right = ((logits[-1, 0].argmax(-1) == now[b]) | ~carried["masked"][b]).all()
            assert l[b] == (0 if right or ages[-1][b] >= 6 else ages[-1][b])
            assert torch.allclose(h[0], carried["h"][b], atol=1e-4) and not carried["h"].requires_grad
            ce = F.cross_entropy(logits[:, 0].transpose(1, 2), now[b].expand(2, 3), reduction="none").mean(0)
            value = value - ce[carried["masked"][b]].sum() / 96
        assert abs(value.item()) < 1e-5 and all(w.grad is not None for w in model.parameters())
        assert model.token.weight.grad.any()  # E learns without injection, too: from the examples that begin at h^0
    assert {2, 4, 6} == set(torch.cat(ages).tolist())


# ---- 2. model and recursion ----

@pytest.mark.parametrize("form", [dict(layers=2, time=True), OURS, LOOPMDM], ids=["R-MDM", "ours", "LoopMDM"])
def test_the_recursion_by_hand(form):
    m = tiny(**form)
    signs = rmdm.Layer(8, 2, torch.ones(2, 3, 3)).bias[..., 0, 0].tolist()
    assert signs == [[1, 1], [-1, -1]]  # one head looks there, one elsewhere
    states = unroll(m, X, T, 5)  # two loops more than it was made for
    expected = torch.stack([read_off(m, h) for h in states[1:]])
    (everything, _), (last, h) = m(X, T, loops=5, supervise="all"), m(X, T, loops=5)
    assert torch.allclose(everything, expected, atol=1e-4) and torch.allclose(last[0], expected[4], atol=1e-4)
    assert torch.allclose(m(X, T)[0][0], expected[2], atol=1e-4) and (last.softmax(-1)[..., MASK] == 0).all()
    if m.config.inject:  # the first begins anew, the others go on from h^2
        carried = torch.stack([states[1][0], states[2][1], states[2][2]]), torch.tensor([0, 2, 2])
        later, on = m(X, T, loops=3, start=carried)
        assert torch.allclose(on[1:], h[1:], atol=1e-4) and torch.allclose(later[0, 0], expected[2, 0], atol=1e-4)
    noise = 0.5 * torch.randn(3, 3, 16, generator=generator(1))  # on h^0 alone
    noisy, *_ = m.infer(X, T, 5, noise=0.5, generator=generator(1))
    assert torch.allclose(noisy, read_off(m, unroll(m, X, T, 5, noise=noise)[5]), atol=1e-4)
    logits, _, used = m.infer(X, T, 5)
    assert torch.allclose(logits, expected[4], atol=1e-4) and used.tolist() == [5] * 3
    h = torch.stack(states)  # the adaptive stop: each example by its own change
    change = (h[1:] - h[:-1]).flatten(2).norm(dim=2) / h[1:].flatten(2).norm(dim=2)  # (5, B)
    eps = change[2].sort().values[1:].mean().item()
    logits, _, used = m.infer(X, T, 5, eps=eps)
    for b, l in enumerate(used.tolist()):
        assert (change[: l - 1, b] >= eps).all() and (l == 5 or change[l - 1, b] < eps)
        assert torch.allclose(logits[b], expected[l - 1, b], atol=1e-4)
    assert used.min() < used.max()


@pytest.mark.parametrize("call, says, settings", [
    (lambda x: rmdm.loss(tiny(), x, x > 0), "N = 3|both are", [X.new_ones(n) for n in [(3, 1), (3, 5), 3, (3, 3, 1)]]),
    (lambda x: rmdm.sample(tiny(), x), "N = 3", [X.new_zeros(1, 1), X.new_zeros(2, 4)]),
    (lambda x: rmdm.loss(tiny(), x, x < 9), "token 0, MASK, at an editable position", [X]),
    (lambda x: rmdm.loss(tiny(), x, x > 0), "has a token that is not from 0 to 3", [X.new_full((2, 3), 4)]),
    (lambda x: rmdm.loss(tiny(), X, x), "editable is torch.uint8, not torch.bool", [(X > 0).to(torch.uint8)]),
    (lambda x: rmdm.sample(tiny(), *x), "both are|token that is not from 0 to 3|not torch.bool",
     [(X, X[:1] > 0), (X + 2,), (X - 1,), (X, X)]),
    (lambda x: rmdm.begin("none", Config(4, 3), TrainConfig(**x)), "needs inject=true|loops_min=9 is above loops=8",
     [dict(grad_loops=2), dict(loops_min=9)]),
    (lambda x: Config(4, x), "coords is a length", [0, [[0.5]], [[-1]], [1, 2], []]),
    (lambda x: Config(**dict(vocab=4, coords=3) | x), "does not divide|whole number from",
     [dict(heads=3), dict(loops=0), dict(width=0), dict(layers=10**9), dict(head_layers=-1), dict(vocab=1)]),
    (lambda x: TrainConfig(**{x: 0}), "from 1|above 0", ["steps", "batch", "warmup", "save_every", "lr", "clip"]),
    (lambda x: TrainConfig(**x), "simple or elbo|all or final", [dict(objective="best"), dict(supervise="some")]),
    (lambda x: TrainConfig(**x), "below 1|at least 0|above 0",
     [dict(clip=math.nan), dict(ema=1), dict(grad_loops=-1), dict(loops_min=-1), dict(weight_decay=math.nan)]),
    (lambda x: TrainConfig(**x), "needs loops_min=0", [dict(carry=4), dict(carry=4, grad_loops=2, loops_min=1)]),
    (lambda x: rmdm.sample(tiny(), X, **x), "order", [dict(order="best"), dict(order="ancestral", threshold=0.5)]),
    (lambda x: rmdm.sample(tiny(), X, **{x: -1}), "from|at least 0", "steps loops temperature noise eps".split()),
    (lambda x: rmdm.sample(tiny(), X, **{x: 10**12}), "to a million", ["steps", "loops"]),
    (lambda x: rmdm.sample(tiny(), X, **{x: 0}), "to a million", ["steps", "loops"]),
    (lambda x: rmdm.sample(tiny(), X, noise=x), "logits are not finite", [1e39]),
    (lambda x: sample.solve(sudoku, [tiny()], [], tries=x), "to a million", [0, 10**7]),
    (lambda x: rmdm.sample(tiny(), X, **{x: math.nan}), "finite", ["temperature", "noise", "eps", "threshold"]),
    (sudoku.read, "'.' at cell 5 is neither", [EASY.replace("7", wrong) for wrong in "z\u0667"]),  # \u0667 is a digit
    (sudoku.read, "(row 1|column 2|box 3) has the digit 1 twice",
     ["11" + "." * 79, "." * 10 + "1" + "." * 17 + "1" + "." * 52, "." * 6 + "1" + "." * 9 + "1" + "." * 64]),
])  # fmt: skip
def test_what_is_wrong_is_refused_by_name(call, says, settings):
    for setting in settings:
        refuses(call, setting, says=says)


# ---- 3. sampler ----

LIMIT = 24.3  # chi-square with 7 degrees of freedom exceeds this once in a thousand


def chi_square(x, law, states=STATES):
    counts, expected = (x[:, None] == torch.tensor(states)).all(2).sum(0), law * len(x)
    return ((counts - expected) ** 2 / expected).sum().item()


@functools.cache
def law(left, steps, alpha, x=(MASK,) * 3):
    """The exact distribution of what `sample` makes of x with the perfect denoiser and `left` of its steps to go, by
    enumeration: ancestral with alpha, in random order without."""
    masked = [i for i in range(3) if x[i] == MASK]
    if not masked:
        return torch.tensor([float(x == s) for s in STATES], dtype=torch.float64)
    p = Perfect()(torch.tensor([x]), None)[0][0, 0].exp()
    total, share = torch.zeros(8, dtype=torch.float64), -(-len(masked) // left)
    if alpha:
        t, s = left / steps, (left - 1) / steps
        rate = (alpha(s) - alpha(t)) / (1 - alpha(t)) if s else 1
    for reveal in itertools.chain.from_iterable(itertools.combinations(masked, k) for k in range(len(masked) + 1)):
        if alpha:
            chance = rate ** len(reveal) * (1 - rate) ** (len(masked) - len(reveal))
        else:
            chance = (len(reveal) == share) / math.comb(len(masked), share)
        for tokens in itertools.product((1, 2), repeat=len(reveal)) if chance else ():
            y, here = list(x), chance
            for i, token in zip(reveal, tokens):
                y[i], here = token, here * p[i, token].item()
            total += here * law(left - 1, steps, alpha, tuple(y))
    return total


@pytest.mark.parametrize("order, steps", [("random", 3), ("random", 2), ("random", 1), ("ancestral", 2),
                                          ("ancestral", 5)])  # fmt: skip
def test_samples_follow_the_exact_law(order, steps, schedule):
    expected = law(steps, steps, schedule[0] if order == "ancestral" else None)
    x, how = torch.zeros(80_000, 3, dtype=torch.long), dict(steps=steps, order=order, generator=generator())
    out = rmdm.sample(Perfect(), x, temperature=1.0, **how)
    assert expected.sum().item() == pytest.approx(1) and chi_square(out.x, expected) < LIMIT
    if (order, steps) == ("random", 3):  # one token a step: the model's own distribution
        assert torch.allclose(expected, PROBS)
    else:
        assert chi_square(out.x, PROBS) > LIMIT  # the test can tell the two apart
    if order == "ancestral" and schedule[0](0.5) != 0.5:
        assert chi_square(out.x, law(steps, steps, lambda t: 1 - t)) > LIMIT  # and a cosine from a line


class Fixed(nn.Module):
    """The same probabilities p (N, V - 1) whatever it sees; remembers what times it is shown."""

    def __init__(self, p):
        super().__init__()
        self.config = Config(1 + len(p[0]), len(p))
        self.logits, self.times = F.pad(torch.tensor(p).log(), (1, 0), value=-math.inf), []

    def infer(self, x_t, t, *how):
        self.times.append(t.tolist())
        return self.logits.expand(len(x_t), -1, -1), None, torch.full((len(x_t),), 5)


def test_the_time_fed_to_the_model_is_that_of_the_share_still_masked(schedule):
    _, inverse = schedule
    model, x = Fixed([[0.6, 0.4]] * 4), torch.tensor([[MASK] * 4, [1, MASK, MASK, 2]])
    rmdm.sample(model, x, steps=4)
    visible = [[0, 0], [1 / 4, 1 / 2], [1 / 2], [3 / 4]]
    assert [list(map(pytest.approx, t)) for t in model.times] == [[inverse(a) for a in row] for row in visible]
    model.times.clear()
    rmdm.sample(model, x, steps=2, order="ancestral", generator=generator())
    assert {t for row in model.times for t in row} == {1.0, 0.5}


@pytest.mark.parametrize("order, first", [("confidence", 0), ("margin", 1), ("entropy", 2)])
def test_each_order_reveals_its_own_favorite_first(order, first):
    p = [[0.51, 0.47, 0.01, 0.01], [0.46, 0.18, 0.18, 0.18], [0.499, 0.499, 0.001, 0.001], [0.3, 0.3, 0.2, 0.2]]
    x = torch.zeros(1, 4, dtype=torch.long)
    out = rmdm.sample(Fixed(p), x, steps=4, order=order, trace=True)
    assert out.trace[0]["revealed"].nonzero().tolist() == [[0, first]]
    assert out.steps.tolist() == [4] and out.loops.tolist() == [20]
    out = rmdm.sample(Fixed(p), x, steps=4, order=order, threshold=0.45, trace=True)  # all that is sure, at least one
    assert [step["revealed"].sum().item() for step in out.trace] == [3, 1]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5}, {"eps": 0.3}, {"threshold": 0.5}, {"loops": 1, "steps": 2}])
@pytest.mark.parametrize("order", rmdm.ORDERS)
def test_clues_survive_and_passes_count_whatever_the_setting(order, how):
    if order == "ancestral":
        how = {key: value for key, value in how.items() if key != "threshold"}
    x = torch.randint(0, 4, (6, 9), generator=generator(3))
    editable = torch.rand(6, 9, generator=generator(4)) < 0.6
    editable[0], x[1, 0], editable[1, 0] = False, MASK, False  # an example with nothing to do, a MASK to keep
    how = dict(steps=20, order=order, generator=generator()) | how
    out = rmdm.sample(tiny(coords=9), x, editable, **how, trace=True)
    assert (out.x[~editable] == x[~editable]).all() and (out.x[editable] != MASK).all()
    most = editable.sum(1).clamp(max=how["steps"])  # no pass reveals nothing, in ancestral order neither
    assert out.steps[0] == 0 and (out.steps[1:] > 0).all() and (out.steps <= most).all()
    assert (sum(step["revealed"].long() for step in out.trace) == editable).all()
    assert (sum(step["loops"] for step in out.trace) == out.loops).all() and (out.loops <= out.steps * 3).all()


# ---- 4. restarts ----

def test_later_steps_go_on_from_the_h_of_the_step_before():
    m = tiny(coords=6, inject=True)
    x = torch.zeros(3, 6, dtype=torch.long)
    out = rmdm.sample(m, x, steps=3, loops=4, later_loops=2, trace=True)
    t, h, l = torch.ones(3), None, torch.zeros(3, dtype=torch.long)
    for k, step in enumerate(out.trace):  # by hand, from the states that the trace shows
        before = x if k == 0 else out.trace[k - 1]["x"]
        logits, h, used = m.infer(before, t * (3 - k) / 3, 2 if k else 4, start=(h, l) if k else None)
        l = l + used
        assert torch.equal(step["x"], torch.where(step["revealed"], logits.argmax(-1), before))
    assert out.loops.tolist() == [8] * 3 and not torch.equal(h, m.infer(before, t / 3, 2)[1])


def test_examples_that_are_given_up_stay_as_they_are_and_cost_nothing_more():
    m, x = tiny(coords=6), torch.zeros(4, 6, dtype=torch.long)
    plain = rmdm.sample(m, x, steps=6)
    odd = torch.arange(4) % 2 == 1
    out = rmdm.sample(m, x, steps=6, give_up=lambda x: odd & ((x != MASK).sum(1) >= 2))
    assert torch.equal(out.x[~odd], plain.x[~odd]) and torch.equal(out.steps, torch.where(odd, 2, 6))
    assert ((out.x[odd] != MASK).sum(1) == 2).all() and (out.loops == out.steps * m.config.loops).all()


def test_what_is_broken_cannot_come_right(puzzles):
    puzzles, solutions = (torch.from_numpy(part.astype(int)) for part in puzzles)
    hidden = torch.rand(solutions.shape, generator=generator()) < 0.3
    assert not sudoku.broken(torch.where(hidden, MASK, solutions)).any() and not sudoku.broken(puzzles).any()
    twice = torch.where(hidden, MASK, solutions)
    twice[:, 80], twice[:, 72] = 5, 5  # in one row
    assert sudoku.broken(twice).all()
    problems, equations = countdown.generate(3, 200, 0)
    x = torch.from_numpy(countdown.encode(problems, equations).astype(int))
    answer = torch.from_numpy(countdown.editable(x.shape[1]))
    hidden = torch.rand(x.shape, generator=generator()) < 0.2
    assert not countdown.broken(x).any() and not countdown.broken(torch.where(hidden & answer, MASK, x)).any()
    wrong = torch.where(torch.rand(x.shape, generator=generator(1)) < 0.1, x.roll(1, 0), x)
    told = [countdown.check(tokens, problem) is not None for tokens, problem in zip(wrong.numpy(), problems)]
    prompts_kept = (wrong == x)[:, ~answer].all(1)
    assert any(told) and (countdown.broken(wrong) == torch.tensor(told))[prompts_kept].all()
    for text, found in {  # _ is MASK
        "86+28= 114, _14-31= 83": False, "86+28= 115, _14-31= 83": True,  # a false equation
        "86+27= 113, _14-31= 83": True, "86+_8= 114,  11-31=  _": False,  # a number that is not there
        "86+_8= 114,  11-31= 20": True, "86+_8= 114,  99- 9= 90": False,  # later ones may use any number
    }.items():  # fmt: skip
        row = torch.tensor([[countdown.CHARS.index(c) for c in "86,31,28, 96" + text]])
        assert countdown.broken(row).item() == found, text


class Guess:
    """A task of one digit from 1 to 9; its symmetry adds a number. A try is right if it names the digit."""

    CHARS, LENGTHS, tried = ".123456789", {1: None}, []

    def start(model, problems):
        return torch.zeros(len(problems), 1, dtype=torch.long), torch.ones(len(problems), 1, dtype=torch.bool)

    def SYMMETRY(n, generator, device):
        shift = torch.randint(9, (n, 1), generator=generator)
        return torch.zeros(n, 1, dtype=torch.long), F.pad((torch.arange(9) + shift) % 9 + 1, (1, 0))

    def broken(x):
        return torch.ones(len(x), dtype=torch.bool)

    def right(problems, answers):
        Guess.tried.append((problems[:, 0].tolist(), answers[:, 0].tolist()))
        return (problems == answers).all(1)

    picture = staticmethod(sudoku.picture)


def test_further_tries_come_in_rounds_and_the_first_right_one_counts(monkeypatch):
    monkeypatch.setitem(sample.BATCH, "cpu", 16)
    monkeypatch.setattr(Guess, "tried", [])
    torch.manual_seed(0)
    first, again = (rmdm.RMDM(Config(10, 1, width=8, heads=1, loops=1)).eval() for _ in range(2))
    problems = np.array([[3], [5], [3], [7]])
    how = dict(tries=40, first=dict(loops=1), again=dict(loops=2, temperature=1.0, steps=1))
    out = sample.solve(Guess, [first, again], problems, **how, generator=generator(), trace=True)
    assert [k for k, _, _ in out.rounds] == list(dict.fromkeys(k for k, _, _ in out.rounds)) and out.rounds[0][0] == 1
    tried = {n: [] for n in range(4)}  # by hand: the answers to each problem, in order
    todo, calls, rounds = [0, 1, 2, 3], iter(Guess.tried), 0
    run = 0
    while todo and run < 40:
        k = min(40 - run, 4 << rounds, max(1, 16 // len(todo))) if run else 1
        given, answers = [], []
        while len(given) < k * len(todo):
            part = next(calls)
            given, answers = given + part[0], answers + part[1]
        assert given == [problems[n, 0] for n in todo for _ in range(k)]
        for place, n in enumerate(todo):
            tried[n] += answers[place * k : place * k + k]
        todo, run, rounds = [n for n in todo if problems[n, 0] not in tried[n]], run + k, rounds + 1
    for n, answers in tried.items():
        right = answers.index(problems[n, 0]) + 1 if problems[n, 0] in answers else 0
        assert (out.tries[n], out.first[n], out.right[n]) == (len(answers), right, right > 0)
        assert out.x[n, 0] == (problems[n, 0] if right else answers[-1]) == out.traces[n][-1]["x"].item()
        assert out.steps[n] == len(answers) and out.loops[n] == 1 + 2 * (len(answers) - 1)
    same_again = sample.solve(Guess, [first, again], problems, **how, generator=generator())
    assert (same_again.x == out.x).all() and (same_again.tries == out.tries).all()
    scores = out.scores()
    assert scores["within_2"] == (out.right & (out.first <= 2)).mean() and scores["tries"] == out.tries.mean()
    assert out.right.any() and max(out.tries) > 1


def test_ctrl_c_in_solving_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(Guess, "right", lambda p, a: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="stopped: 0 of 1 solved after 0 tries"):
        sample.solve(Guess, [tiny(vocab=10, coords=1)], np.array([[3]]))


def test_a_further_try_sees_a_symmetric_picture_and_what_it_answers_is_turned_back(puzzles, monkeypatch):
    given, one, drawn, seen = puzzles[0][:50], torch.ones(50, dtype=torch.long), [], []

    def symmetry(*args):
        drawn.append(sudoku.symmetry(*args))
        return drawn[-1]

    def answer(model, problem, editable, trace, generator):  # what it is asked
        seen.append(problem)
        return rmdm.Filled(problem, one, one, [dict(x=problem, revealed=editable, sure=problem / 10, loops=one)])

    monkeypatch.setattr(rmdm, "sample", answer)
    model, x = tiny(vocab=10, coords=sudoku.COORDS), torch.from_numpy(given).long()
    filled = sample.attempt(sudoku, model, given, symmetry, generator(), True, {})
    source, names = drawn[0]
    assert torch.equal(seen[0], names.gather(1, x.gather(1, source))) and torch.equal(filled.x, x)
    (step,) = filled.trace
    assert torch.equal(step["x"], x) and torch.equal(step["revealed"], x == MASK)
    assert torch.equal(step["sure"], names.gather(1, x) / 10)


# ---- 5. Sudoku ----

SEEN = [[j for j in range(81) if i // 9 == j // 9 or i % 9 == j % 9 or (i // 27, i % 9 // 3) == (j // 27, j % 9 // 3)]
        for i in range(81)]  # fmt: skip


def count_solutions(board):
    """An independent solver: plain backtracking, at most 2."""
    options = {i: set(range(1, 10)) - {board[j] for j in SEEN[i]} for i in range(81) if not board[i]}
    if not options:
        return 1
    i, total = min(options, key=lambda i: len(options[i])), 0
    for digit in options[i]:
        total += 0 if total > 1 else count_solutions([*board[:i], digit, *board[i + 1 :]])
    return min(total, 2)


@pytest.fixture(scope="session")
def puzzles(tmp_path_factory):
    return sudoku.generated(300, 7, tmp_path_factory.mktemp("data"))


def as_text(boards, blank="0"):
    return ["".join(map(str, board)).replace("0", blank) for board in boards]


def test_generated_puzzles_have_one_solution_and_no_clue_too_many(puzzles):
    assert sudoku.right(*puzzles).all() and sudoku.right(puzzles[1], puzzles[1]).all()
    for puzzle in puzzles[0][:6].tolist():
        assert count_solutions(puzzle) == 1
        without = [[*puzzle[:i], MASK, *puzzle[i + 1 :]] for i in range(81) if puzzle[i] != MASK]
        assert all(count_solutions(board) == 2 for board in without)


def test_batches_are_symmetric_pictures_that_move_everything_and_none_is_of_a_held_out_grid(puzzles):
    source, names = sudoku.symmetry(2000, generator(1))
    assert all(len(of.unique()) == 81 for of in source.T) and all(len(of.unique()) == 9 for of in names.T[1:])
    assert 0.4 < (source[:, 0] % 9 == source[:, 1] % 9).double().mean() < 0.6  # rows become columns
    keys, (x0, blank) = sudoku.fingerprint(puzzles[1]), sudoku.batches(*puzzles, "cpu")(300, generator())
    s, p = x0.numpy().astype(np.uint8), torch.where(blank, MASK, x0).numpy().astype(np.uint8)
    assert sudoku.right(p, s).all() and all(count_solutions(board) == 1 for board in p[:9].tolist())
    found = sudoku.fingerprint(s)
    assert set(found) <= set(keys) and len(set(keys)) == 300 and not {*map(bytes, s)} & {*map(bytes, puzzles[1])}
    (_, seen), (secret, grids) = sudoku.split(*(np.concatenate(parts) for parts in zip((p, s), puzzles)), 20)
    assert (grids == puzzles[1][-20:]).all() and (secret == puzzles[0][-20:]).all()
    assert sudoku.fingerprint(seen) == [key for key in found + keys if key not in keys[-20:]] and len(seen) < 575


def test_the_cache_is_used_and_damage_is_noticed(tmp_path, monkeypatch):
    first = sudoku.generated(5, 1, tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.delattr(sudoku, "generate")
    assert np.array_equal(first, sudoku.generated(5, 1, tmp_path))
    data = path.read_bytes()
    path.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    refuses(sudoku.generated, 5, 1, tmp_path, says="damaged.*delete the file")


def test_published_formats(puzzles, tmp_path):
    for text, row, blank in [
        ("quizzes,solutions\n", "{q},{a}\n", "0"),  # Kaggle 1M
        ("\ufeffid,puzzle,solution,clues,difficulty\n", "7,{q},{a},24,1.5\n", "."),  # Kaggle 3M
        ("source,question,answer,rating\r\n", '"hard, very",{q},{a},9\r\n', "_"),  # sudoku-extreme
        ("# a comment\n\n", "{q}\n", "*"),
    ]:
        (p, s), path = (part[:3] for part in puzzles), tmp_path / "x"
        rows = [row.format(q=q, a=a) for q, a in zip(as_text(p, blank), as_text(s))]
        path.write_text(text + "".join(rows), encoding="utf-8")
        puzzle, solution, _ = sudoku.read(rmdm.read_text(path))
        assert np.array_equal(puzzle, p) and np.array_equal(solution, s * ("{a}" in row))
    drawn = "\n".join(sudoku.draw(EASY))
    assert all((sudoku.read(text)[0] == sudoku.read(EASY)[0]).all() for text in (drawn, drawn.translate(BOXES)))


# ---- 6. Countdown ----

def every_solution(numbers):
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


def test_generated_problems_are_those_that_brute_force_finds():
    rng, largest = np.random.default_rng(0), lambda answer: max(int(c) for c in re.findall("=([0-9]+)", answer))
    draws = [*rng.integers(1, 100, (12, 3)), *rng.integers(1, 100, (3, 4)), [1, 1, 1], [99, 99, 99, 98], [2, 50, 7, 7]]
    for numbers in draws:
        problems, equations = countdown.solutions(np.array([numbers]))
        truth = every_solution(numbers)
        assert sorted(truth) == problems[:, -1].tolist()
        for problem, tokens in zip(problems, countdown.encode(problems, equations)):
            answer = countdown.decode(tokens)
            assert countdown.check(tokens, problem) is None and answer in truth[problem[-1]]
            assert largest(answer) == min(map(largest, truth[problem[-1]]))


def test_the_checker_agrees_with_brute_force_on_spoiled_answers_and_names_what_is_wrong():
    random, verdicts = np.random.default_rng(1), []
    for _ in range(30):
        numbers = random.integers(1, 13, 3).tolist()
        for target, answers in every_solution(numbers).items():
            for answer in {*answers}:
                spoiled = list(answer)
                spoiled[random.integers(len(spoiled))] = str(random.choice(list("0123456789+-*/=, ")))
                for text in (answer, "".join(spoiled)):
                    verdicts.append(countdown.check(text, [*numbers, target]) is None)
                    assert verdicts[-1] == (text in answers), (numbers, target, text)
    assert 1000 < sum(verdicts) < len(verdicts) - 1000
    for says, answers in {
        "equation 1: not an equation": ["", "__import__('os').abort()", "\uff18\uff17/29=3,32*3=96"],  # no ASCII digits
        "equation 2: not an equation": ["87/29=3,32*3=96\n"],
        "equation 1: false": ["87/32=2,29*3=96", "29-87=0,32*3=96", "29-87=58,32+58=90"],
        "number left over: 32": ["87/29=3"],
        "wrong target: 35, not 96": ["87/29=3,32+3=35"],
    }.items():
        for answer in answers:
            assert countdown.check(answer, [87, 29, 32, 96]).startswith(says)
    assert countdown.check("5-5=0,7/0=0", [5, 5, 7, 10]).startswith("equation 2: false")


def test_countdown_tokens():
    problems, equations = countdown.generate(4, 100, 0)
    tokens, model = countdown.encode(problems, equations), tiny(vocab=18, coords=countdown.COORDS[4])
    assert tokens.shape[1] == len(countdown.COORDS[4]) and (tokens != MASK).all()
    prompt, answer = countdown.draw([countdown.CHARS[i] for i in tokens[0]])[0].split("  ->  ")
    assert [int(x) for x in prompt.split(",")] == problems[0].tolist()
    assert answer.replace(" ", "") == countdown.decode(tokens[0])
    spoiled, blank = tokens[0].copy(), countdown.CHARS.index(" ")
    i = next(i for i in np.flatnonzero(countdown.editable(len(spoiled))) if spoiled[i] == blank)
    spoiled[i + 1], spoiled[i] = spoiled[i], 2
    x, editable = countdown.start(model, problems)
    assert (x == torch.where(editable, MASK, torch.from_numpy(tokens).long())).all()
    for wrong in (spoiled, x[0].tolist()):  # a blank in front of a number is right, behind it wrong, as is MASK
        assert "not an equation" in countdown.check(wrong, problems[0])
    assert torch.equal(countdown.start(model, problems[:, [2, 0, 3, 1, 4]])[0], x)


def test_what_is_held_out_of_countdown_training():
    assert sorted(countdown.held_out_targets(3)) == [22, 24, 25, 30, 32, 50, 65, 67, 96]  # of the published test file
    problems, equations = countdown.generate(3, 150_000, 0)
    few = (problems[:, :3] <= 40).all(1)  # so that operands come again
    (seen, equations), (operands, _), (targets, _) = countdown.split(problems[few], equations[few], 0)
    multisets = lambda problems: set(map(tuple, np.sort(problems[:, :3], 1).tolist()))  # noqa: E731
    assert not multisets(seen) & multisets(operands) and len(multisets(operands)) > 20
    assert not set(seen[:, 3]) & set(targets[:, 3]) and set(targets[:, 3]) == set(countdown.held_out_targets(3))
    assert not set(operands[:, 3]) & set(targets[:, 3])
    x0, editable = countdown.batches(seen, equations, "cpu")(20_000, generator())
    text = ["".join(countdown.CHARS[i] for i in row) for row in x0.tolist()]
    counts, wanted = np.bincount([int(row[9:12]) for row in text], minlength=101), np.isin(np.arange(101), seen[:, 3])
    assert counts[~wanted].sum() == 0 and counts[wanted].min() > 0.6 * 20_000 / wanted.sum()  # each as often
    assert all(countdown.check(x, countdown.read(row[:12])[0][0]) is None for row, x in zip(text[:99], x0.tolist()))
    assert not editable[:, :12].any() and editable[:, 12:].all()


def test_published_countdown_files(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"input": "1,35,14,22", "output": "35-14=21,1+21=22", "k": 5}\n\n'
                    '{"input": "87,29,32", "output": "96", "k": "a"}\n', encoding="utf-8")  # fmt: skip
    problems, equations, _ = countdown.read(rmdm.read_text(path))
    assert np.array_equal(problems, [[1, 35, 14, 22], [87, 29, 32, 96]])
    assert np.array_equal(equations, [[[35, 1, 14, 21], [21, 0, 1, 22]], [[0] * 4] * 2])


# ---- 7. training and commands ----

def toy_batch(n, g):
    """Sequences of three equal tokens."""
    x0 = torch.randint(1, 4, (n, 1), generator=g, device=g.device).expand(n, 3).contiguous()
    return x0, torch.ones_like(x0, dtype=torch.bool)


def at_call(k, action):
    """toy_batch, but it does something first at its k-th call."""
    calls = []
    return lambda n, g: (calls.append(n), action() if len(calls) == k else None) and toy_batch(n, g)


def fit(out, batch=toy_batch, evaluate=lambda m: {}, model=None, about=None, resume=False, size=4, **training):
    """rmdm.train, by default on a toy. The other keywords are fields of TrainConfig."""
    training = TrainConfig(batch=size, **dict(steps=20, save_every=5, eval_every=5) | training)
    return rmdm.train(tiny() if model is None else model, training, batch, evaluate, out, about, resume)


def state(folder):
    """All that a run goes on from, but not its seconds."""
    saved = rmdm.read(folder / "checkpoint.pt")
    return tree_leaves([saved[key] for key in ("step", "model", "ema", "optimizers", "rng")])


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a, b):
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("loops", [dict(loops_min=1), dict(carry=3)])
def test_a_resumed_run_ends_bit_identical(tmp_path, loops):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = functools.partial(fit, steps=24, warmup=5, grad_loops=1, about={"task": "toy"}, **loops)
    run(whole, model=tiny(inject=True))
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C in the middle of step 13
        run(cut, at_call(13, lambda: signal.raise_signal(signal.SIGINT)), model=tiny(inject=True))
    half, before = state(cut), log(cut)
    run(cut, model=tiny(inject=True), resume=True)
    assert half[0] == 10 and same(state(whole), state(cut)) and not same(half, state(cut))
    assert log(cut)[: len(before)] == before and before[0]["task"] == "toy"
    losses = [[(entry["step"], entry["loss"]) for entry in some[1:]] for some in (log(cut), log(whole))]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [5, 10, 15, 20, 24]
    run(cut, at_call(1, lambda: pytest.fail("finished")), model=tiny(inject=True), resume=True)


def python(code, *argv, **how):
    """A script, or code that finds our modules, run to its end."""
    how = dict(cwd=HERE, capture_output=True, text=True, timeout=300) | how
    return subprocess.run([sys.executable, *([] if code.endswith(".py") else ["-c"]), code, *map(str, argv)], **how)


KILLED = """
import os, signal, sys, rmdm, test_rmdm as t
from pathlib import Path
whole, cut = Path(sys.argv[1], "whole"), Path(sys.argv[1], "cut")
how = dict(steps=6, save_every=1)
t.fit(whole, **how)
for name, count, left in [("fsync", 2, 0), ("replace", 3, 2), ("fsync", 2, 3), ("replace", 3, 5), ("fsync", 2, 5)]:
    if not (pid := os.fork()):  # kill -9 at the count-th call: while a checkpoint, at last model.pt, is being written
        real, calls = getattr(os, name), []
        setattr(os, name, lambda *a: calls.append(a) or len(calls) == count and os.kill(os.getpid(), 9) or real(*a))
        t.fit(cut, **how, resume=cut.exists())
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert rmdm.read(cut / "checkpoint.pt")["step"] == left, (name, count, left)
t.fit(cut, **how, resume=True)
assert t.same(t.state(whole), t.state(cut))
assert t.same(*(rmdm.load(run / "model.pt").state_dict().values() for run in (whole, cut)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_training_killed_five_times_ends_as_if_never_killed(tmp_path):
    done = python(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_diverged_run_and_a_full_disk_cost_nothing_that_was_saved(tmp_path):
    model, runs = tiny(), [tmp_path / "diverged", tmp_path / "full"]
    spoil = at_call(7, lambda: model.unembed.bias.data.fill_(math.nan))
    refuses(fit, runs[0], spoil, model=model, says="the loss became nan, its gradient nan, by step 10")
    assert state(runs[0])[0] == 5
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError):
            fit(runs[1], at_call(7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state(runs[1])[0] == 5 and {path.name for path in runs[1].iterdir()} == {"checkpoint.pt", "log.jsonl"}


@pytest.mark.parametrize("how, expected", [
    (dict(loops_min=2, grad_loops=2), {2, 3, 4}), (dict(loops_min=4, supervise="final"), {4}),
    (dict(carry=6, grad_loops=2), {2}),
])  # fmt: skip
def test_loops_are_drawn_and_the_log_counts_the_seconds_of_training_alone(tmp_path, monkeypatch, how, expected):
    loops, clock, model = [], [0], tiny(loops=4, inject=True, head_layers=1, tail_layers=1)
    model.register_forward_pre_hook(lambda m, args, how: loops.append(how["loops"]), with_kwargs=True)
    monkeypatch.setattr(rmdm.time, "perf_counter", lambda: clock[0])

    def tick(seconds, result):
        clock[0] += seconds
        return result

    fit(tmp_path, lambda n, g: tick(1, toy_batch(n, g)), lambda m: tick(1000, {"score": np.float32(0.5)}), model, **how)
    assert set(loops[-20:]) == expected  # before the first step it tries if it can train at all
    assert [(entry["seconds"], entry["score"]) for entry in log(tmp_path)[1:]] == [(s, 0.5) for s in (5, 10, 15, 20)]


def test_wrapped_and_averaged_models_are_trained_like_plain_ones(tmp_path):
    for name, wrapped in [("compiled", torch.compile(tiny(), backend="eager")), ("plain", tiny())]:
        average = fit(tmp_path / name, model=wrapped)
    again = fit(tmp_path / "second", model=average)
    first, second, third = (rmdm.load(tmp_path / name).state_dict() for name in ("compiled", "plain", "second"))
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)
    assert any((third[key] != second[key]).any() for key in third) and again is not average


def test_a_batch_whose_size_changes_is_refused_with_carrying(tmp_path):
    sizes = iter([1, 4, 1])
    how = dict(model=tiny(inject=True), carry=2, grad_loops=1, says="a batch of 1 after one of 4")
    refuses(fit, tmp_path / "x", lambda n, g: toy_batch(next(sizes), g), **how)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
def test_a_model_wrapped_by_torch_has_the_same_loss_and_gradients(tmp_path, monkeypatch):
    def twice(model):  # the loss of a batch, and its gradients, at the second time
        x0, g = torch.randint(1, 4, (8, 3), generator=generator(5)), generator()
        for _ in range(2):
            model.zero_grad()
            value, _ = rmdm.loss(model, x0, x0 > 0, "elbo", grad_loops=2, generator=g)
            value.backward()
        return [value.detach(), *(w.grad for w in model.parameters())]

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        wrapped = twice(torch.nn.parallel.DistributedDataParallel(tiny(**OURS)))
    finally:
        torch.distributed.destroy_process_group()
    for found in (wrapped, twice(torch.compile(tiny(**OURS), backend="eager"))):
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(twice(tiny(**OURS)), found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(tmp_path):
    """Bias, truncation, bf16, resume, sampling."""
    run = functools.partial(fit, steps=60, size=64, warmup=5, save_every=20, eval_every=60, grad_loops=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at_call(30, lambda: signal.raise_signal(signal.SIGINT)), model=tiny(**OURS).cuda())
    run(tmp_path, evaluate=lambda m: {"cuda": m.coords.is_cuda}, model=tiny(**OURS).cuda(), resume=True)
    assert log(tmp_path)[-1]["cuda"] and log(tmp_path)[-1]["loss"] < 0.9 * log(tmp_path)[1]["loss"]
    model, x = rmdm.load(tmp_path, "cuda"), torch.tensor([[MASK, MASK, 3]] * 9, device="cuda")
    for order in rmdm.ORDERS:
        g = torch.Generator("cuda").manual_seed(0)
        out = rmdm.sample(model, x, steps=3, order=order, generator=g)
        assert (out.x > 0).all() and (out.x[:, 2] == 3).all() and out.loops.min() > 0
    logits = model(x, torch.ones(9, device="cuda"))[0].cpu()[..., 1:]
    assert torch.allclose(rmdm.load(tmp_path)(x.cpu(), torch.ones(9))[0][..., 1:], logits, atol=0.02)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs a script's command line here, in an empty folder: exit code, what it printed, its last words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sudoku, "HELD_OUT", 4)
    monkeypatch.setattr(countdown, "TEST", 4)

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            rmdm.run_script(module.main)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code or 0, out, (err.splitlines() or [""])[-1]

    return run


@pytest.fixture
def board(cli):
    """An untrained model for Sudoku in the file board.pt."""
    model = tiny(vocab=10, coords=sudoku.COORDS, width=8, heads=1, loops=2)
    content = dict(config=asdict(model.config), about=dict(task="sudoku"), ema=model.state_dict())
    rmdm.save("board.pt", content)
    return content


def test_the_sudoku_commands_end_to_end(cli, puzzles):
    p, s = map(as_text, puzzles)
    train = ("--puzzles", 8, "--device", "cpu", "--set", *SMALL)
    code, out, _ = cli(sudoku, *train)
    assert code == 0 and "T=20 0.0\n" in out and re.findall(r"L=(\d+)", out) == ["2"]  # it solves nothing
    report = out[out.index("solved, %") :]
    assert cli(sudoku, "--resume")[1].endswith(report)  # a finished run reports once more
    code, _, err = cli(countdown, "--resume", "--out", "runs/sudoku")
    assert code == 2 and "not a run of countdown" in err
    command = re.search(r"python sample.py (sudoku --checkpoint \S+ \S{81})", out)[1].split()
    code, out, _ = cli(sample, *command, "--tries", 2, "--steps", 9, "--noise", 1)
    assert code == 1 and "not solved: " in out and out.count("|") == 36 and "(tries: 2, steps: " in out
    _, out, _ = cli(sample, *command, "--show", "--tries", 1, "--steps", 2, "--loops", 16)
    pictures = [int(l) for l in re.findall(r"loop (\d+): ", out)]  # every second one
    assert pictures == list(range(2, 17, 2)) and "step 2 of 2, 16 loops" in out and "\033" not in out
    Path("p.csv").write_text("".join(map("{},{}\n".format, [*p[:6], s[0]], [*s[:6], s[0]])))  # in one all is given
    measure = ("sudoku", "--checkpoint", "runs/sudoku", "--json", "--data")
    rows = [json.loads(line) for line in cli(sample, *measure, "p.csv", "--steps", "1,2")[1].splitlines()]
    assert [(r["T"], r["n"], r["exact"], r["loops"]) for r in rows] == [
        (T, 7, pytest.approx(1 / 7), pytest.approx(T * 12 / 7)) for T in (1, 2)]  # fmt: skip
    assert all(row["exact"] == row["valid"] == row["within_1"] and 0 < row["cell"] < 0.5 for row in rows)
    at_once = ("p.csv", "--steps", 1, "--loops", 9, "--eps", 99, "--tries", 3)
    row = json.loads(cli(sample, *measure, *at_once)[1])
    assert row["loops"] == pytest.approx(3 * 6 / 7) and row["tries"] == pytest.approx(19 / 7) and row["max_tries"] == 3
    Path("many.csv").write_text("puzzle,solution\n" + "".join(map("{},{}\n".format, p[:12], s)) + "damaged\n")
    assert cli(sudoku, "--data", "many.csv", "--out", "b", *train)[0] == 0  # it takes what it needs, and no more
    code, out, _ = cli(sample, "sudoku", EASY, "--steps", 20)  # with the weights of the repository
    assert code == 0 and "right, checked by the rules (tries: 1, " in out and "1 of 1 right" in out


def test_the_countdown_commands_end_to_end(cli):
    code, out, _ = cli(countdown, "--problems", 1000, "--device", "cpu", "--set", *SMALL)
    assert code == 0 and "to test 4 with held-out operands" in out and "with held-out targets" in out
    use = re.search(r"sample.py (countdown --checkpoint runs/countdown) (\S+)", out)
    code, out, _ = cli(sample, *use[1].split(), use[2], *"--show --steps 2 --tries 2".split())
    assert code == 1 and "not solved: " in out and "step 2 of 2, 2 loops" in out and "loop 2: " in out
    rows = [{"input": "20,4,7,87", "output": "20*4=80,7+80=87"}, {"input": "7,8,9", "output": "24"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = cli(sample, *use[1].split(), *"--data p.jsonl --steps 1,34 --json".split())
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["n"], r["loops"], r["solved"], r["within_1"]) for r in rows] == [(2, 2, 0, 0), (2, 44, 0, 0)]
    for problem in ("35,27,20,42", "90,30,20,10,50"):  # with the weights of the repository, picked by the problem
        code, out, _ = cli(sample, "countdown", problem, "--steps", 8)
        assert code == 0 and "right, checked by the rules" in out
    code, _, err = cli(sample, "countdown", "1,2,3,4,5,50")
    assert code == 2 and "no weights for 5 operands" in err


@pytest.mark.parametrize("module, presets, size", [
    (sudoku, sudoku.PRESETS, "--puzzles=20"), (countdown, countdown.presets(3), "--problems=500"),
])  # fmt: skip
def test_the_papers_form_has_nothing_of_ours_and_trains(cli, module, presets, size):
    config, training, _ = presets["paper"]
    assert not (config.inject or config.coord_bias or training.grad_loops or training.carry or config.head_layers)
    assert config.coords == tuple((i,) for i in range(len(config.coords))) and config.time
    assert training.supervise == "all" and training.objective == "simple" and not training.loops_min
    code, _, err = cli(module, "--paper", size, *"--device cpu --set steps=1 width=8 heads=1 loops=1".split())
    assert code == 0, err
    saved = rmdm.read(next(Path("runs").glob("*/model.pt")))
    assert saved["config"] == json.loads(json.dumps(asdict(config) | dict(width=8, heads=1, loops=1)))
    assert saved["train"] == asdict(training) | dict(steps=1)


def test_at_the_start_all_times_are_alike_and_with_t_as_an_input_the_papers_form_learns(tmp_path):
    """At full size the map of t drowned the tokens, and without injection nothing was learned."""
    torch.manual_seed(0)
    model = rmdm.RMDM(Config(9, 8, width=32, loops=4, time=True))
    x, every_t = torch.arange(8)[None], torch.tensor([0.01, 0.5, 1])
    nn.init.normal_(model.unembed.weight)  # which begins at zero, too
    logits = model(x.expand(3, 8), every_t)[0][0][..., 1:]
    assert (logits[0] == logits).all() and logits.any()
    nn.init.zeros_(model.unembed.weight)

    def batch(n, generator):
        x0 = (torch.randint(8, (n, 1), generator=generator) + torch.arange(8)) % 8 + 1
        return x0, torch.ones_like(x0, dtype=torch.bool)

    average = fit(tmp_path / "run", batch, model=model, size=32, steps=350, save_every=350, eval_every=350)
    x0 = batch(16, generator())[0]
    given = x0.masked_fill(torch.arange(8) > 0, MASK)
    assert (rmdm.sample(average, given, steps=4).x == x0).all() and model.time.weight.any()


# ---- 8. README and evidence ----

def test_the_links_in_the_readme_hit_and_its_commands_exist(cli):
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 10
    for name, path, line in links:
        code = (HERE / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b|{name} = ", code), f"{name} is not at line {line} of {path}"
    for path in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README):
        assert (HERE / path).exists(), path
    blocks = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if kind in ("", "sh")]
    lines = [*"".join(blocks).replace("\\\n", " ").splitlines(), *re.findall(r"`(python [^`\n]+)`", README)]
    lines = [found[1] for line in lines if (found := re.search(r"\bpython (.*)", line))]
    commands = [shlex.split(line, comments=True) for line in lines]
    scripts = {"train_sudoku.py": sudoku, "train_countdown.py": countdown, "sample.py": sample}
    assert {argv[0] for argv in commands} >= set(scripts)
    names = {f.name for kind in (Config, TrainConfig) for f in fields(kind)}
    for script, *argv in commands:
        if script in scripts:
            options = cli(scripts[script], "--help")[1]
            missing = [x for x in argv if x.startswith("--") and not re.search(rf"{x.split('=')[0]}\b", options)]
            unknown = [x for x in argv if re.match(r"\w+=", x) and x.split("=")[0] not in names]
            assert not missing + unknown, (script, argv)
        else:
            assert script.startswith("-") or (HERE / script).exists(), script


@torch.no_grad()
def test_the_step_in_the_readme_is_what_sample_does():
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "model.loop(" in code)
    model, T, L = tiny(coords=6), 4, 3
    names = dict(model=model, math=math, torch=torch, L=L, x=torch.zeros(6, dtype=torch.long))
    names["masked"] = names["x"] == MASK
    for left in range(T, 0, -1):
        names |= dict(steps_left=left, t=names["masked"].float().mean()[None])
        exec(code, names)
    assert torch.equal(names["x"], rmdm.sample(model, torch.zeros(1, 6, dtype=torch.long), steps=T, loops=L).x[0])


def test_rmdm_alone_in_an_empty_folder_runs_the_readme_example(tmp_path):
    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "rmdm.train(" in code)
    (tmp_path / "rmdm.py").write_bytes((HERE / "rmdm.py").read_bytes())
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in README  # it says what comes


@pytest.mark.skipif(not (HERE / "evidence" / "results.py").exists(), reason="no evidence here")
def test_the_tables_of_the_evidence_are_those_of_its_logs():
    done = python("evidence/results.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


# ---- 9. trust ----

def test_what_is_not_solved_is_never_called_right(puzzles):
    puzzle, solution = (part[0] for part in puzzles)
    other = np.arange(10, dtype=np.uint8)[[0, 2, 3, 4, 5, 6, 7, 8, 9, 1]][solution]  # valid, but all clues are changed
    holes = [np.where(np.arange(81) == i, MASK, solution) for i in (np.flatnonzero(puzzle)[0], (puzzle == 0).argmax())]
    assert sudoku.check(solution, puzzle) is None and sudoku.right(puzzle[None], solution[None])
    for wrong in (other, puzzle, np.zeros_like(puzzle), *holes):
        assert sudoku.check(wrong, puzzle) and not sudoku.right(puzzle[None], wrong[None])


HASH = "5bcf0a6ae0d2b8a4c5c1d9d0a3f3a3b1"
KNOWN = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
LISTS = "[[{}]]".format("],[".join(", ".join(KNOWN[i : i + 9]) for i in range(0, 81, 9)))


def drawn(puzzle, cell=" ", border="------+-------+------"):
    return "\n".join([border, *(cell.join(puzzle[i : i + 9]) for i in range(0, 81, 9)), border])


@pytest.mark.parametrize("text, n, known", [
    ("{q};{a}\n{q}\t{a}\n{q}:{a}\n'{q}' , \"{a}\"\n", 4, 4),
    ("0,{q},{a},24,9.3\n9.3 {q} {h}\n{q} # rated 11.9\n{h} {q}\n", 4, 1),
    ('{{"question": "{q}", "answer": "{a}", "rating": 3}}\n[["{q}", "{a}"],\n', 2, 2),
    ("puzzle, solution\n{a},{q}\n", 1, 1),  # the one with blanks is the puzzle
    ("quizzes;solutions\n{q};\n\n# {q}\n{q}, ?\n", 2, 0),
    ("Grid 01\n{rows}\nGrid 02\n{rows}\n", 2, 0), ("{rows}\n\n{rows}\n{q}\n", 3, 0),
    ("{dots}\n", 1, 0), ("{dashes}\n", 1, 0), ("{middots}\n", 1, 0), ("{marks}\n", 1, 0), ("{commas}\n", 1, 0),
    ("{grid}\n", 1, 0), ("[Puzzle]\n{grid}\n[Notes]\neasy\n", 1, 0), ("{lists}\n", 1, 0), ("{pipes}\n", 1, 0),
    ("\r\n".join(["{q}"] * 3), 3, 0),
])  # fmt: skip
def test_sudokus_are_read_in_the_shapes_that_people_have(puzzles, text, n, known):
    (q, *_), (a, *_) = map(as_text, puzzles)
    q = KNOWN if "lists" in text else q
    shapes = dict(q=q, a=a, h=HASH, lists=LISTS, commas=",".join(q), rows=drawn(q, "", ""))
    shapes |= {key: q.replace("0", c) for key, c in dict(dots=".", dashes="-", middots="\u00b7", marks="?").items()}
    shapes |= dict(grid=drawn(q.replace("0", ".")), pipes=drawn(q, "|", "+" + "-" * 17 + "+"))
    found, solutions, skipped = sudoku.read(text.format_map(shapes))
    assert as_text(found) == [q] * n and solutions.any(1).sum() == known and not skipped
    assert all(row == a for row in as_text(solutions[solutions.any(1)]))


@pytest.mark.parametrize("text, says", [
    ("{q}\n{s}\n", "line 2: a field of 80 cells, not 81"), ("{q}\n{q}5\n", "line 2: a field of 82 cells"),
    ("{q},{s}\n", "line 1: a field of 80 cells"), ("x\n{part}\n", "line 2: a field of 60 cells"),
    ("{q},{q}\n", "2 fields of 81 cells that are not one puzzle and its solution"), ("{q},{a},{a}\n", "3 fields"),
    ("{q},{b}\n", "line 1: the solution is wrong"), ("4.30021E+77\n", "what a spreadsheet makes"),
    ("{rows}\n{q}\n", "line 1: a grid of 8 rows, not 9"), ("{q}\n123456789\n", "line 2: a grid of 1 rows"),
    ("{lost}\n", "80 cells, not 81 .leading zeros lost"), ("hello\n", "x: no puzzle in it"), ("", "no puzzle in it"),
    ("{q}\n12\n", "too few cells"),
])  # fmt: skip
def test_no_damaged_sudoku_is_dropped_or_misread(puzzles, text, says):
    (q, *_), (a, b, *_) = map(as_text, puzzles)
    shapes = dict(q=q, a=a, b=b, s=q[:-1], part=q[:60], lost="4" + "0" * 79)
    shapes["rows"] = "\n".join(drawn(q, "").split("\n")[1:9])
    refuses(sudoku.read, text.format_map(shapes), "x", says=says)


@pytest.mark.parametrize("text, n, skipped", [
    ('{"nums": [35, 27, 20], "target": 42}\n{"input": "35,27,20", "output": 42}\n', 2, 0),
    ('[{"input": "35, 27, 20, 42", "output": "35-20=15, 15+27=42"},\n {"input": [35,27,20,42], "output": ""}]', 2, 0),
    ("35,27,20,42\n# a comment\n35, 27, 20, 42\n35 27 20 42\n", 3, 0),
    ("35,27,20,42\n35,27,20,7\n35,27,100,42\n35,27,20,20,42\n", 1, 3),
])  # fmt: skip
def test_countdown_files_are_read_in_the_shapes_that_people_have(text, n, skipped):
    problems, equations, why = countdown.read(text)
    assert problems.tolist() == [[35, 27, 20, 42]] * n and sum(why.values()) == skipped
    assert equations.any((1, 2)).sum() == ("15+27" in text)
    four = "1,2,3,4,20\n" + text.lstrip("[").rstrip("]") if skipped else ""
    assert not four or countdown.read(four, "", 3)[2]["not 3 operands"] == 2


@pytest.mark.parametrize("text, says", [
    ('1,35,14,22\n{"input": "1,35,14,22"}', "line 2: neither numbers"), ("1,35,14,22\n" + "[" * 99 + "x", "line 2"),
    ('{"a": ' * 100_000, "line 1"), ('{"nums": [true, 2, 3], "target": 20}', "line 1"), ("1_0,2,3,20", "line 1"),
    ('{"input": "1,35,14,22", "output": "35-14=21,22+0=22"}', "wrong, equation 2: number not available, 22"),
    ("1,2,3,7", "no problem that the model can take .a target that is not from 10 to 100"), ("", "no problem"),
    ("9" * 5000 + ",2,3,20", "line 1"),
])  # fmt: skip
def test_no_damaged_countdown_row_is_misread(text, says):
    refuses(countdown.read, text, "x", says=says)


def test_what_is_no_text_is_called_by_its_name(tmp_path):
    for content, says in [
        (b"\x1f\x8b\x08", "compressed"), (b"PK\3\4", "compressed"), ("\ufeff1,2".encode("utf-16-le"), "UTF-16"),
        (EASY.encode("utf-16-le"), "UTF-16"), (b"\xff" * 9, "not UTF-8"), (b"1\0\0\0", "not UTF-8"),
    ]:  # fmt: skip
        (tmp_path / "x").write_bytes(content)
        refuses(rmdm.read_text, tmp_path / "x", says=says)
    refuses(rmdm.read_text, tmp_path / "none", says="no such file")
    refuses(rmdm.read_text, tmp_path, says="is a directory")
    (tmp_path / "x").write_text("123")
    refuses(rmdm.read_text, tmp_path / "x", size=2, says="more than 0 MiB")


def test_a_flipped_bit_or_a_file_cut_short_is_noticed(tmp_path):
    path, good, random, refused = tmp_path / "x.pt", HERE / "weights/sudoku-short.pt", np.random.default_rng(0), 0
    data, whole = good.read_bytes(), rmdm.load(good)
    spoiled = [data[:end] for end in (0, 99, len(data) // 2, len(data) - 1)]
    for at, bit in zip(random.integers(len(data), size=300), random.integers(8, size=300)):
        spoiled.append(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    for content in spoiled:
        path.write_bytes(content)
        try:
            model = rmdm.load(path)
        except BadInput:
            refused += 1
        else:  # a bit that means nothing
            assert model.config == whole.config and same(model.state_dict().values(), whole.state_dict().values())
    assert refused > 250


def test_a_record_that_torch_would_skip_and_sizes_that_would_fill_the_memory_are_refused(tmp_path):
    path, saved = tmp_path / "x.pt", rmdm.read(HERE / "weights/sudoku-short.pt")
    data = bytearray((HERE / "weights/sudoku-short.pt").read_bytes())
    record = data.rindex(b"PK\1\2")  # in the central directory; its byte 38 holds the mark of a folder
    data[record + 38] |= 16
    path.write_bytes(data)
    refuses(rmdm.load, path, says="damaged, or not written by rmdm")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a few bytes that become many
        archive.writestr("archive/data.pkl", bytes(10**6))
    refuses(rmdm.load, path, says="damaged, or not written by rmdm")
    spoiled = [("width", 40_000), ("loops", 10**6), ("layers", 99), ("coords", 10**9), ("vocab", 10**6)]
    for key, value in spoiled:
        torch.save(saved | dict(config=saved["config"] | {key: value}), path)
        refuses(rmdm.load, path, says="do not fit")
    saved["ema"]["norm.bias"][3] = math.nan
    torch.save(saved, path)
    refuses(rmdm.load, path, says="a weight is not finite")


def test_what_a_killed_save_left_is_removed_and_in_nobodys_way(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for resume in (False, True):
        (out / "checkpoint.pt.77.part").write_bytes(b"half")
        fit(out, resume=resume)
        assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "model.pt", "log.jsonl"}


Evil = type("Evil", (), {"__reduce__": lambda self: (open, ("owned", "w"))})  # opens a file when it is unpickled


@pytest.mark.parametrize("spoil, says", [
    (lambda saved: saved.update(about=Evil()), "damaged, or not written by rmdm"),
    (lambda saved: saved["about"].update(task="countdown"), "made for 'countdown', not for sudoku"),
    (lambda saved: saved.pop("about"), "do not fit"),
    (lambda saved: saved["ema"].update({"norm.bias": 3}), "do not fit"),
    (lambda saved: saved["ema"].pop("norm.bias"), "norm.bias"),
    (lambda saved: saved["config"].update(depth=3), "depth"),
    (lambda saved: saved["config"].update(coords="8"), "do not fit"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_are_refused_and_run_no_code(board, spoil, says):
    spoil(board)
    torch.save(board, "x.pt")
    refuses(rmdm.load, "x.pt", task="sudoku", says=says)
    assert not Path("owned").exists()


def test_a_run_is_resumed_with_its_own_settings_alone(tmp_path):
    with pytest.raises(TypeError):  # what could not be read again is refused before the first step
        fit(tmp_path / "out", about={"data": Path("x")})
    assert not (tmp_path / "out").exists()
    fit(tmp_path, steps=2, about={"task": "a", "data": 1})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other, says in [
        (dict(model=tiny(loops=9)), "begun with loops=3, not 9"),
        (dict(steps=9), "begun with steps=2, not 9"),
        (dict(about={"task": "b", "data": 1}), "begun with task=a, not b"),
        (dict(about={"task": "a"}), "begun with data=1, not None"),
        (dict(about={"task": "a", "data": 1, "seed": 1}), "begun with seed=None, not 1"),
    ]:
        refuses(fit, tmp_path, **dict(steps=2, about={"task": "a", "data": 1}) | other, resume=True, says=says)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_two_processes_that_save_one_file_do_not_tear_it(tmp_path, monkeypatch):
    path, fsync = tmp_path / "x.pt", os.fsync

    def second(fd):  # another process saves while the first one is at it
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        Path(f"{path}.1.part").touch()  # left by one that was killed; in containers numbers come again
        rmdm.save(path, torch.zeros(5))
        assert rmdm.read(path).sum() == 0

    monkeypatch.setattr(os, "fsync", second)
    rmdm.save(path, torch.ones(5))
    assert rmdm.read(path).sum() == 5 and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_is_one_line_and_before_the_first_checkpoint_leaves_nothing_in_the_way(cli, monkeypatch):
    train = ("--puzzles", 8, "--set", *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(rmdm, "save", lambda *a: signal.raise_signal(signal.SIGINT))
        patch.setattr(sudoku, "generated", sudoku.generate)
        assert cli(sudoku, *train)[::2] == (130, "stopped")
    assert cli(sudoku, *train)[0] == 0


def test_a_closed_pipe_is_no_traceback(board):
    read, write = os.pipe()
    os.close(read)  # `| head`
    how = dict(cwd=".", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    done = python(str(HERE / "sample.py"), *f"sudoku --checkpoint board.pt {EASY} --tries 1 --steps 1".split(), **how)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_problems_come_as_arguments_files_and_streams(cli, board, puzzles, monkeypatch):
    drawn = "\n".join(sudoku.draw(as_text(puzzles[1])[0]))  # nothing left to fill in
    boxes = "\u250c" + "\u2500" * 300 + "\n" + drawn.translate(BOXES)
    Path("grid.txt").write_bytes(("\ufeff" + drawn).encode())
    Path("two.txt").write_text("# two\n\n" + "\n".join(as_text(puzzles[1][:2])))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(drawn.encode())))
    for argv in ([drawn], [boxes], ["grid.txt"], ["two.txt"], []):
        code, out, err = cli(sample, "sudoku", "--checkpoint", "board.pt", *argv)
        assert code == 0 and out.count("by the rules (tries: 1, steps: 0,") == 1 + (argv == ["two.txt"]), err


HUGE = "9" * 30
BAD = {
    (sudoku, "no such file"): ["--data ''"],
    (sudoku, "/dev/zero: not UTF-8 text"): ["--data /dev/zero"],
    (sudoku, "the options that the run was begun with: leave out --puzzles, --set"): ["--resume"],
    (sudoku, "in use: resume its run"): ["--out ."],
    (sudoku, "seed"): ["--seed -1"],
    (sudoku, "puzzles is from 1"): ["--puzzles 0", f"--puzzles {HUGE}"],
    (sudoku, "needs inject=true"): ["--set inject=false carry=0"],
    (sudoku, "no field 'stepz'"): ["--set stepz=3"],
    (sudoku, "steps must be of type int"): ["--set steps=many"],
    (sudoku, "training needs over 4 puzzles with their solutions"): ["--data p.csv"],
    (countdown, "no such file"): ["--data ''"],
    (countdown, "problems is from 1"): ["--problems 0"],
    (countdown, "at least 100 problems with 3 operands and a solution"): ["--data no.jsonl"],
    (countdown, "too few problems are left to train and test on"): ["--data held.jsonl"],
    (countdown, "no problem that the model can take (not 4 operands)"): ["--data held.jsonl --numbers 4"],
    (sample, "neither a problem nor a file"): ["sudoku none.txt"],
    (sample, "no such file"): ["sudoku --data ''", f"sudoku {EASY} --checkpoint none"],
    (sample, "--data takes no problem"): [f"sudoku --data p.csv {EASY}", "sudoku --data p.csv --show"],
    (sample, "--steps is a number"): [f"sudoku {EASY} --steps {HUGE}", f"sudoku {EASY} --steps ''"],
    (sample, "seed"): [f"sudoku {EASY} --seed {HUGE}"],
    (sample, "temperature"): [f"sudoku {EASY} --temperature inf"],
    (sample, "p.txt, line 2: a field of 82 cells, not 81"): ["sudoku p.txt"],
    (sample, "noise.bin: not UTF-8 text"): [
        "sudoku noise.bin", "sudoku --data noise.bin",
        f"countdown --checkpoint {HERE}/weights/countdown-3.pt --data noise.bin",
    ],
    (sample, "noise.bin: damaged, or not written by rmdm"): [f"sudoku {EASY} --checkpoint noise.bin"],
    (sample, "several --steps need --data"): [f"sudoku {EASY} --steps 1,5"],
    (sample, "no problem that the model can take (not 3 operands)"): [
        f"countdown 1,2,3,4,50 --checkpoint {HERE}/weights/countdown-3.pt"
    ],
}


@pytest.mark.parametrize("module, says, argv", [(*key, argv) for key, some in BAD.items() for argv in some])
def test_bad_input_is_one_line_and_exit_code_2(cli, board, puzzles, monkeypatch, module, says, argv):
    monkeypatch.setattr(sudoku, "generate", lambda n, seed: np.random.default_rng(seed) and [p[:n] for p in puzzles])
    Path("p.csv").write_text("puzzle\n" + EASY + "\n")
    Path("p.txt").write_text(f"{EASY}\n{EASY}5\n")
    Path("noise.bin").write_bytes(bytes(range(256)))
    Path("no.jsonl").write_text('{"input": "20,4,7", "output": "87"}\n' * 200)
    Path("held.jsonl").write_text('{"input": "20,4,16,96", "output": "20*4=80,80+16=96"}\n' * 200)  # 96 is held out
    before, small = set(Path().rglob("*")), ["--set", *SMALL, "--puzzles" if module is sudoku else "--problems", 200]
    small = ["--checkpoint", "board.pt", "--steps", "1", "--tries", "1"] if module is sample else small
    code, out, err = cli(module, *small, *shlex.split(argv))
    assert code == 2 and says in err and err.startswith(f"{module.__name__}.py: ") and len(err) < 400, err
    left = {path for path in Path().rglob("*") if path.parts[0] != "data"} - before
    assert "right" not in out and not left
