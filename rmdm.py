"""Recursive Masked Diffusion Models (R-MDM): the method in one file.

A masked diffusion model learns to fill in hidden tokens. It starts from a sequence in which they are all
replaced by the token MASK, and fills them in over T denoising steps. R-MDM applies the same transformer
block L times inside each of these steps. So the network gets deeper without more parameters.

This file needs PyTorch and tqdm, and can be copied alone. It works on any sequences of discrete tokens that
all have the same length. Read it from the top. Sections 1 and 3 are the papers' method alone. Sections 2 and
4 are that, too, with options of ours, which are off by default and marked "ours". Section 5 is our main
addition. The rest trains and keeps models.

    1. Schedule and forward process    eq. (1)           alpha, sample_t, corrupt
    2. Recursive transformer           eqs. (2), (7)     Config, Layer, RMDM
    3. Loss                            eqs. (3) to (5)   loss, nelbo
    4. Sampler                         eqs. (6), (7)     sample
    5. Ours: carried examples                            carried_loss
    6. Training and checkpoints                          TrainConfig, train, load
    7. What the scripts share                            override, run_script

The equation numbers are this project's own; README.md lists the equations and all references. Eq. (8), tries,
is in sample.py; only its noise and `give_up` are here.
    R-MDM: arXiv 2606.18022. LoopMDM: arXiv 2605.26106. Simple objective: arXiv 2602.15014.

Letters used throughout:
    B examples, N positions, V tokens (MASK included), d width
    K layers in the block, L loops, T denoising steps
    x0 (B, N) int64: clean tokens; x_t (B, N): the same, partly MASK; t (B,): time, in (0, 1]
    editable (B, N) bool: True = may be masked. Clues and prompts are False, and never change
    h (B, N, d): the hidden state; l = 1..L: the loop that makes h^l
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

MASK = 0  # the mask token; the tokens of a task are 1..V-1


class BadInput(ValueError):
    """A mistake that the caller can mend. The scripts print it as one line, without a traceback."""


def require(condition, message):
    if not condition:
        raise BadInput(message)


# ---- 1. Schedule and forward process ----
# To change the schedule, replace the first three functions. All else derives from them. How many tokens an
# ordered step reveals does not depend on the schedule.

def alpha(t):
    """The probability that an editable token is still visible at time t: 1 at t = 0, 0 at t = 1."""
    return 1 - t


def alpha_prime(t):
    """The derivative of alpha."""
    return -torch.ones_like(t)


def alpha_inverse(a):
    """The t at which alpha(t) = a."""
    return 1 - a


def sample_t(n, generator=None, device=None):
    """n values of t in (0, 1], (n,): uniform, but one in each of n equal intervals, for less variance."""
    u = torch.rand(n, generator=generator, device=device)
    stratum = torch.randperm(n, generator=generator, device=device)  # else row i would always get interval i
    return (1 - (stratum + u) / n).clamp(min=2**-24)  # rounding could give 0


def corrupt(x0, t, editable, generator=None):
    """Forward process, eq. (1). Returns x_t (B, N), and `masked` (B, N) bool, True = was replaced by MASK."""
    check_batch(x0, editable)
    require(not (editable & (x0 == MASK)).any(), f"x0 has the token {MASK}, MASK, at an editable position")
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    masked = editable & (u < 1 - alpha(t)[:, None])  # (1): MASK with probability 1 - alpha_t
    return torch.where(masked, MASK, x0), masked


def check_batch(x, editable):
    """Raises BadInput unless x and editable are (B, N), and editable is bool."""
    shapes = f"x {tuple(x.shape)} and editable {tuple(editable.shape)}"
    require(x.ndim == 2 and x.shape == editable.shape, f"{shapes}: both are (B, N)")
    require(editable.dtype == torch.bool, f"editable is {editable.dtype}, not torch.bool")


# ---- 2. Recursive transformer ----

@dataclass
class Config:
    """The model. It is kept in the checkpoint. With the defaults its form is the paper's, as far as we know.
    The sizes are ours."""

    vocab: int  # V, MASK included
    coords: tuple  # N; or, ours, one tuple of coordinates for each position (Sudoku: row, column, box)
    width: int = 64  # d: small enough to train in minutes on a CPU
    heads: int = 2  # attention heads: a few wide ones are faster on a CPU
    layers: int = 1  # K, the layers of the looped block: with one, all depth comes from the loops
    loops: int = 8  # L, and how many v^l there are. With TrainConfig.carry a training step runs grad_loops
    time: bool = True  # t is an input of f, as in eq. (2)
    head_layers: int = 0  # LoopMDM, eq. (7): layers that run once, before the loops
    tail_layers: int = 0  # LoopMDM, eq. (7): layers that run once, after the loops
    inject: bool = False  # ours: h^0 is added again at every loop (prior art: 2502.05171)
    coord_bias: bool = False  # ours: attention favours or shuns positions that share a coordinate, see Layer

    def __post_init__(self):
        least = dict(vocab=2, width=1, heads=1, layers=1, loops=1, head_layers=0, tail_layers=0)
        for key, low in least.items():
            n, high = getattr(self, key), 1000 if "layers" in key else 10**6
            whole = isinstance(n, int) and low <= n <= high
            require(whole, f"{key} is a whole number from {low} to {high:,}")
        require(self.width % self.heads == 0, f"heads={self.heads} does not divide width={self.width}")
        coords = torch.as_tensor(self.coords)
        coords = coords if coords.ndim else torch.arange(int(coords))[:, None]
        good = coords.ndim == 2 and coords.numel() and not coords.is_floating_point() and coords.min() >= 0
        require(good, "coords is a length, or a row of integers from 0 for each position")
        self.coords = tuple(map(tuple, coords.tolist()))


class Layer(nn.Module):
    """One transformer layer, (B, N, d) -> (B, N, d): attention in both directions, then an MLP.

    same (axes, N, N) turns on `coord_bias`, which is ours. same[a, i, j] is 1 if positions i and j have the
    same coordinate on axis a, else 0. A learned number for each head and axis, times `same`, is added to
    the attention logits."""

    def __init__(self, width, heads, same=None):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)  # not RMSNorm, since torch has no fast one for the CPU
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.register_buffer("same", same, persistent=False)
        self.bias = None
        if same is not None:  # ours: even heads begin by looking at such positions, odd ones elsewhere
            sign = (-1.0) ** torch.arange(heads)
            self.bias = nn.Parameter(sign.view(heads, 1, 1, 1).repeat(1, len(same), 1, 1))

    def forward(self, h):
        B, N, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, N, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if self.bias is None else (self.bias * self.same).sum(1).to(q.dtype)  # (heads, N, N)
        if h.device.type == "cpu":  # for short sequences faster than torch's kernel
            logits = (q * q.shape[-1] ** -0.5) @ k.mT
            mixed = (logits if bias is None else logits + bias).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias)
        h = h + self.out(mixed.transpose(1, 2).reshape(B, N, d))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class RMDM(nn.Module):
    """The denoiser p_theta(x0 | x_t) of eq. (2):

        h^0 = E(x_t, t)
        h^l = f(Norm(h^{l-1} + v^l), t),   l = 1..L      f: K layers, the same ones in every loop
        p_theta(x0 | x_t) = softmax D(h^L)

    E is `encode`, one loop is `loop`, D is `decode`. Only h carries information from loop to loop. LoopMDM,
    eq. (7), has further layers of its own at the end of E and at the beginning of D.

    Where the papers, as far as we know them, leave something open, these are our choices. t goes as
    sinusoids through a linear map. The result is added to h^0, and before the Norm of each loop. Norm is a
    LayerNorm. v^l, the map of t and the last layer of D begin at zero. So at first all loops are alike, all
    t are alike, and all tokens are equally likely. Beyond L loops the last v^l repeats. Layers, position
    tables and the norm before D's last layer are ordinary ones."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        coords = torch.tensor(c.coords)  # (N, axes)
        same = (coords == coords[:, None]).permute(2, 0, 1).float() if c.coord_bias else None  # (axes, N, N)
        self.register_buffer("coords", coords, persistent=False)
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.ModuleList(nn.Embedding(1 + max(axis), c.width) for axis in zip(*c.coords))
        if c.time:
            self.time = nn.Linear(16, c.width)
        self.head, self.block, self.tail = (  # LoopMDM's names; they have nothing to do with attention heads
            nn.Sequential(*(Layer(c.width, c.heads, same) for _ in range(n)))
            for n in (c.head_layers, c.layers, c.tail_layers)
        )
        self.v = nn.Embedding(c.loops, c.width)
        self.loop_norm = nn.LayerNorm(c.width)
        self.norm = nn.LayerNorm(c.width)
        self.unembed = nn.Linear(c.width, c.vocab - 1)  # no logit for MASK
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.5)  # token and position together are then of size 0.7 to 1
        nn.init.zeros_(self.unembed.weight)
        nn.init.zeros_(self.v.weight)
        if c.time:  # begun at full size t outweighs the tokens, and the paper's form learns nothing
            nn.init.zeros_(self.time.weight)

    def embed_time(self, t):
        """t (B,) -> (B, 1, d)."""
        angle = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 7, device=t.device)
        return self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None]

    def encode(self, x_t, t):
        """E of eq. (2): x_t (B, N), t (B,) -> h^0 (B, N, d)."""
        N, shape = len(self.coords), tuple(x_t.shape[1:])
        require(shape == (N,), f"sequences of shape {shape}: this model's have N = {N}")
        h = self.token(x_t) + sum(table(axis) for table, axis in zip(self.position, self.coords.T))
        if self.config.time:
            h = h + self.embed_time(t)
        return self.head(h)  # (7): LoopMDM's layers before the loops

    def loop(self, h, h0, l, t):
        """One loop of eq. (2): h^{l-1} and h^0 (B, N, d), l (B,) counted from 1, t (B,) -> h^l (B, N, d)."""
        h = h + self.v(l.clamp(max=self.config.loops) - 1)[:, None]  # h^{l-1} + v^l
        if self.config.time:
            h = h + self.embed_time(t)  # f's t: where it enters is our choice
        if self.config.inject:
            h = h + h0  # ours
        return self.block(self.loop_norm(h))  # f(Norm(.))

    def decode(self, h):
        """D of eq. (2): h (B, N, d) -> logits (B, N, V). MASK has -inf, that is, probability 0."""
        h = self.tail(h)  # (7): LoopMDM's layers after the loops
        with torch.autocast(h.device.type, enabled=False):  # in bfloat16 many probabilities would be equal
            return F.pad(self.unembed(self.norm(h)), (1, 0), value=-math.inf)

    def forward(self, x_t, t, loops=None, supervise="final", grad_loops=0, start=None):
        """For training: logits (R, B, N, V) and the last h (B, N, d). R loops of the L are decoded.

        loops       default: config.loops
        supervise   eq. (5): "final" decodes the last loop, R = 1; "all" each loop that has gradient
        grad_loops  eq. (5): only the last so many loops have gradient; 0 = all of them
        start       ours: (h, l). Rows with l > 0 go on from h, which l earlier loops have made. Rows with
                    l = 0 begin at h^0, as all do without `start`"""
        L = loops or self.config.loops
        M = min(grad_loops or L, L)
        h0 = self.encode(x_t, t)  # h^0 = E(x_t, t)
        h, l = h0, torch.zeros_like(x_t[:, 0])
        if start is not None:  # ours
            h, l = torch.where((start[1] > 0)[:, None, None], start[0], h0), start[1]
        states = []
        for k in range(1, L + 1):
            # (5): gradient in the last M loops alone. Written so, torch.compile takes it as one graph.
            with torch.set_grad_enabled(torch.is_grad_enabled() if k > L - M else False):
                h = self.loop(h, h0, l + k, t)  # h^l
            states.append(h)
        states = states[-M:] if supervise == "all" else states[-1:]  # (5)
        return self.decode(torch.cat(states)).view(len(states), *x_t.shape, -1), h  # D(h^l)

    def infer(self, x_t, t, loops=None, eps=0.0, noise=0.0, generator=None, start=None):
        """For sampling: logits (B, N, V) after the last loop, the last h (B, N, d), and the loops used (B,).

        eps     LoopMDM's adaptive stop, eq. (7): an example stops, and costs nothing more, at the first loop
                where ||h^l - h^{l-1}|| / ||h^l|| < eps. 0 = all loops are run
        noise   ours, eq. (8): the size of Gaussian noise that is added to h^0
        start   ours: (h, l), to go on from h, which l (B,) earlier loops have made, perhaps when fewer tokens
                were revealed. Tokens revealed since reach the network by the injection of h^0 alone"""
        L = loops or self.config.loops
        h0 = self.encode(x_t, t)  # h^0 = E(x_t, t)
        if noise:
            h0 = h0 + noise * torch.randn(h0.shape, generator=generator, device=h0.device)  # (8)
        h, l = start or (h0, torch.zeros_like(x_t[:, 0]))
        final, used = torch.empty_like(h), torch.full_like(l, L)
        going = torch.arange(len(x_t), device=x_t.device)  # the examples that have not stopped
        for k in range(1, L + 1):
            before, h = h, self.loop(h, h0, l + k, t)  # h^l
            if eps:
                change = (h - before).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)  # (7)
                stop = change < eps
                final[going[stop]], used[going[stop]] = h[stop], k
                going, h, h0, l, t = (part[~stop] for part in (going, h, h0, l, t))
                if not len(going):
                    break
        final[going] = h
        return self.decode(final), final, used  # D(h^L)


# ---- 3. Loss ----

def nelbo_weight(t):
    """The weight of eq. (3), here 1/t. It stays finite where rounding makes 1 - alpha_t zero."""
    return -alpha_prime(t) / (1 - alpha(t)).clamp(min=2**-24)


WEIGHTS = {"elbo": nelbo_weight, "simple": torch.ones_like}  # of t: in (3) 1/t, in (4) none


def masked_nats(model, x0, x_t, masked, t, **options):
    """The sum over masked i of -log p_theta(x0^i | x_t): (R, B) nats, after each of R loops.

    Also returns which tokens the last loop gets right (B, N) bool, and its h (B, N, d). For `options` and R
    see RMDM.forward."""
    V = unwrap(model).config.vocab
    good = not x0.numel() or 0 <= x0.min() and x0.max() < V
    require(good, f"x0 has a token that is not from 0 to {V - 1}, those of this model")
    logits, h = model(x_t, t, **options)
    log_p = logits.float().log_softmax(-1)
    log_p = log_p.gather(-1, x0.expand(len(logits), *x0.shape)[..., None])[..., 0]  # log p_theta(x0^i | x_t)
    return -log_p.where(masked, 0).sum(2), logits[-1].argmax(-1) == x0, h.detach()


def loss(model, x0, editable, objective="simple", supervise="all", grad_loops=0, loops=None, generator=None):
    """The training loss, in nats per editable token, and the accuracy of the last loop on masked tokens.

    objective    "elbo" is eq. (3). "simple" is eq. (4): the same without the weight
    supervise, grad_loops, loops    as in RMDM.forward. With "all" the mean over the loops is taken, eq. (5)

    The model may be one that torch has wrapped (torch.compile, DistributedDataParallel)."""
    t = sample_t(len(x0), generator, x0.device)
    x_t, masked = corrupt(x0, t, editable, generator)  # (1)
    options = dict(supervise=supervise, grad_loops=grad_loops, loops=loops)
    nats, right, _ = masked_nats(model, x0, x_t, masked, t, **options)
    return per_token(WEIGHTS[objective](t) * nats, right, masked, editable)  # (3) or (4)


def per_token(nats, right, masked, editable):
    """Nats (R, B) per editable token, and the share of the masked tokens that is right."""
    nats = nats.mean(0)  # (5): the mean over loops. To give them other weights, such as l/L, do it here
    value = nats.sum() / editable.sum().clamp(min=1)  # ours: per token, so that it does not grow with N
    return value, (right & masked).sum() / masked.sum().clamp(min=1)


@torch.no_grad()
def nelbo(model, x0, editable, generator=None):
    """One unbiased estimate of the NELBO, eq. (3), at the final loop, for each example: (B,) nats.

    Its mean is an upper bound of the mean of -log p(x0 at the editable positions | the other positions)."""
    t = sample_t(len(x0), generator, x0.device)
    x_t, masked = corrupt(x0, t, editable, generator)
    return nelbo_weight(t) * masked_nats(model, x0, x_t, masked, t)[0][0]  # (3)


# ---- 4. Sampler ----

ORDERS = ("ancestral", "random", "confidence", "margin", "entropy")


def reveal_ancestral(masked, t, s, generator):
    """The positions that the exact reverse process reveals from time t to s < t, eq. (6): (B, N) bool."""
    share = (alpha(s) - alpha(t)) / (1 - alpha(t))  # (6)
    return masked & (torch.rand(masked.shape, generator=generator, dtype=t.dtype, device=t.device) < share)


def reveal_ordered(masked, p, steps_left, order, threshold, generator):
    """The positions that an ordered step reveals, eq. (6), by p (B, N, V): (B, N) bool.

    In each example these are the first ceil(masked / steps left) in the order, and all that reach the
    threshold."""
    sure = p.amax(-1)
    score = sure
    if order == "margin":
        first, second = p.topk(2, -1).values.unbind(-1)
        score = first - second
    elif order == "entropy":
        score = torch.xlogy(p, p).sum(-1)  # minus the entropy, so that the least uncertain comes first
    elif order == "random":
        score = torch.rand(sure.shape, generator=generator, dtype=p.dtype, device=p.device)
    best_first = score.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = best_first.argsort(1)  # 0 = the first to be revealed
    chosen = rank < (masked.sum(1, keepdim=True) + steps_left - 1) // steps_left  # (6): rounded up
    return masked & (chosen if threshold is None else chosen | (sure >= threshold))


@dataclass
class Filled:
    """What `sample` returns."""

    x: torch.Tensor  # (B, N) the filled-in sequences
    steps: torch.Tensor  # (B,) the denoising steps in which the network ran for this example
    loops: torch.Tensor  # (B,) the loops of all these steps together: what the answer cost
    trace: list  # if asked for, a dict for each step that ran: x, revealed, sure (B, N), loops (B,)


@torch.no_grad()
def sample(
    model, x, editable=None, steps=1, order="confidence", loops=None, eps=0.0,
    threshold=None, temperature=None, noise=0.0, later_loops=None, give_up=None, generator=None, trace=False,
):
    """Fill in the editable positions of x (B, N) in T = `steps` denoising steps, eq. (6).

    editable     (B, N) bool, True = start from MASK and fill in; False never changes. Default: x == MASK
    order        "ancestral" is the exact reverse process. The others reveal ceil(masked / steps left) tokens
                 in each step: those of the highest top probability ("confidence"), of the largest gap between
                 the two likeliest tokens ("margin"), of the lowest "entropy", or "random" ones
    loops, eps   loops in each step; with eps at most so many, see RMDM.infer
    threshold    ours: each step also reveals all tokens whose top probability reaches it, to save steps
    temperature  1 draws tokens from p_theta, 0 takes the likeliest. Default: 1 in ancestral order, else 0.
                 The order is always judged at temperature 1
    noise        ours: on h^0, drawn anew at every step, eq. (8)
    later_loops  ours: each step after the first goes on from the h of the step before, with so many loops. It
                 needs `inject`. Default: every step begins at h^0, with `loops` loops, as in the paper
    give_up      ours: a function of x (B, N) that returns (B,) bool after each step. Examples with True end,
                 perhaps with MASKs left. A task ends so what cannot come right any more

    An example costs nothing once it is full, nor in an ancestral step that reveals none of its tokens."""
    editable = x == MASK if editable is None else editable
    counts = dict(steps=steps, loops=loops, later_loops=later_loops)
    sizes = dict(eps=eps, noise=noise, temperature=temperature, threshold=threshold)
    check_sampling(model, x, editable, order, counts, sizes)
    temperature = float(order == "ancestral") if temperature is None else temperature
    x, masked = torch.where(editable, MASK, x), editable  # a MASK that is not editable stays
    used_steps, used_loops, history = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    last_h = torch.zeros(*x.shape, model.config.width, device=x.device) if later_loops else None  # ours
    for left in range(steps, 0, -1):
        if order == "ancestral":  # what is revealed does not depend on the network
            t, s = torch.tensor([left, left - 1], dtype=torch.float64, device=x.device) / steps
            reveal = reveal_ancestral(masked, t, s, generator)
            i = reveal.any(1).nonzero()[:, 0]  # the examples that need the network
            t = t.float().expand(len(i))
        else:  # ordered steps ignore the schedule, so t is the one at which as large a share is masked
            i = masked.any(1).nonzero()[:, 0]
            t = alpha_inverse(1 - masked[i].sum(1) / editable[i].sum(1))
        if not len(i):
            continue
        go_on = later_loops and left < steps  # ours
        L, start = (later_loops, (last_h[i], used_loops[i])) if go_on else (loops, None)
        with autocast(x.device):
            logits, h, used = model.infer(x[i], t, L, eps, noise, generator, start)
        if later_loops:
            last_h[i] = h
        p = logits.double().softmax(-1)  # p_theta(x0 | x_t)
        require(p.isfinite().all(), "the model's logits are not finite")
        if order != "ancestral":
            reveal = torch.zeros_like(masked)
            reveal[i] = reveal_ordered(masked[i], p, left, order, threshold, generator)
        token = p.argmax(-1)  # (6): the likeliest token, or one drawn from p_theta
        if temperature:
            drawn = (logits.double() / temperature).softmax(-1).flatten(0, 1)
            token = torch.multinomial(drawn, 1, generator=generator).view(token.shape)
        x[i] = torch.where(reveal[i], token, x[i])
        masked = masked & ~reveal
        if give_up is not None:  # ours
            masked = masked & ~give_up(x)[:, None]
        used_steps[i] += 1
        used_loops[i] += used
        if trace:
            sure, spent = p.new_zeros(x.shape), torch.zeros_like(x[:, 0])
            sure[i], spent[i] = p.amax(-1), used
            history.append(dict(x=x.clone(), revealed=reveal, sure=sure, loops=spent))
    return Filled(x, used_steps, used_loops, history)


def check_sampling(model, x, editable, order, counts, sizes):
    check_batch(x, editable)
    V = model.config.vocab
    require(not x.numel() or 0 <= x.min() and x.max() < V, f"x has a token that is not from 0 to {V - 1}")
    require(order in ORDERS, f"order is one of {', '.join(ORDERS)}, not {order!r}")
    good = all(1 <= n <= 10**6 for n in counts.values() if n is not None)
    require(good, "steps, loops and later_loops are from 1 to a million")
    good = all(0 <= size < math.inf for size in sizes.values() if size is not None)
    require(good, "eps, noise, temperature and threshold are finite, and at least 0")
    later_loops = counts["later_loops"]
    plain = sizes["threshold"] is None and later_loops is None
    require(plain or order != "ancestral", "threshold and later_loops need an order other than ancestral")
    require(later_loops is None or model.config.inject, "later_loops needs a model with inject=true")


# ---- 5. Ours: carried examples ----

def carried_loss(
    model, x0, editable, kept, oldest, grad_loops, objective="simple", supervise="all", generator=None
):
    """Like `loss`, but an example stays for several training steps. The idea is TRM's, arXiv 2510.04871.

    `kept` is a dict, empty at first. From call to call it keeps the examples, which of their tokens are
    masked, and their h. A call runs `grad_loops` loops of each example, from the h that was kept. An example
    leaves when all its masked tokens are right, or when it has had `oldest` loops or more. In the next call
    row i of x0 fills place i if that is free, and is thrown away if not.

    Two things change. An example gets many loops though a training step pays for few. And hard examples stay
    longer than easy ones, so that the value is no estimate of (3) or (4)."""
    t = sample_t(len(x0), generator, x0.device)
    x_t, masked = corrupt(x0, t, editable, generator)
    examples = dict(x0=x0, x_t=x_t, masked=masked, editable=editable)
    had, start = torch.zeros_like(x0[:, 0]), None
    if kept:
        had = kept["l"]  # the loops that each kept example has had; 0: its place is free
        sizes = f"a batch of {len(x0)} after one of {len(had)}"
        require(len(had) == len(x0), f"{sizes}: carried examples need equal ones")
        stays, start = had > 0, (kept["h"], had)
        examples = {key: torch.where(stays[:, None], kept[key], new) for key, new in examples.items()}
        t = torch.where(stays, kept["t"], t)
    x0, x_t, masked, editable = examples.values()
    options = dict(supervise=supervise, loops=grad_loops, start=start)
    nats, right, h = masked_nats(model, x0, x_t, masked, t, **options)
    had = had + grad_loops
    leaves = (right | ~masked).all(1) | (had >= oldest)
    kept.update(examples, t=t, h=h, l=torch.where(leaves, 0, had))
    return per_token(WEIGHTS[objective](t) * nats, right, masked, editable)


# ---- 6. Training and checkpoints ----

@dataclass
class TrainConfig:
    """The training. The papers' optimizer, rates and averaging are unknown to us. Those here are ours."""

    steps: int = 4000  # some minutes of one core for a small model
    batch: int = 32
    objective: str = "simple"  # eq. (4), of another paper than R-MDM; or elbo, eq. (3)
    supervise: str = "all"  # eq. (5): the loss at all loops (deep supervision), or at the final one
    grad_loops: int = 0  # eq. (5): only the last so many loops have gradient (needs inject or carry); 0 = all
    loops_min: int = 0  # LoopMDM, eq. (7): each step draws from loops_min..loops; 0 = always `loops`
    carry: int = 0  # ours: an example stays until it is right, or for so many loops; 0 = for one step
    muon: bool = True  # for the matrices inside the layers; with AdamW alone learning was slower
    lr: float = 0.02  # of Muon; best of three in short runs with the loss at all loops. Else try less
    lr_rest: float = 4e-3  # of AdamW, for the other parameters: a fifth of lr; without Muon for all
    warmup: int = 100  # steps in which the rate rises; it falls linearly all the time, to zero after the last
    weight_decay: float = 0.01  # of both optimizers; torch's default for AdamW
    clip: float = 1.0  # largest norm of the gradient, the usual one
    ema: float = 0.999  # decay of the averaged weights (EMA), which are what is used in the end
    seed: int = 0
    eval_every: int = 1000  # steps; one evaluation takes seconds
    save_every: int = 250  # steps; a stop costs half of that, on average

    def __post_init__(self):
        for key in ("steps", "batch", "warmup", "eval_every", "save_every"):
            require(1 <= getattr(self, key) <= 10**9, f"{key} is from 1 to a billion")
        for key in ("lr", "lr_rest", "clip"):
            require(0 < getattr(self, key) < math.inf, f"{key} is above 0")
        require(self.objective in WEIGHTS, "objective is simple or elbo")
        require(self.supervise in ("all", "final"), "supervise is all or final")
        require(0 <= self.weight_decay < math.inf, "weight_decay is at least 0")
        require(0 <= self.ema < 1, "ema is from 0 to below 1")
        require(0 <= self.seed < 2**32, "seed is from 0 to below 2**32")
        least = min(self.grad_loops, self.loops_min, self.carry)
        require(least >= 0, "grad_loops, loops_min and carry are at least 0")
        alone = not self.loops_min and 0 < self.grad_loops <= self.carry
        require(not self.carry or alone, "carry needs loops_min=0 and a grad_loops from 1 to carry")


def autocast(device):
    """A context in which torch multiplies matrices in bfloat16, where the hardware is faster that way."""
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else fast
    # No cache: each loop casts the weights anew, so that their gradients add up in float32. And up to
    # torch 2.9 a weight that was cast in a loop without gradient got none in the other loops.
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


def unwrap(model):
    """The RMDM inside what torch.compile or DistributedDataParallel made of it."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return model if inner is None else unwrap(inner)


def make_optimizers(model, training):
    """AdamW, and Muon for the matrices inside the layers. Their learning rates are the peaks."""
    inside, rest = [], []
    for name, w in unwrap(model).named_parameters():
        matrix = training.muon and w.ndim == 2 and name.startswith(("head.", "block.", "tail."))
        (inside if matrix else rest).append(w)
    decay = training.weight_decay
    optimizers = [torch.optim.AdamW(rest, lr=training.lr_rest, weight_decay=decay, fused=True)]
    if inside:
        optimizers.append(torch.optim.Muon(inside, lr=training.lr, weight_decay=decay))
    return optimizers


def update(value, model, average, optimizers, training, step):
    """One optimizer step on the loss `value`, and one of the moving average. Returns the gradient's norm."""
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    scale = min(step / training.warmup, 1) * (1 - (step - 1) / training.steps)  # warm-up, then decay to zero
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = scale * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    decay = min(training.ema, step / (step + 10))  # over fewer steps at first, to forget the initialization
    with torch.no_grad():
        for old, new in zip(average.parameters(), model.parameters()):
            old.lerp_(new, 1 - decay)
    return norm


def save(path, content):
    """torch.save, atomically: the file is whole under its name, or not there."""
    buffer, part = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    torch.save(content, buffer)  # to memory: a full disk is then a plain OSError
    try:
        with open(part, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path):
    """What `save` wrote. Nothing in the file can run code. Raises BadInput if a checksum is wrong."""
    require(Path(path).is_file(), f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch skips a record that is marked as a folder, and memory that nobody wrote would be loaded.
            plain = all(r.compress_type == r.external_attr == 0 for r in archive.infolist())
            require(plain and not archive.testzip(), "a checksum is wrong, or a record is no plain one")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged bytes can raise anything
        raise BadInput(f"{path}: damaged, or not written by rmdm ({type(e).__name__})") from e


def load(path, device="cpu", task=None):
    """A model ready to use, with averaged weights. path: a run's folder, model.pt or checkpoint.pt.

    model.about is what was given to `train`. Raises BadInput for a damaged file, or another task's."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    saved = read(path)
    try:
        made_for, weights = saved["about"].get("task"), saved["ema"]
        require(isinstance(saved["config"]["coords"], (list, tuple)), "coords is no list")
        config = Config(**saved["config"])
        with torch.device("meta"):  # takes no memory, however large the sizes in the file are
            RMDM(config).load_state_dict(weights, assign=True)
        require(all(w.isfinite().all() for w in weights.values()), "a weight is not finite")
        model = RMDM(config)
        model.load_state_dict(weights)
    except Exception as e:  # of another program or version
        why = " ".join(str(e).split())[:100]
        raise BadInput(f"{path}: weights and configuration do not fit ({why})") from e
    require(task in (None, made_for), f"{path}: made for {str(made_for)[:40]!r}, not for {task}")
    model.about = saved["about"]
    return model.to(device).eval()


def begin(out, config, training, about=None, resume=False):
    """The settings of a run in the folder `out`, and the checkpoint that it goes on from, {} for a new run.

    Raises BadInput for settings that do not fit, for a folder in use, and for a resumed run that was begun
    with other settings. `train` calls it, and a script calls it before it makes data."""
    low, L = training.loops_min, config.loops
    require(low <= L, f"loops_min={low} is above loops={L}")
    truncated = 0 < training.grad_loops < L and not training.carry
    needed = "grad_loops below loops needs inject=true: else E gets no gradient"
    require(config.inject or not truncated, needed)
    settings, out = dict(config=asdict(config), train=asdict(training), about=about or {}), Path(out)
    settings = json.loads(json.dumps(settings))  # plain numbers, strings and lists, as read back
    if not resume:
        used = out.exists() and any(path.suffix != ".part" for path in out.iterdir())
        choice = "resume its run (--resume, resume=True) or choose another (--out, out)"
        require(not used, f"{out} is in use: {choice}")
        return settings, {}
    saved = read(out / "checkpoint.pt")
    for part, new in settings.items():
        for key in new | saved[part]:
            old, now = saved[part].get(key), new.get(key)
            shown = f"{key}={str(old)[:40]}, not {str(now)[:40]}"
            require(old == now, f"{out}: the run was begun with {shown}")
    return settings, saved


def facts(model, settings):
    """The first line of a log."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} {platform.machine()}"
    machine = dict(device=name, torch=torch.__version__, threads=torch.get_num_threads())
    machine |= dict(step=0, parameters=sum(w.numel() for w in model.parameters()))
    parts = settings["about"] | settings["train"] | settings["config"]
    return machine | parts | dict(coords=len(model.coords))


def write_line(path, entry, mode="a"):
    with open(path, mode) as log:
        print(json.dumps(entry, default=float), file=log)


class Run:
    """What a training run consists of. It can be saved, and gone on with."""

    def __init__(self, model, training, out, settings):
        self.model, self.out, self.settings = unwrap(model), Path(out), settings
        device = next(self.model.parameters()).device
        self.average = copy.deepcopy(self.model).eval()
        self.optimizers = make_optimizers(self.model, training)
        self.generator = torch.Generator(device).manual_seed(training.seed)  # of all that is random below
        self.kept, self.step, self.seconds, self.log = {}, 0, 0.0, self.out / "log.jsonl"

    def save(self, last):
        content = self.settings | dict(step=self.step, seconds=self.seconds, ema=self.average.state_dict())
        if last:  # before the checkpoint: one of the last step says that the run is finished
            save(self.out / "model.pt", content)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        content |= dict(model=self.model.state_dict(), optimizers=optimizers, kept=self.kept)
        content |= dict(rng=self.generator.get_state(), log_bytes=self.log.stat().st_size if self.step else 0)
        save(self.out / "checkpoint.pt", content)

    def restore(self, saved):
        same = len(saved["rng"]) == len(self.generator.get_state())
        require(same, f"{self.out}: begun on another kind of device")
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.generator.set_state(saved["rng"])
        self.kept |= {key: x.to(self.generator.device) for key, x in saved["kept"].items()}
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["ema"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if self.step:
            os.truncate(self.log, saved["log_bytes"])  # steps after the checkpoint will come again

    def create(self):
        self.out.mkdir(parents=True, exist_ok=True)
        self.save(last=False)


def train(model, training, batch, evaluate, out, about=None, resume=False):
    """Train `model` in place. Returns its moving average (EMA), which is the model to use.

    batch(n, generator)  -> x0 (n, N) int64, editable (n, N) bool, on the model's device
    evaluate(model)      -> dict of numbers for the log. It gets the average, every `eval_every` steps and at
                         the end
    out                  a new folder. model.pt: the average, to use. checkpoint.pt: all that a resumed run
                         needs. log.jsonl: the settings, then the course of training
    about                plain facts to keep in the checkpoint, such as the task and its options
    resume               go on from `out`. model, training and about must be as they were. On a CPU the run
                         ends with the same bits as one never interrupted, if `batch` draws all from its
                         generator"""
    settings, saved = begin(out, unwrap(model).config, training, about, resume)
    run, L = Run(model, training, out, settings), unwrap(model).config.loops
    device, generator = run.generator.device, run.generator
    options = {key: getattr(training, key) for key in ("objective", "supervise", "grad_loops")}

    def compute(x0, editable, loops, kept):
        with autocast(device):
            if training.carry:
                return carried_loss(model, x0, editable, kept, training.carry, **options, generator=generator)
            return loss(model, x0, editable, **options, loops=loops, generator=generator)

    for part in run.out.glob("*.part"):  # left by a run that was killed
        part.unlink()
    if saved:
        run.restore(saved)
    else:
        with torch.no_grad():  # a trial, so that a mistake shows before there is a folder
            compute(*batch(1, torch.Generator(device)), L, {})
        generator.manual_seed(training.seed)
        run.create()
    if not run.step:  # mode x fails if another run has just begun in this folder
        write_line(run.log, facts(run.model, settings), "w" if resume else "x")
    recent, clock = [], time.perf_counter()
    steps = range(run.step + 1, training.steps + 1)
    with progress(steps, initial=run.step, total=training.steps, unit="step") as bar:
        for step in bar:
            run.step, loops = step, L
            if 0 < training.loops_min < L:  # (7)
                loops = int(torch.randint(training.loops_min, L + 1, (), generator=generator, device=device))
            value, accuracy = compute(*batch(training.batch, generator), loops, run.kept)
            norm = update(value, run.model, run.average, run.optimizers, training, step)
            recent.append(torch.stack([value.detach(), accuracy, norm]))
            last = step == training.steps
            evaluating = last or step % training.eval_every == 0
            saving = last or step % training.save_every == 0
            if not (evaluating or saving or step % 25 == 0):
                continue
            mean, recent = torch.stack(recent).mean(0).tolist(), []
            run.seconds += time.perf_counter() - clock  # of training alone
            bad = f"the loss became {mean[0]}, its gradient {mean[2]}, by step {step}"
            require(math.isfinite(mean[0] + mean[2]), f"{bad}; the checkpoint in {out} is from before")
            bar.set_postfix(loss=f"{mean[0]:.4f}", accuracy=f"{mean[1]:.3f}", refresh=False)
            scores = evaluate(run.average) if evaluating else {}
            entry = dict(step=step, loss=mean[0], accuracy=mean[1], **scores)
            write_line(run.log, entry | dict(seconds=round(run.seconds, 1)))
            if scores:
                shown = (f"{key} {value:.4g}" for key, value in scores.items())
                bar.write(f"step {step}: loss {mean[0]:.4f}  {'  '.join(shown)}")
            if saving:
                run.save(last)
            clock = time.perf_counter()
    return run.average


# ---- 7. What the scripts share ----

def progress(iterable=None, **options):
    """A tqdm bar. Where the output is no terminal it is drawn twice a minute."""
    return tqdm(iterable, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


def read_text(path, file=None, size=2**28):
    """The text at a path, which may be a pipe, or in a binary file that is open and is called `path`.

    Raises BadInput if there is none, if it is compressed or no UTF-8, or if it has more than `size` bytes."""
    try:
        with file or open(path, "rb") as file:
            data = file.read(2**16)  # first the beginning: /dev/zero has no end
            packed = re.match(rb"\x1f\x8b|PK[\3\5]|BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd", data)
            require(not packed, f"{path}: compressed, unpack it first")
            zeros = [half.count(0) > len(half) / 2 for half in (data[::2], data[1::2])]
            wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or zeros[0] != zeros[1]
            require(not wide, f"{path}: UTF-16, not UTF-8 text, save it as UTF-8")
            data += b"" if 0 in data else file.read(size + 1 - len(data))
        require(len(data) <= size, f"{path}: more than {size >> 20} MiB, split it")
        return data.replace(b"\0", b"\xff").decode("utf-8-sig")  # a NUL is no text, either
    except OSError as e:
        raise BadInput(f"{path}: {(e.strerror or str(e)).lower()}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text") from None


def data_text(about):
    """The text of the file about["data"]. Its checksum is kept in `about`.

    Raises BadInput if a resumed run had other data."""
    text = read_text(about["data"])
    checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
    old = about.setdefault("sha256", checksum)
    require(old == checksum, f"{about['data']}: not the file that the run was begun with")
    return text


def tell_skipped(skipped):
    """One line about the rows of a file that were skipped: {reason: how many}."""
    if sum(skipped.values()):
        reasons = ", ".join(f"{n} with {reason}" for reason, n in skipped.items() if n)
        print(f"rows skipped: {reasons}", file=sys.stderr)


def pick_device(name=None):
    """The torch.device called `name`, cpu or cuda; by default cuda if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    require(name == "cpu" or torch.cuda.is_available(), "torch finds no CUDA device here")
    return torch.device(name)


def set_threads(training):
    """Sets how many threads torch uses on the CPU, unless OMP_NUM_THREADS does.

    At most four, since more are slower for matrices as small as ours. Beside other busy processes threads
    wait for each other, which is slower than one alone. So sampling takes as many as there are free cores.
    Training takes them all whatever else runs, since its results depend on the number, and prints advice."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        busy = min(cores, round(os.getloadavg()[0]))  # how many processes ran, in the last minute
    except (AttributeError, OSError):  # not known on this system
        busy = 0 if training else cores
    threads, free = min(4, cores), max(cores - busy, 1)
    torch.set_num_threads(threads if training else min(threads, free))
    if training and free < threads:
        advice = f"OMP_NUM_THREADS={free} in front of this command may train faster"
        print(f"{busy} of {cores} cores are busy: {advice}")


def training_parser(doc, presets, out):
    """The command line that the training scripts share."""
    parser = argparse.ArgumentParser(
        description=doc, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=presets, help="paper: the papers' form; default: see above")
    add("--paper", action="store_const", const="paper", dest="preset", help="the same as --preset paper")
    pairs = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    add("--set", **pairs, help="change fields of the preset")
    add("--data", metavar="FILE", help="take the examples from a file; default: they are generated")
    add("--seed", type=int, default=0, help="of data, initialization and training (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    add("--out", metavar="RUN", default=out, help="a new folder for the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in that folder")
    return parser


def resumed_settings(parser, args, task):
    """(config, training, about) of the run in args.out. Other options may not be given beside --resume."""
    given = {key for key, value in vars(args).items() if value != parser.get_default(key)}
    extra = sorted(given - {"resume", "out", "device"})
    names = ", --".join(extra)
    require(not extra, f"--resume takes the options that the run was begun with: leave out --{names}")
    path = Path(args.out) / "checkpoint.pt"
    saved = read(path)
    try:
        require(saved["about"]["task"] == task, f"{path}: not a run of {task}")
        return Config(**saved["config"]), TrainConfig(**saved["train"]), saved["about"]
    except (TypeError, KeyError) as e:
        raise BadInput(f"{path}: written by another version ({str(e)[:100]})") from None


def train_in(out, *arguments, **options):
    """`train` in the folder `out`. Ctrl-C is answered with the command that goes on."""
    try:
        return train(*arguments, out=out, **options)
    except KeyboardInterrupt:
        if not (Path(out) / "checkpoint.pt").exists():
            raise
        command = f"python {Path(sys.argv[0]).name} --resume --out {shlex.quote(str(out))}"
        raise KeyboardInterrupt(f"stopped; to go on: {command}") from None


def override(pairs, *configs):
    """New dataclasses, like `configs`, with the fields changed that "name=value" strings name."""
    fixed = ("vocab", "coords", "seed")  # given by the task, or by an option of the script
    kinds = {f.name: type(getattr(c, f.name)) for c in configs for f in fields(c) if f.name not in fixed}
    changes = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        require(name in kinds, f"no field {name[:80]!r}; there are {', '.join(kinds)}")
        try:
            convert = {"true": True, "false": False}.__getitem__ if kinds[name] is bool else kinds[name]
            changes[name] = convert(text.lower())
        except (ValueError, KeyError):
            raise BadInput(f"{name} must be of type {kinds[name].__name__}, not {text[:80]!r}") from None
    return [replace(c, **{name: changes[name] for name in changes if hasattr(c, name)}) for c in configs]


def run_script(main):
    """Run a script's main(): bad input is one line and exit code 2, Ctrl-C one line and exit code 130."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (BadInput, OSError, MemoryError, torch.OutOfMemoryError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print(e.args[0] if e.args else "stopped", file=sys.stderr)
        sys.exit(130)
