"""Recursive Masked Diffusion Models (R-MDM): all of it in this file.

A masked diffusion model fills in MASK tokens over T denoising steps. R-MDM applies the same denoising
transformer L times inside each step, so depth grows without parameters. This works on any sequence of
discrete tokens: the file needs only PyTorch and tqdm, and can be copied alone.

References
    [R]  Recursive Masked Diffusion Models, arXiv 2606.18022
    [L]  LoopMDM: selective looping, adaptive loop count, arXiv 2605.26106
    [S]  Scaling Beyond Masked Diffusion Language Models, arXiv 2602.15014 (the "simple" objective)
    [M]  Simplified and Generalized Masked Diffusion, arXiv 2406.04329; MDLM, arXiv 2406.07524 (eqs. 1, 3)
    [J]  Muon, https://kellerjordan.github.io/posts/muon (the optimizer)
    [K]  Train for the Worst, Plan for the Best, arXiv 2502.06768 (the order matters: margin)

Map: equation numbers (1) to (7) are this project's own; the README lists them.
    1. Schedule and forward process    eqs. (1), (3)    alpha, nelbo_weight, sample_t, corrupt
    2. Recursive transformer           eqs. (2), (7)    Config, Layer, RMDM
    3. Loss                            eqs. (3) to (5)  supervised, masked_ce, loss, nelbo
    4. Sampler                         eqs. (6), (7)    certainty, sample, sample_all
    5. Training loop, checkpoints                       TrainConfig, Muon, pick_device, save, load, train
    6. Command line of the training scripts             configure, grid, by_noise, launch, cli

Shapes: B examples, N positions, d width, V tokens (MASK included), K layers in the shared block, L loops,
T denoising steps. x0 (B, N) int64 clean tokens; x_t the same, partly MASK; t (B,) in (0, 1]; `editable`
(B, N) bool, True = may be masked: clues, prompts and padding are False and never change.
"""

import argparse
import copy
import ctypes
import io
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# Before torch is imported: a thread that waits for another one goes to sleep sooner. By default it spins for
# so long that, next to any other busy process, two threads are slower than one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

MASK = 0  # the mask token; task tokens are 1..V-1


class BadInput(ValueError):
    """What the person at the keyboard can mend: told in one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------
# 1. Schedule and forward process, eqs. (1) and (3)
# ---------------------------------------------------------------------------------------------------


def alpha(t):
    """Probability that a token is still visible at time t: linear, alpha_t = 1 - t, eq. (1)."""
    return 1 - t


def nelbo_weight(t):
    """-alpha'_t / (1 - alpha_t), eq. (3). With alpha_t = 1 - t the derivative is -1, so this is 1/t."""
    return 1 / (1 - alpha(t))


def sample_t(n, generator=None, device=None):
    """n times in (0, 1], one in each of n equal strata: uniform, with less variance than n free draws."""
    u = torch.rand(n, generator=generator, device=device)
    stratum = torch.randperm(n, generator=generator, device=device)  # else row i would always get the i-th
    return (1 - (stratum + u) / n).clamp(min=2**-24)  # rounding could give 0, where (3) has no weight


def corrupt(x0, t, editable, generator=None):
    """Forward process, eq. (1): each editable token becomes MASK independently with probability 1 - alpha_t.

    Returns x_t (B, N) and `masked` (B, N) bool, True = is MASK now and was not given."""
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    masked = editable & (u < 1 - alpha(t)[:, None])
    return torch.where(masked, MASK, x0), masked


# ---------------------------------------------------------------------------------------------------
# 2. Recursive transformer, eqs. (2) and (7)
# ---------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """The model. Everything here travels in a checkpoint.

    coords gives each position its coordinates, one embedding table per axis, summed (our choice: on
    Sudoku a single table of 81 solves a third fewer, see the README). An int n stands for a plain sequence of
    n positions, one axis."""

    vocab: int  # V: tokens, MASK included
    coords: tuple  # N rows of as many integers as there are axes, or an int N
    width: int = 64  # d: what a CPU trains in minutes
    heads: int = 2  # attention heads, of 32 dimensions at d = 64: fewer and wider is faster on a CPU
    layers: int = 1  # K: layers of the shared block
    loops: int = 8  # L: loops in training (the largest, if sampled) and, by default, in sampling
    head_layers: int = 0  # layers run once before the loops, eq. (7); 0 is R-MDM
    tail_layers: int = 0  # layers run once after the loops, eq. (7); 0 is R-MDM
    loop_embedding: bool = True  # v^l of eq. (2); beyond the trained L the last one repeats (our choice)
    loop_norm: bool = True  # Norm of eq. (2)
    time: bool = False  # t enters f; off: the number of MASKs already tells t
    inject: bool = False  # add h^0 again at every loop; not in the paper
    coord_bias: bool = False  # attention favours, or shuns, positions that share a coordinate; not in the paper

    def __post_init__(self):
        try:
            coords = torch.as_tensor(self.coords)
            coords = coords if coords.ndim else torch.arange(coords)[:, None]
        except (TypeError, ValueError, RuntimeError):
            coords = torch.empty(0)
        if coords.ndim != 2 or not coords.numel() or coords.is_floating_point() or coords.min() < 0:
            raise BadInput("coords needs a row of integers from 0 for each position, as many in each row")
        self.coords = tuple(map(tuple, coords.tolist()))  # plain integers: all that a checkpoint may hold
        if min(self.width, self.heads, self.layers, self.loops) < 1 or self.width % self.heads:
            raise BadInput("width, heads, layers and loops are at least 1, and heads divides width")
        if min(self.head_layers, self.tail_layers) < 0:
            raise BadInput("head_layers and tail_layers are at least 0")


class Layer(nn.Module):
    """One bidirectional pre-norm transformer layer, (B, N, d) -> (B, N, d).

    With axes > 0 a learned number for each head and axis is added to the attention logits of two positions that
    share their coordinate on that axis: same (axes, N, N), 1 where they do, else 0."""

    def __init__(self, width, heads, axes=0):
        super().__init__()
        self.heads = heads
        # Every second head begins by favouring such positions, the others by shunning them: what a lucky seed
        # finds from random numbers, and an unlucky one does not.
        sign = (1.0 - 2 * (torch.arange(heads) % 2)).view(heads, 1, 1, 1)
        self.bias = nn.Parameter(sign.repeat(1, axes, 1, 1)) if axes else None
        self.norm1 = nn.LayerNorm(width)  # LayerNorm: torch fuses it on every device, RMSNorm not on CPU
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h, same=None):
        B, N, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, N, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if self.bias is None else (self.bias * same).sum(1).to(q.dtype)  # (heads, N, N)
        if h.device.type == "cpu":  # for short sequences faster than torch's kernels, see pick_device
            a = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            a = (a if bias is None else a + bias).softmax(-1) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v, bias)
        h = h + self.out(a.transpose(1, 2).reshape(B, N, d))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class RMDM(nn.Module):
    """The denoiser p_theta(x0 | x_t) of eq. (2):

        h^0 = E(x_t, t)
        h^l = f_theta(Norm(h^{l-1} + v^l), t),   l = 1..L,   f: K layers, the same for all loops
        p_theta(x0 | x_t) = softmax D(h^L)

    and of eq. (7), where head layers end E and tail layers begin D, so that a read-off after any loop
    means: tail layers, Norm, linear map. Only h carries information from loop to loop.

    Our choices: with `time`, sinusoids of t through a linear map are added to h^0 and to h at every loop;
    the initialization below."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.register_buffer("coords", torch.tensor(c.coords), persistent=False)  # (N, axes)
        axes = self.coords.shape[1] if c.coord_bias else 0
        same = (self.coords == self.coords[:, None]).permute(2, 0, 1).float() if axes else None  # (axes, N, N)
        self.register_buffer("same", same, persistent=False)
        self.token = nn.Embedding(c.vocab, c.width)
        self.place = nn.ModuleList(nn.Embedding(n, c.width) for n in (self.coords.amax(0) + 1).tolist())
        if c.time:
            self.time = nn.Linear(16, c.width)
        self.head = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.head_layers))
        self.block = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.layers))
        self.tail = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.tail_layers))
        if c.loop_embedding:
            self.loop = nn.Embedding(c.loops, c.width)
        self.loop_norm = nn.LayerNorm(c.width) if c.loop_norm else nn.Identity()
        self.norm = nn.LayerNorm(c.width)
        self.unembed = nn.Linear(c.width, c.vocab - 1)  # no logit for MASK
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.5)  # token and three coordinates together: about 1
        nn.init.zeros_(self.unembed.weight)  # start from equal probabilities
        if c.loop_embedding:
            nn.init.zeros_(self.loop.weight)  # start with all loops alike

    def encode(self, x_t, t):
        """E: h^0 (B, N, d), and the time vector (B, 1, d) that every loop gets as well (None without time)."""
        h = self.token(x_t) + sum(table(self.coords[:, i]) for i, table in enumerate(self.place))
        c = None
        if self.config.time:
            angle = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 7, device=t.device)
            c = self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None]
            h = h + c
        for layer in self.head:
            h = layer(h, self.same)
        return h, c

    def recur(self, h, l, h0, c):
        """One loop of eq. (2): h^{l-1} -> h^l, l counted from 1."""
        if c is not None:
            h = h + c
        if self.config.loop_embedding:
            h = h + self.loop.weight[min(l, self.config.loops) - 1]
        if self.config.inject:
            h = h + h0
        h = self.loop_norm(h)
        for layer in self.block:
            h = layer(h, self.same)
        return h

    def decode(self, h):
        """D: (B, N, d) -> logits (B, N, V); MASK has -inf, that is, no probability."""
        for layer in self.tail:
            h = layer(h, self.same)
        return F.pad(self.unembed(self.norm(h)), (1, 0), value=-math.inf)

    def infer(self, x_t, t, loops=None, eps=0.0):
        """For sampling: logits (B, N, V) of the last loop and the loops used (B,).

        eps > 0 stops an example at loop k once ||h^k - h^{k-1}|| / ||h^k|| < eps, eq. (7); `loops` is the
        limit then. An example that stops costs nothing more."""
        loops = loops or self.config.loops
        if not eps:
            return self(x_t, t, loops)[0], torch.full_like(x_t[:, 0], loops)
        h0, c = self.encode(x_t, t)
        h, used = h0.clone(), torch.zeros_like(x_t[:, 0])
        going = torch.arange(len(x_t), device=x_t.device)
        for l in range(1, loops + 1):
            old = h[going]
            new = self.recur(old, l, h0[going], None if c is None else c[going])
            h[going], used[going] = new, l
            change = (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
            going = going[change >= eps]
            if not len(going):
                break
        return self.decode(h), used

    def flops(self, loops, reads=1):
        """Floating-point operations of one example's forward pass with `reads` read-offs (matrix products)."""
        c, N = self.config, len(self.coords)
        layer = N * (24 * c.width**2 + 4 * N * c.width)
        layers = c.head_layers + loops * c.layers + reads * c.tail_layers
        return layers * layer + reads * N * 2 * c.width * (c.vocab - 1)

    def forward(self, x_t, t, loops=None, read=None, grad_from=1):
        """Logits (len(read), B, N, V) after the loops named in `read`, counted from 1 (default: the last). Loops
        before `grad_from` run without gradient."""
        loops = loops or self.config.loops
        read = read or (loops,)
        h0, c = self.encode(x_t, t)
        h, out = h0, []
        for l in range(1, loops + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and l >= grad_from):
                h = self.recur(h, l, h0, c)
            if l in read:
                out.append(h)
        return self.decode(torch.cat(out)).view(len(out), *x_t.shape, -1)


# ---------------------------------------------------------------------------------------------------
# 3. Loss, eqs. (3) to (5)
# ---------------------------------------------------------------------------------------------------


def supervised(supervise, loops):
    """The loops whose read-off is in the loss, eq. (5), all with equal weight: a range, counted from 1. And the
    first loop with gradient.

    supervise: "all"; "final", the last, with gradient through all loops; or a number M: the last M, and those
    before run without gradient. That is our reading of the paper's "truncated" supervision: it needs injection,
    or else E has no gradient, and it makes each loop beyond the M nearly three times cheaper."""
    supervise = str(supervise)
    if not re.fullmatch("all|final|0*[1-9][0-9]{0,5}", supervise):
        raise BadInput(f"supervise is all, final or a number from 1, not {supervise[:40]!r}")
    last = {"all": loops, "final": 1}.get(supervise) or int(supervise)
    read = range(max(loops - last, 0) + 1, loops + 1)
    return read, 1 if supervise == "final" else read[0]


def masked_ce(model, x0, editable, t, loops, read, generator, grad_from=1):
    """Mask x0 at times t (B,) and take -log p_theta(x0^i | x_t), zero where not masked, after each loop in
    `read`: (len(read), B, N) nats; no gradient before loop `grad_from`. Also returns the share of masked tokens
    that the last gets right."""
    x_t, masked = corrupt(x0, t, editable, generator)
    logits = model(x_t, t, loops, read, grad_from).float()
    target = torch.where(masked, x0, -100)  # cross_entropy's mark for: does not count
    ce = F.cross_entropy(logits.flatten(0, 2), target.repeat(len(read), 1).flatten(), reduction="none")
    right = (logits[-1].argmax(-1) == target).sum() / masked.sum().clamp(min=1)
    return ce.view(len(read), *x0.shape), right


def loss(model, x0, editable, objective="simple", supervise="all", loops=None, generator=None):
    """Training loss: the mean over supervised loops of eq. (3) or (4), in nats per editable token.

    objective: "elbo", eq. (3), or "simple", eq. (4): the same without the weight 1/t. Both divide by the
    number of editable tokens in the batch, so that one learning rate suits both. Not by the number masked:
    that would differ by a factor of about 2; nor example by example: that is the any-order objective.
    Returns (loss, share of masked tokens that the last loop predicts right)."""
    loops = loops or model.config.loops
    read, grad_from = supervised(supervise, loops)
    t = sample_t(len(x0), generator, x0.device)
    ce, right = masked_ce(model, x0, editable, t, loops, read, generator, grad_from)
    if objective == "elbo":
        ce = ce * nelbo_weight(t)[:, None]
    return ce.sum((1, 2)).mean() / editable.sum().clamp(min=1), right


@torch.no_grad()
def nelbo(model, x0, editable, loops=None, generator=None):
    """One unbiased estimate of the NELBO, eq. (3), for each example: (B,) nats, final loop. Its mean bounds
    the mean of -log p(x0 at the editable positions | the others) from above."""
    loops = loops or model.config.loops
    t = sample_t(len(x0), generator, x0.device)
    ce, _ = masked_ce(model, x0, editable, t, loops, (loops,), generator)
    return nelbo_weight(t) * ce[0].sum(1)


# ---------------------------------------------------------------------------------------------------
# 4. Sampler, eqs. (6) and (7)
# ---------------------------------------------------------------------------------------------------

ORDERS = ("ancestral", "random", "confidence", "margin", "entropy")


def certainty(p, order):
    """How sure p (..., V) is of each position, by the name of an order: (...), the highest goes first."""
    if order == "margin":
        first, second = p.topk(2, -1).values.unbind(-1)
        return first - second
    if order == "entropy":
        return torch.xlogy(p, p).sum(-1)  # minus the entropy: the least uncertain first
    return p.amax(-1)


@dataclass
class Sample:
    """What `sample` returns. One pass = one denoising step in which the network ran for the example."""

    x: torch.Tensor  # (B, N) the filled-in sequences
    passes: torch.Tensor  # (B,) passes used
    nfe: torch.Tensor  # (B,) loops, summed over the passes
    trace: list  # if asked for, a dict a step: x (B, N), revealed (B, N) bool, sure (B, N) top probability, loops (B,)


@torch.no_grad()
def sample(
    model, x, editable=None, steps=1, order="confidence", loops=None, eps=0.0,
    threshold=None, temperature=None, generator=None, trace=False,
):
    """Fill in the editable positions of x (B, N) in T = `steps` denoising steps, eq. (6).

    editable     (B, N) bool, True = start from MASK and fill in; False never changes. Default: x == MASK.
    order        "ancestral": a masked token is revealed with probability (alpha_s - alpha_t)/(1 - alpha_t),
                 the exact reverse process. Otherwise ceil(masked / steps left) tokens a step, by the highest
                 top probability ("confidence"), the largest gap between the two likeliest ("margin") [K],
                 the lowest "entropy", or at "random". The last step reveals everything.
    loops, eps   loops per step, or at most that many with the adaptive stop of `RMDM.infer`.
    threshold    reveal besides, at every step, all whose top probability reaches it: steps then adapt.
    temperature  of the drawn tokens: 1 draws from p_theta, 0 takes the likeliest (right for puzzles).
                 Default: 1 in ancestral order, else 0. The order is always judged at temperature 1.
    generator    a torch.Generator on the model's device (for MPS, on the CPU).

    An example leaves the batch when it is full, and sits out the ancestral steps that reveal nothing of it.
    Raises BadInput for an unknown order, steps or loops < 1, temperature < 0, or a threshold in ancestral order."""
    if order not in ORDERS:
        raise BadInput(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    if steps < 1 or (loops is not None and loops < 1) or (threshold is not None and order == "ancestral"):
        raise BadInput("steps and loops are at least 1, and a threshold needs an order other than ancestral")
    if temperature is None:
        temperature = 1.0 if order == "ancestral" else 0.0
    elif not temperature >= 0:
        raise BadInput(f"temperature is at least 0, not {temperature}")
    # Draws are in float64: float32 noise is too coarse for rare tokens. MPS has no float64, so there all
    # but the network runs on the CPU.
    device, home = x.device, torch.device("cpu") if x.device.type == "mps" else x.device
    editable = (x == MASK if editable is None else editable).to(home)
    x = torch.where(editable, MASK, x.to(home))
    masked = editable.clone()  # not x == MASK: that would fill in a MASK the caller wants kept
    passes, nfe, history = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []

    def noise(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=home)

    for left in range(steps, 0, -1):
        if not masked.any():
            break
        t, s = left / steps, (left - 1) / steps
        if order == "ancestral":  # what is revealed does not depend on the network: decide it first
            reveal = masked & (noise(*x.shape) < (alpha(s) - alpha(t)) / (1 - alpha(t)))
            i = reveal.any(1).nonzero()[:, 0]
            times = torch.full((len(i),), t, device=home)
        else:  # the order leaves the schedule, so t is the share that is masked now
            i = masked.any(1).nonzero()[:, 0]
            times = masked[i].sum(1) / editable[i].sum(1)
        if not len(i):
            continue
        logits, used = model.infer(x[i].to(device), times.to(device), loops, eps)
        logits, used = logits.to(home).double(), used.to(home)
        p = logits.softmax(-1)
        sure = p.amax(-1)
        if order != "ancestral":
            score = noise(*sure.shape) if order == "random" else certainty(p, order)
            rank = score.masked_fill(~masked[i], -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            chosen = rank < -(-masked[i].sum(1, keepdim=True) // left)  # ceil(masked / steps left)
            if threshold is not None:
                chosen |= sure >= threshold
            reveal = torch.zeros_like(masked)
            reveal[i] = masked[i] & chosen
        if temperature:
            p = (logits / max(temperature, 1e-6)).softmax(-1)  # below that the division overflows
            token = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
        else:
            token = p.argmax(-1)
        x[i] = torch.where(reveal[i], token, x[i])
        masked = masked & ~reveal
        passes[i] += 1
        nfe[i] += used
        if trace:
            everyone = torch.zeros(x.shape, dtype=sure.dtype, device=home).index_copy(0, i, sure)
            history.append(dict(x=x.clone(), revealed=reveal, sure=everyone, loops=torch.zeros_like(nfe)))
            history[-1]["loops"][i] = used
    return Sample(x.to(device), passes, nfe, history)


def sample_all(model, x, editable=None, batch=128, **how):
    """`sample` in batches that fit a cache: the filled-in x (n, N), and the mean cost of an example as a
    dict: nfe (loops), layer_passes (of any layer: K a loop; head and tail once a pass), seconds (in all)."""
    began, c, outs = time.perf_counter(), model.config, []
    for i in range(0, max(len(x), 1), batch):  # one batch, an empty one, of no examples
        outs.append(sample(model, x[i : i + batch], None if editable is None else editable[i : i + batch], **how))
    x, passes, nfe = (torch.cat([getattr(out, part) for out in outs]) for part in ("x", "passes", "nfe"))
    layers = (nfe * c.layers + passes * (c.head_layers + c.tail_layers)).double().mean().item()
    seconds = time.perf_counter() - began
    return x, dict(nfe=nfe.double().mean().item(), layer_passes=layers, seconds=seconds)


# ---------------------------------------------------------------------------------------------------
# 5. Training loop and checkpoints
# ---------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """The training run."""

    steps: int = 4000
    batch: int = 32
    lr: float = 0.02  # Muon, for the matrices inside the layers
    lr_rest: float = 4e-3  # AdamW, for embeddings, norms, biases, D
    warmup: int = 100  # steps of linear warm-up; then linear decay to zero, so that the end counts
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay of the averaged weights, the ones that are evaluated and shipped
    objective: str = "simple"  # eq. (4), or "elbo", eq. (3)
    supervise: str = "all"  # eq. (5): dense, as [R] is said to be; or final; or M: the last M, no gradient before
    loops_min: int = 0  # from 1 to loops - 1: the loop count is drawn from loops_min..loops at each step, eq. (7)
    seed: int = 0
    compile: bool = True  # on CUDA, where it pays; false where Triton or a C compiler is missing
    eval_every: int = 1000  # steps; one evaluation takes seconds
    save_every: int = 500  # steps: about half a minute that a power cut may cost

    def __post_init__(self):
        supervised(self.supervise, 1)  # raises BadInput
        if self.objective not in ("simple", "elbo"):
            raise BadInput(f"objective is simple or elbo, not {self.objective!r}")
        if self.loops_min < 0 or not 0 <= self.ema < 1:
            raise BadInput("loops_min is at least 0, ema from 0 to below 1")
        if not (self.lr > 0 and self.lr_rest > 0 and self.clip > 0 and self.weight_decay >= 0):  # nan is neither
            raise BadInput("lr, lr_rest and clip are above 0, weight_decay at least 0")
        if min(self.steps, self.batch, self.warmup, self.eval_every, self.save_every) < 1:
            raise BadInput("steps, batch, warmup, eval_every and save_every are at least 1")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by five Newton-Schulz iterations [J], for 2-d weights.

    Ours in float32 because torch.optim.Muon iterates in bfloat16, which many CPUs only emulate."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("momentum", torch.zeros_like(w))
                m.lerp_(w.grad, 0.05)
                x = w.grad.lerp(m, 0.95)  # Nesterov
                wide = x.shape[0] <= x.shape[1]
                x = x if wide else x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # pushes every singular value of x towards 1
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(x if wide else x.T, alpha=-group["lr"] * max(1, w.shape[0] / w.shape[1]) ** 0.5)


def make_optimizers(model, config):
    """Muon for the matrices inside the layers, AdamW for the rest: embeddings, norms, biases, D."""
    matrices = [w for part in (model.head, model.block, model.tail) for w in part.parameters() if w.ndim == 2]
    rest = [w for w in model.parameters() if not any(w is m for m in matrices)]
    adamw = torch.optim.AdamW(rest, config.lr_rest, weight_decay=config.weight_decay, fused=True)
    return [Muon(matrices, config.lr, config.weight_decay), adamw]


def pick_device(name="auto"):
    """The torch.device to use: CUDA, else MPS, else CPU; sets what makes it fast."""
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"torch finds no {name} device here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # CUDA: TF32 where not bf16. CPU: oneDNN's matrix kernels, up to twice MKL's speed on AMD (still full
    # float32 unless the CPU has bf16 tiles); torch's fused attention is slow with them.
    torch.set_float32_matmul_precision("medium" if name == "cpu" else "high")
    if name == "cpu" and sys.platform == "linux":
        # By default glibc returns the memory of large freed tensors to the kernel and fetches it again, page
        # by page, at every step. Keeping it makes a training step 1.2 to 1.3 times as fast.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, size: None)
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: its largest value
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    return torch.device(name)


def save(path, content):
    """Write a checkpoint (or the text of a log) atomically: whole under its name, or not at all."""
    part, buffer = Path(f"{path}.part"), io.BytesIO()
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    try:
        with open(part, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:  # no room, say: make some
        part.unlink(missing_ok=True)
        raise


def read_checkpoint(path, task=None):
    """The dict that `train` saved, read with weights_only=True (nothing in it can run code).

    path: a file, or a run's folder. Raises BadInput if it is not ours, damaged, or of another task."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on odd files: one line of ours follows
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(ckpt, dict) or not {"config", "ema"} <= ckpt.keys():
            raise ValueError
    except Exception as e:  # a stranger's bytes can raise anything in the unpickler
        raise BadInput(f"{path}: not an rmdm checkpoint, or a damaged one ({type(e).__name__})") from e
    if task and ckpt.get("task") != task:
        raise BadInput(f"{path}: made for {ckpt.get('task')}, not for {task}")
    return ckpt


def load(path, device="cpu", task=None):
    """A model ready to use, with the averaged weights of a checkpoint file or a run's folder."""
    ckpt = read_checkpoint(path, task)
    try:  # prefixes: what torch.compile(model) and DataParallel put in front of names
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): w for name, w in ckpt["ema"].items()}
        c = Config(**ckpt["config"])
        if weights["token.weight"].shape != (c.vocab, c.width):  # told before anything large is allocated
            raise ValueError("other sizes")
        if c.head_layers + c.layers + c.tail_layers > len(weights):
            raise ValueError("more layers")
        model = RMDM(c)
        model.load_state_dict(weights)
    except Exception as e:
        what = " ".join(str(e).split())[:300]
        raise BadInput(f"{path}: the weights do not fit the configuration ({what})") from e
    return model.to(device).eval()


def refuse_used(out):
    """Raise BadInput if the folder `out` holds a run."""
    if (out / "checkpoint.pt").exists():
        raise BadInput(f"{out} already holds a run: go on with --resume {out}, or name another folder with --out")


def refuse_untrainable(config, training):
    """Raise BadInput where loops without gradient would keep all gradient from the embeddings, see `supervised`."""
    if not config.inject and supervised(training.supervise, config.loops)[1] > 1:
        what = f"supervise={training.supervise} of {config.loops} loops needs inject=true"
        raise BadInput(f"{what}, or the loops before keep the gradient from the embeddings: supervise=all does not")


def train(model, config, batch, evaluate, out, task="", args=None, resume=None):
    """Train `model` in place; returns the averaged (EMA) model.

    batch(n, generator) -> x0 (n, N) int64, editable (n, N) bool, on the model's device
    evaluate(model)     -> dict of numbers for the log, called on the averaged model
    out                 folder for checkpoint.pt (to resume), model.pt (averaged weights), log.jsonl
    task, args          stored in the checkpoint: the task's name, the command's arguments
    resume              a checkpoint of this very run, from read_checkpoint: on CPU the run then ends bit-identical
                        to one that was never interrupted, if batch draws from its generator alone

    Raises BadInput for a folder that holds another run, a prefix of loops that no gradient passes (see
    `supervised`), a loss that is no number, no room to write."""
    refuse_untrainable(model.config, config)
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    out = Path(out)
    if not resume:
        refuse_used(out)
    out.mkdir(parents=True, exist_ok=True)
    optimizers = make_optimizers(model, config)
    generator = torch.Generator(device).manual_seed(config.seed)  # all randomness after initialization
    ema = copy.deepcopy(model).requires_grad_(False)
    start, seconds, flops, log = 0, 0.0, 0.0, out / "log.jsonl"
    if resume:
        try:
            if Config(**resume["config"]) != model.config:  # a field added since has its default
                raise ValueError("another model")
            start, seconds, flops = resume["step"], resume["seconds"], resume["flops"]
            model.load_state_dict(resume["model"])
            ema.load_state_dict(resume["ema"])
            for optimizer, state in zip(optimizers, resume["optimizers"]):
                optimizer.load_state_dict(state)
            generator.set_state(resume["rng"])
            # drop what was logged after the checkpoint: it comes again
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # none cut short
            lines = [line for line in lines if json.loads(line)["step"] <= start]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise BadInput(f"{out}: cannot go on from this checkpoint ({' '.join(str(e).split())[:200]})") from e
        save(log, "".join(line + "\n" for line in lines))
    else:  # the log says what run it is of
        facts = dict(task=task, parameters=sum(w.numel() for w in model.parameters()), torch=torch.__version__)
        where = torch.cuda.get_device_name() if cuda else f"{device} {platform.machine()}"
        facts |= dict(device=where, threads=torch.get_num_threads(), **asdict(config), **asdict(model.config))
        facts.pop("coords")  # long, and in the checkpoint
        save(log, json.dumps(dict(step=0) | facts) + "\n")

    if cuda and config.compile:
        for layer in (*model.head, *model.block, *model.tail):
            layer.compile()  # in place: the names in a checkpoint stay as they are

    def checkpoint():
        slim = dict(
            config=asdict(model.config), task=task, args=args or {}, train=asdict(config),
            device=device.type, step=step, seconds=seconds, flops=flops, ema=ema.state_dict(),
        )
        states = dict(optimizers=[o.state_dict() for o in optimizers], rng=generator.get_state())
        if step == config.steps:  # first, since with the checkpoint the run counts as finished
            save(out / "model.pt", slim)
        save(out / "checkpoint.pt", slim | states | dict(model=model.state_dict()))

    # Ctrl-C ends the run after the step under way, so that what is saved is one consistent state; a second
    # one ends it at once. Only the main thread of a program may have it so.
    interrupted, listening = [], threading.current_thread() is threading.main_thread()
    if listening:
        handler = signal.getsignal(signal.SIGINT) or signal.default_int_handler
        signal.signal(signal.SIGINT, lambda *_: (interrupted.append(True), signal.signal(signal.SIGINT, handler)))
    recent, clock = [], time.perf_counter()
    bar = tqdm(range(start + 1, config.steps + 1), initial=start, total=config.steps, unit="step", dynamic_ncols=True)
    try:
        for step in bar:
            scale = min(step / config.warmup, 1) * (1 - (step - 1) / config.steps)
            for optimizer, peak in zip(optimizers, (config.lr, config.lr_rest)):
                optimizer.param_groups[0]["lr"] = scale * peak
            loops = model.config.loops
            if 0 < config.loops_min < loops:
                loops = int(torch.randint(config.loops_min, loops + 1, (), generator=generator, device=device))
            x0, editable = batch(config.batch, generator)
            # no cache: a cast first made in a loop without gradient would be used in the others (torch <= 2.9)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
                value, right = loss(model, x0, editable, config.objective, config.supervise, loops, generator)
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(config.ema, step / (step + 10))  # early on, forget the initialization
            with torch.no_grad():
                for average, w in zip(ema.parameters(), model.parameters()):
                    average.lerp_(w, 1 - decay)
            read, grad_from = supervised(config.supervise, loops)
            forward, backward = (model.flops(n, len(read)) for n in (loops, loops + 1 - grad_from))
            flops += len(x0) * (forward + 2 * backward)  # loops without gradient go forward only
            recent.append(torch.stack([value.detach(), right, norm]))
            last = step == config.steps or bool(interrupted)
            evaluating = step == config.steps or step % config.eval_every == 0
            saving = last or step % config.save_every == 0
            if evaluating or saving or step % 25 == 0:
                mean = torch.stack(recent).mean(0).tolist()
                if not math.isfinite(mean[0] + mean[2]):
                    why = f"the loss became {mean[0]}, its gradient {mean[2]}, by step {step}"
                    raise BadInput(f"{why}; a checkpoint in {out} is from before")
                recent = []
                bar.set_postfix(loss=f"{mean[0]:.4f}", accuracy=f"{mean[1]:.3f}", refresh=False)
                entry = dict(step=step, loss=mean[0], accuracy=mean[1]) | (evaluate(ema.eval()) if evaluating else {})
                seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
                try:
                    with open(log, "a") as f:
                        f.write(json.dumps(entry | dict(seconds=round(seconds, 1), flops=flops), default=float) + "\n")
                    if saving:
                        checkpoint()
                except OSError as e:
                    what = f"cannot write to {out}: {e.strerror}; what was saved there before is whole"
                    raise BadInput(what) from e
            if last and step < config.steps:
                raise KeyboardInterrupt
    finally:
        bar.close()
        if listening:
            signal.signal(signal.SIGINT, handler)
    return ema


# ---------------------------------------------------------------------------------------------------
# 6. The command line of a training script
# ---------------------------------------------------------------------------------------------------


def configure(pairs, *configs):
    """Apply "name=value" strings to the fields of the given dataclasses, typed as the defaults are."""
    names = {f.name: c for c in configs for f in fields(c) if f.name not in ("vocab", "coords", "seed")}
    changes = {id(c): {} for c in configs}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in names:
            raise BadInput(f"--set {pair[:80]!r}: no field {name[:80]!r}; there are {', '.join(names)}")
        kind = type(getattr(names[name], name))
        try:
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise BadInput(f"--set {pair[:80]!r}: {name} must be of type {kind.__name__}") from None
        changes[id(names[name])][name] = value
    return [replace(c, **changes[id(c)]) for c in configs]


def command_line(doc):
    """An argument parser that reports a mistake in one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda why: parser.exit(2, f"{parser.prog}: {why} (--help lists the options)\n")
    return parser


def within(kind, low, high):
    """For argparse: a number of type `kind`, int or float, from low to high."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"
    return parse


def grid(value, loops, columns, name="T", digits=1):
    """Print value(L, x): a row for each L, a column for each x, called `name`."""
    print("        " + "".join(f"{f'{name}={x}':>8}" for x in columns))
    for L in loops:
        print(f"  L={L:<4}" + "".join(f"{value(L, x):8.{digits}f}" for x in columns), flush=True)


@torch.no_grad()
def by_noise(model, x0, editable):
    """Print what eq. (3) is made of: the cross-entropy after each loop at several times t, in nats per token that
    is masked on average. Where it falls from row to row, the loops help."""
    L, nats = model.config.loops, {}
    for t in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        times, generator = torch.full_like(x0[:, 0], t, dtype=torch.float), torch.Generator(x0.device).manual_seed(0)
        ce, _ = masked_ce(model, x0, editable, times, L, range(1, L + 1), generator)
        nats[t] = ce.sum((1, 2)) / (t * editable.sum())
    print("\nnats a masked token, held-out problems, after each loop, by the share t that is masked")
    grid(lambda l, t: nats[t][l - 1], range(1, L + 1), nats, "t", 3)


def launch(task, doc, presets, prepare, options):
    """`python train_TASK.py`: read the command line, train or resume, report.

    presets(args)          -> {"cpu": (Config, TrainConfig, what to expect), "gpu": ...}
    prepare(args, device)  -> batch, evaluate (see `train`), and report(model), called at the end: it prints what
                              the model can do and returns a problem to try it on
    options                the task's own: {"--flag": keyword arguments of argparse's add_argument}"""
    parser = command_line(doc)
    add = parser.add_argument
    add("--preset", choices=("cpu", "gpu"), help="size of model and run; default: gpu on CUDA, else cpu")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: the first there is")
    add("--out", metavar="RUN", default=f"runs/{task}", help="folder for the run (default: %(default)s)")
    add("--resume", metavar="RUN", help="go on with an interrupted run, with the settings it was started with")
    add("--seed", type=within(int, 0, 2**32), default=0, help="of data, initialization and training (default: 0)")
    what = "fields of rmdm.Config and rmdm.TrainConfig"
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=what)
    for flag, how in options.items():
        add(flag, **how)
    args = parser.parse_args()
    ckpt = None
    if args.resume:
        given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
        if extra := set(given) - {"resume", "device"}:
            raise BadInput(f"--resume keeps the settings of the run: leave out --{sorted(extra)[0]}")
        ckpt, out = read_checkpoint(args.resume, task), Path(args.resume)
        out = out.parent if out.is_file() else out
        if "optimizers" not in ckpt:
            raise BadInput(f"{args.resume}: holds weights only, nothing to resume")
        try:
            known = vars(parser.parse_args([])) | ckpt["args"]  # an option added since has its default
            begun = argparse.Namespace(**known | {"out": str(out), "device": ckpt["device"]})
            config, training = Config(**ckpt["config"]), TrainConfig(**ckpt["train"])
        except (KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{args.resume}: damaged, or made by another version of this code ({e})") from e
        if args.device not in ("auto", begun.device):
            raise BadInput(f"{out}: begun on {begun.device}, cannot go on elsewhere")
        args = begun
    device = pick_device(args.device)
    if ckpt is None:
        out = Path(args.out)
        refuse_used(out)  # before data is made that would not be used
        args.preset = args.preset or ("gpu" if device.type == "cuda" else "cpu")
        *configs, about = presets(args)[args.preset]
        config, training = configure(args.set, *configs)
        training = replace(training, seed=args.seed)
        refuse_untrainable(config, training)  # before data is made, like a folder in use
        print(f"preset {args.preset}: {about}; the bar shows the time left on this machine")
    torch.manual_seed(args.seed)
    try:
        model = RMDM(config).to(device)
    except (RuntimeError, TypeError) as e:
        raise BadInput(f"no room for this model: {str(e).splitlines()[0]}") from e
    size = f"{sum(w.numel() for w in model.parameters()):,} parameters, d={config.width}"
    print(f"{task} on {device}: K={config.layers} layers x L={config.loops} loops, {size}")
    print(f"training: {training.steps} steps of {training.batch}, from step {ckpt['step'] if ckpt else 0}, into {out}")
    batch, evaluate, report = prepare(args, device)
    try:
        model = train(model, training, batch, evaluate, out, task, vars(args), ckpt)  # nothing to do if finished
        last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        print(f"trained {last['step']} steps in {last['seconds']:.0f} s, {last['flops']:.3g} floating-point operations")
        problem = report(model)
        print(f"\nNow solve one that it has never seen:\n  python sample.py {task} --checkpoint {out} {problem}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; go on with: python {sys.argv[0]} --resume {out}") from None


def cli(main):
    """Run a script's main(): bad input is one line and exit code 2, Ctrl-C one line and 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in a file may not be printable
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (BadInput, OSError) as e:
        sys.exit(print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr) or 2)
    except KeyboardInterrupt as e:
        sys.exit(print(str(e) or "stopped", file=sys.stderr) or 130)
