"""Recursive Masked Diffusion Models (R-MDM): the method in one file.

A masked diffusion model fills in MASK tokens over T denoising steps. R-MDM applies the same denoising
transformer L times inside each step, so depth grows without parameters. It works on any sequence of discrete
tokens of a fixed length. The file needs PyTorch and tqdm and can be copied alone.

References, by arXiv number
    2606.18022  Recursive Scaling in Masked Diffusion Models (R-MDM): eq. (2)
    2605.26106  Looped Diffusion Language Models (LoopMDM): eq. (7)
    2602.15014  Scaling Beyond Masked Diffusion Language Models: the simple objective, eq. (4)
    2406.04329  Simplified and Generalized Masked Diffusion for Discrete Data, and
    2406.07524  Simple and Effective Masked Diffusion Language Models: eqs. (1), (3) and ancestral (6)
    2502.06768  Train for the Worst, Plan for the Best: ordered (6), margin
    2502.05171, 2510.04871 (TRM)  truncated backpropagation through loops, with input injection
    2605.19943 (PTRM), 2605.21488 (EqR), 2601.19085  restarts by noise, by random states, by symmetries: eq. (8)
    Muon, https://kellerjordan.github.io/posts/muon

Map: the numbers (1) to (8) are this project's own; the README lists the equations.
    1. Schedule and forward process    eq. (1)              alpha, alpha_prime, alpha_inverse, corrupt
    2. Recursive transformer           eqs. (2), (7), and (8) in RMDM.states
    3. Loss                            eqs. (3) to (5)      loss, nelbo
    4. Sampler                         eqs. (6), (8)        sample, sample_all
    5. Training and checkpoints        (7): L drawn         TrainConfig, begin, train, load
    6. What the scripts share                               override, run_script

Shapes: B examples, N positions, d width, V tokens (MASK included), K layers in the shared block, L loops,
T denoising steps. x0 (B, N) int64 clean tokens; x_t the same, partly MASK; t (B,) in (0, 1]; `editable`
(B, N) bool, True = may be masked: clues and prompts are False and never change. Shorter sequences are padded
with a token of your own. One process uses one device.
"""

import copy
import io
import json
import math
import os
import platform
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

MASK = 0  # the mask token; task tokens are 1..V-1


class BadInput(ValueError):
    """What the person at the keyboard can mend: told in one line, without a traceback."""


# ---- 1. Schedule and forward process ----
# All else derives from the first three functions: another schedule is another three.

def alpha(t):
    """Probability that an editable token is still visible at time t: from 1 at t = 0 to 0 at t = 1, eq. (1)."""
    return 1 - t


def alpha_prime(t):
    """The derivative of alpha."""
    return -torch.ones_like(t)


def alpha_inverse(a):
    """The t at which alpha(t) = a, that is, at which the share 1 - a is masked on average."""
    return 1 - a


def sample_t(n, generator=None, device=None):
    """n times in (0, 1], one in each of n equal strata: uniform, with less variance than n free draws."""
    u = torch.rand(n, generator=generator, device=device)
    stratum = torch.randperm(n, generator=generator, device=device)  # else row i would always get the i-th
    return (1 - (stratum + u) / n).clamp(min=2**-24)  # rounding could give 0


def corrupt(x0, t, editable, generator=None):
    """Forward process, eq. (1): x_t (B, N), and `masked` (B, N) bool, True = was replaced by MASK."""
    if x0.ndim != 2 or x0.shape != editable.shape:
        raise BadInput(f"x0 {tuple(x0.shape)} and editable {tuple(editable.shape)}: both are (B, N)")
    if (editable & (x0 == MASK)).any():
        raise BadInput(f"x0 has the token {MASK} at an editable position: {MASK} is MASK, clean tokens are 1..V-1")
    u = torch.rand(x0.shape, generator=generator, device=x0.device)
    masked = editable & (u < 1 - alpha(t)[:, None])  # (1): MASK with probability 1 - alpha_t
    return torch.where(masked, MASK, x0), masked


# ---- 2. Recursive transformer ----

@dataclass
class Config:
    """The model; it travels in the checkpoint.

    coords: an int N for a plain sequence, or N rows of one coordinate for each axis, integers from 0 (Sudoku: row,
    column, box). Each axis has an embedding table; a position's embeddings are summed."""

    vocab: int  # V: tokens, MASK included
    coords: tuple  # fixes the length N
    width: int = 64  # d: what a CPU trains in minutes
    heads: int = 2  # attention heads, of 32 dimensions at d = 64: fewer and wider is faster on a CPU
    layers: int = 1  # K: layers of the shared block
    loops: int = 8  # L: loops in training (the largest, if drawn; with carry only the number of v^l) and in sampling
    head_layers: int = 0  # layers run once before the loops, eq. (7); 0 is R-MDM
    tail_layers: int = 0  # layers run once after the loops, eq. (7); 0 is R-MDM
    time: bool = False  # t enters f, eq. (2); off, since the number of MASKs tells t
    inject: bool = False  # ours: h^0 is added again at every loop (prior art: 2502.05171); helps beyond L loops
    coord_bias: bool = False  # ours: a relative position bias, see Layer; learns grids faster

    def __post_init__(self):
        coords = torch.as_tensor(self.coords)
        coords = coords if coords.ndim else torch.arange(int(coords))[:, None]
        if coords.ndim != 2 or not coords.numel() or coords.is_floating_point() or coords.min() < 0:
            raise BadInput("coords needs a length, or a row of integers from 0 for each position")
        self.coords = tuple(map(tuple, coords.tolist()))
        if min(self.width, self.heads, self.layers, self.loops) < 1 or self.width % self.heads:
            raise BadInput("width, heads, layers and loops are at least 1, and heads divides width")


class Layer(nn.Module):
    """One bidirectional pre-norm transformer layer, (B, N, d) -> (B, N, d).

    With axes > 0, a relative position bias: a learned number for each head and axis is added to the attention logits
    of two positions that share their coordinate on that axis. same (axes, N, N): 1 where they do, else 0."""

    def __init__(self, width, heads, axes):
        super().__init__()
        self.heads = heads
        # Every second head begins by favouring such positions, the others by shunning them, as lucky seeds learn to.
        sign = (1.0 - 2 * (torch.arange(heads) % 2)).view(heads, 1, 1, 1)
        self.bias = nn.Parameter(sign.repeat(1, axes, 1, 1)) if axes else None
        self.norm1 = nn.LayerNorm(width)  # LayerNorm: torch fuses it on every device, RMSNorm not on CPU
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h, same):
        B, N, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, N, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        bias = None if self.bias is None else (self.bias * same).sum(1).to(q.dtype)  # (heads, N, N)
        if h.device.type == "cpu":  # for short sequences faster than torch's kernel
            a = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            a = (a if bias is None else a + bias).softmax(-1) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v, bias)
        h = h + self.out(a.transpose(1, 2).reshape(B, N, d))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


def autocast(device):
    """A context in which torch multiplies matrices in bfloat16 where the hardware is faster so: CUDA, AVX512-BF16.
    Its cache is off: up to torch 2.9 a weight cast in a loop without gradient is used in the others, and gets none."""
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else fast
    return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


class RMDM(nn.Module):
    """The denoiser p_theta(x0 | x_t) of eq. (2):

        h^0 = E(x_t, t)
        h^l = f(Norm(h^{l-1} + v^l), t),   l = 1..L      f: K layers, the same for all loops
        p_theta(x0 | x_t) = softmax D(h^L)

    and of eq. (7): head layers end E, tail layers begin D. Only h carries information from loop to loop.

    Our choices: t enters as sinusoids through a linear map that begins at 0. It is added to h^0 and, inside Norm, again
    at every loop, as is h^0 with injection. Norm is LayerNorm. v^l begins at 0, and beyond L loops the last one
    repeats. The initialization is below."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.register_buffer("coords", torch.tensor(c.coords), persistent=False)  # (N, axes)
        axes = self.coords.shape[1] if c.coord_bias else 0
        same = (self.coords == self.coords[:, None]).permute(2, 0, 1).float() if axes else None  # (axes, N, N)
        self.register_buffer("same", same, persistent=False)
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.ModuleList(nn.Embedding(1 + max(axis), c.width) for axis in zip(*c.coords))
        if c.time:
            self.time = nn.Linear(16, c.width)
        self.head = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.head_layers))
        self.block = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.layers))
        self.tail = nn.ModuleList(Layer(c.width, c.heads, axes) for _ in range(c.tail_layers))
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
                nn.init.normal_(m.weight, std=0.5)  # a token and a few coordinates together: about 1
        nn.init.zeros_(self.unembed.weight)  # start from equal probabilities
        nn.init.zeros_(self.v.weight)  # start with all loops alike
        if c.time:
            nn.init.zeros_(self.time.weight)  # start with all t alike: at full size t drowned the tokens

    def embed_time(self, t):
        """t (B,) -> (B, 1, d)."""
        angle = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 7, device=t.device)
        return self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None]

    def encode(self, x_t, t):
        """E: x_t (B, N), t (B,) -> h^0 (B, N, d)."""
        if x_t.shape[1:] != self.coords.shape[:1]:
            raise BadInput(f"sequences of shape {tuple(x_t.shape[1:])}: this model's have N = {len(self.coords)}")
        h = self.token(x_t) + sum(table(self.coords[:, axis]) for axis, table in enumerate(self.position))
        if self.config.time:
            h = h + self.embed_time(t)
        for layer in self.head:
            h = layer(h, self.same)
        return h

    def states(self, x_t, t, loops, grad_loops=0, noise=0.0, generator=None, carried=None):
        """The recursion, eq. (2): a generator of h^0, h^1, .., h^loops, each (B, N, d).

        grad_loops > 0: only the last so many loops carry gradient, eq. (5). noise > 0: the size of Gaussian noise on
        h^0, eq. (8). carried: h (B, N, d) and l (B,), to go on from h^l where l > 0. A bool (B,) that is sent in says
        which examples go on."""
        c = self.config
        h0 = self.encode(x_t, t)  # h^0 = E(x_t, t)
        if noise:
            h0 = h0 + noise * torch.randn(h0.shape, generator=generator, device=h0.device)  # (8)
        h, before = h0, torch.zeros_like(x_t[:, 0])  # before: the loops that an example has had
        if carried is not None:
            h, before = torch.where((carried[1] > 0)[:, None, None], carried[0], h0), carried[1]
        go = yield h
        for l in range(1, loops + 1):
            if go is not None:
                h, h0, t, before = h[go], h0[go], t[go], before[go]
            grad = torch.is_grad_enabled() and (not grad_loops or l > loops - grad_loops)
            with torch.set_grad_enabled(grad):
                if c.time:
                    h = h + self.embed_time(t)
                h = h + self.v((before + l).clamp(max=c.loops) - 1)[:, None]  # h^{l-1} + v^l
                if c.inject:
                    h = h + h0
                h = self.loop_norm(h)  # Norm(h^{l-1} + v^l), with what was added to it
                for layer in self.block:
                    h = layer(h, self.same)  # h^l = f(.)
            go = yield h

    def decode(self, h):
        """D: (B, N, d) -> logits (B, N, V); MASK has -inf, that is, no probability."""
        for layer in self.tail:
            h = layer(h, self.same)
        with torch.autocast(h.device.type, enabled=False):  # in bfloat16 many would be equally sure
            return F.pad(self.unembed(self.norm(h)), (1, 0), value=-math.inf)

    def forward(self, x_t, t, loops=None, supervise="final", grad_loops=0, carried=None):
        """Logits (R, B, N, V) after the final loop, R = 1, or, with supervise="all", after each that carries
        gradient: the last grad_loops, or all `loops` (default: as trained). Also the final h (B, N, d)."""
        loops = loops or self.config.loops
        if (carried or 0 < grad_loops < loops) and not self.config.inject:
            raise BadInput("carry, or grad_loops below the loops, needs inject=true: else E gets hardly any gradient")
        states = list(self.states(x_t, t, loops, grad_loops, carried=carried))[1:]
        read_at = {"all": states[-grad_loops:], "final": states[-1:]}[supervise]  # (5)
        return self.decode(torch.cat(read_at)).view(len(read_at), *x_t.shape, -1), states[-1]

    def infer(self, x_t, t, loops=None, eps=0.0, noise=0.0, generator=None):
        """For sampling: logits (B, N, V) of the last loop, and the loops used (B,). With eps > 0 an example stops, and
        costs nothing more, at the first loop l where ||h^l - h^{l-1}|| / ||h^l|| < eps, eq. (7), or after `loops`."""
        loops = loops or self.config.loops
        used = torch.full_like(x_t[:, 0], loops)
        states = self.states(x_t, t, loops, noise=noise, generator=generator)
        if not eps:
            for final in states:  # none is kept but the last
                pass
            return self.decode(final), used
        l, h, going = 0, next(states), torch.arange(len(x_t), device=x_t.device)  # going: the examples that go on
        final, go = torch.empty_like(h), torch.ones_like(going, dtype=torch.bool)
        while len(going):
            l += 1
            old, h = h[go], states.send(go)
            change = (h - old).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)  # (7)
            go = (change >= eps) & (l < loops)
            final[going[~go]], used[going[~go]] = h[~go], l
            going = going[go]
        return self.decode(final), used

    def flops(self, loops, reads=1):
        """Floating-point operations of one example's forward pass with `reads` read-offs (matrix products)."""
        c, N = self.config, len(self.coords)
        layer = N * (24 * c.width**2 + 4 * N * c.width)
        layers = c.head_layers + loops * c.layers + reads * c.tail_layers
        return layers * layer + reads * N * 2 * c.width * (c.vocab - 1)


# ---- 3. Loss ----

def nelbo_weight(t):
    """The weight of eq. (3): -alpha'_t / (1 - alpha_t), here 1/t; finite where rounding makes 1 - alpha_t zero."""
    return -alpha_prime(t) / (1 - alpha(t)).clamp(min=2**-24)


WEIGHTS = {"elbo": nelbo_weight, "simple": torch.ones_like}  # eqs. (3) and (4)


def masked_ce(model, x0, x_t, masked, t, **how):
    """-log p_theta(x0^i | x_t), zero where not masked: (R, B, N) nats; R and `how` as in RMDM.forward. Also where the
    last loop is right about a masked token, (B, N) bool, and the final h."""
    logits, h = model(x_t, t, **how)
    target = torch.where(masked, x0, -100)  # cross_entropy's mark for: does not count
    ce = F.cross_entropy(logits.flatten(0, 2).float(), target.repeat(len(logits), 1).flatten(), reduction="none")
    return ce.view(logits.shape[:3]), logits[-1].argmax(-1) == target, h.detach()


def loss(
    model, x0, editable, objective="simple", supervise="all", grad_loops=0, loops=None, generator=None, carried=None
):
    """Training loss, in nats per editable token, and the share of masked tokens that the last loop gets right.

    objective    "elbo", eq. (3), or "simple", eq. (4), the same without the weight. Both are divided by the number of
                 editable tokens in the batch, so that one learning rate suits both
    supervise    eq. (5): the mean over "all" loops that carry gradient, or the "final" one
    grad_loops   eq. (5): truncated backpropagation, only the last M = `grad_loops` carry gradient; 0 = all do
    carried      a dict, empty at first, that goes from call to call (ours; prior art: TRM). A call runs M loops. An
                 example that they do not get right keeps its place, and its h, at the next call, until it has had
                 `loops`; then one of x0 takes its place. So the loops before the last M cost nothing, and hard
                 examples come more often: the value is no estimate of (3) or (4)

    model may be wrapped by torch (DistributedDataParallel, torch.compile)."""
    t = sample_t(len(x0), generator, x0.device)
    x_t, masked = corrupt(x0, t, editable, generator)
    how = dict(supervise=supervise, grad_loops=grad_loops, loops=loops)
    if carried is not None:
        now = dict(x0=x0, x_t=x_t, masked=masked, t=t, editable=editable)
        h, l = carried.get("h", torch.zeros((), device=x0.device)), carried.get("l", torch.zeros_like(x0[:, 0]))
        for key, new in now.items():  # l > 0: the example of the last call goes on
            now[key] = torch.where((l > 0).view(-1, *[1] * (new.ndim - 1)), carried.get(key, new), new)
        x0, x_t, masked, t, editable = now.values()
        how = dict(supervise=supervise, loops=grad_loops, carried=(h, l))
    ce, right, h = masked_ce(model, x0, x_t, masked, t, **how)
    if carried is not None:
        done = (right | ~masked).all(1) | (l + grad_loops >= loops)
        carried.update(now, h=h, l=torch.where(done, 0, l + grad_loops))
    ce = ce * WEIGHTS[objective](t)[:, None]  # (3) or (4)
    value = ce.sum((1, 2)).mean() / editable.sum().clamp(min=1)  # the mean is over loops, (5)
    return value, right.sum() / masked.sum().clamp(min=1)


@torch.no_grad()
def nelbo(model, x0, editable, loops=None, generator=None):
    """One unbiased estimate of the NELBO, eq. (3), for each example: (B,) nats, final loop. Its mean bounds
    the mean of -log p(x0 at the editable positions | the others) from above."""
    t = sample_t(len(x0), generator, x0.device)
    ce, _, _ = masked_ce(model, x0, *corrupt(x0, t, editable, generator), t, loops=loops)
    return nelbo_weight(t) * ce[0].sum(1)


# ---- 4. Sampler ----

ORDERS = ("ancestral", "random", "confidence", "margin", "entropy")


def reveal_ancestral(masked, t, s, generator):
    """What the exact reverse process from t to s, tensors without axes, reveals, eq. (6): (B, N) bool."""
    share = (alpha(s) - alpha(t)) / (1 - alpha(t))  # (6)
    return masked & (torch.rand(masked.shape, generator=generator, dtype=t.dtype, device=t.device) < share)


def reveal_ordered(masked, p, steps_left, order, threshold, generator):
    """The ceil(masked / steps left) surest of each example, eq. (6), by p (B, N, V), and all at or above the
    threshold: (B, N) bool."""
    sure = score = p.amax(-1)
    if order == "margin":
        score = p.topk(2, -1).values.diff(dim=-1)[..., 0].neg()
    elif order == "entropy":
        score = torch.xlogy(p, p).sum(-1)  # minus the entropy: the least uncertain first
    elif order == "random":
        score = torch.rand(sure.shape, generator=generator, dtype=p.dtype, device=p.device)
    rank = score.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    chosen = rank < -(-masked.sum(1, keepdim=True) // steps_left)  # (6)
    return masked & (chosen if threshold is None else chosen | (sure >= threshold))


@dataclass
class Filled:
    """What `sample` returns. One pass = one denoising step in which the network ran for the example."""

    x: torch.Tensor  # (B, N) the filled-in sequences
    passes: torch.Tensor  # (B,) passes used, in all tries
    nfe: torch.Tensor  # (B,) loops, summed over the passes; from `sample_all` (B, tries), those of each try
    trace: list  # if asked for, a dict for each step that ran: x (B, N), revealed (B, N) bool, sure (B, N), loops (B,)
    tries: torch.Tensor | None = None  # from `sample_all`: (B,) tries used
    right: torch.Tensor | None = None  # from `sample_all`: (B,) bool, what its judge said of x

    def scores(self):
        """What restarts are worth: the mean `tries` and `nfe`, and the share solved `within_n` tries, n = 1, 2, 4, ..,
        with their mean loops, `nfe_n`."""
        nfe = self.nfe.double().mean(0).cumsum(0).tolist()
        found = dict(tries=self.tries.double().mean().item(), nfe=nfe[-1])
        for n in (2**k for k in range(len(nfe).bit_length())):
            found |= {f"within_{n}": (self.right & (self.tries <= n)).double().mean().item(), f"nfe_{n}": nfe[n - 1]}
        return found


@torch.no_grad()
def sample(
    model, x, editable=None, steps=1, order="confidence", loops=None, eps=0.0,
    threshold=None, temperature=None, noise=0.0, generator=None, trace=False,
):
    """Fill in the editable positions of x (B, N) in T = `steps` denoising steps, eq. (6).

    editable     (B, N) bool, True = start from MASK and fill in; False never changes. Default: x == MASK
    order        "ancestral": the exact reverse process. Otherwise ceil(masked / steps left) tokens a step: by the
                 highest top probability ("confidence"), the largest gap between the two likeliest ("margin"),
                 the lowest "entropy", or at "random". The last step reveals everything
    loops, eps   loops per step, or at most that many with the adaptive stop of `RMDM.infer`
    threshold    reveal besides, at every step, all whose top probability reaches it: steps then adapt
    temperature  of the drawn tokens: 1 draws from p_theta, 0 takes the likeliest (right for puzzles).
                 Default: 1 in ancestral order, else 0. The order is always judged at temperature 1
    noise        of h^0, drawn anew at every step, eq. (8)

    An example leaves the batch when it is full, and sits out the ancestral steps that reveal nothing of it."""
    if order not in ORDERS:
        raise BadInput(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
    temperature = float(order == "ancestral") if temperature is None else temperature
    counts, sizes = (steps, 1 if loops is None else loops), (eps, noise, temperature, threshold or 0)
    if not (all(1 <= n <= 10**6 for n in counts) and all(0 <= x < math.inf for x in sizes)):
        raise BadInput("steps and loops are from 1 to a million; eps, noise, temperature, threshold finite, from 0")
    if threshold is not None and order == "ancestral":
        raise BadInput("a threshold needs an order other than ancestral")
    editable = x == MASK if editable is None else editable
    x, masked = torch.where(editable, MASK, x), editable  # not x == MASK: a MASK may be there to be kept
    passes, nfe, history = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for left in range(steps, 0, -1):
        if order == "ancestral":  # what is revealed does not depend on the network
            t, s = torch.tensor([left, left - 1], dtype=torch.float64, device=x.device) / steps
            reveal = reveal_ancestral(masked, t, s, generator)
            i = reveal.any(1).nonzero()[:, 0]  # the examples that need the network
            t = t.float().expand(len(i))
        else:  # the order leaves the schedule, so t is that of the share that is masked now
            i = masked.any(1).nonzero()[:, 0]
            t = alpha_inverse(1 - masked[i].sum(1) / editable[i].sum(1))
        if not len(i):
            continue
        with autocast(x.device):
            logits, used = model.infer(x[i], t, loops, eps, noise, generator)
        p = logits.double().softmax(-1)
        if order != "ancestral":
            reveal = torch.zeros_like(masked)
            reveal[i] = reveal_ordered(masked[i], p, left, order, threshold, generator)
        token = p.argmax(-1)
        if temperature:
            drawn = (logits.double() / max(temperature, 1e-6)).softmax(-1)  # below that the division overflows
            token = torch.multinomial(drawn.flatten(0, 1), 1, generator=generator).view(token.shape)
        x[i] = torch.where(reveal[i], token, x[i])
        masked = masked & ~reveal
        passes[i] += 1
        nfe[i] += used
        if trace:
            sure, spent = p.new_zeros(x.shape), nfe.new_zeros(len(x))
            sure[i], spent[i] = p.amax(-1), used
            history.append(dict(x=x.clone(), revealed=reveal, sure=sure, loops=spent))
    return Filled(x, passes, nfe, history)


def picture(x, source, names):
    """x (n, N) seen through a symmetry of the task: the token names[x[source[i]]] at position i."""
    return names.gather(1, x.gather(1, source))


def sample_all(model, x, editable=None, judge=None, tries=1, again={"noise": 0.2}, batch=128, trace=False, **how):
    """`sample` in batches that fit a cache, with restarts, eq. (8): what `judge` refuses is tried again.

    judge   judge(i, x) -> (n,) bool: which of the answers x (n, N) to the problems i (n,) are right
    tries   at most so many; `how` is for `sample`
    again   what differs in all tries but the first. Default: noise, of a size that solved many Sudokus within 16
            tries, though it costs a single try much. "symmetry" is a function (n, generator, device) -> source (n, N),
            names (n, V), permutations in each row, names[0] = 0: a try solves such a `picture` of its problem

    The x and trace returned are those of each problem's last try, the trace a list of its own steps."""
    if not 1 <= tries <= 10**6:
        raise BadInput("tries is from 1 to a million")
    editable = x == MASK if editable is None else editable
    todo, right = torch.arange(len(x), device=x.device), torch.zeros_like(x[:, 0], dtype=torch.bool)
    passes, count, nfe = *x.new_zeros(2, len(x)), x.new_zeros(len(x), tries)
    answer, traces = x.clone(), [[] for _ in x]
    bar = tqdm(total=len(x), desc="solved", unit="problem", leave=False, delay=5)  # delay: of long work alone
    for k in range(tries):
        now = how | (again if k else {})
        symmetry = now.pop("symmetry", None)
        for i in todo.split(batch):
            problem, free = x[i], editable[i]
            if symmetry:
                source, names = symmetry(len(i), now.get("generator"), x.device)
                problem, free = picture(problem, source, names), free.gather(1, source)
            out = sample(model, problem, free, trace=trace, **now)
            if symmetry:
                source, names = source.argsort(1), names.argsort(1)  # the way back
                out.x = picture(out.x, source, names)
                for step in out.trace:
                    step |= {key: step[key].gather(1, source) for key in ("revealed", "sure")}
                    step["x"] = picture(step["x"], source, names)
            answer[i], right[i] = out.x, torch.as_tensor(judge(i, out.x)).to(right) if judge else True
            passes[i], nfe[i, k], count[i] = passes[i] + out.passes, out.nfe, k + 1
            bar.update(right[i].sum().item())
            for row in range(len(i)) if trace else ():
                steps = [{key: value[row] for key, value in step.items()} for step in out.trace]
                traces[i[row]] = [step for step in steps if step["loops"]]
        todo = todo[~right[todo]]
        if not len(todo):
            break
    bar.close()
    return Filled(answer, passes, nfe, traces, count, right)


# ---- 5. Training and checkpoints ----

@dataclass
class TrainConfig:
    steps: int = 4000  # about ten minutes of one core for a small model
    batch: int = 32  # twice or half as many gained nothing in pilots
    muon: bool = True  # for the matrices inside the layers: in pilots puzzles were learned faster than with AdamW alone
    lr: float = 0.02  # of Muon; twice or half gained nothing in pilots of minutes; a long run may want a quarter
    lr_rest: float = 4e-3  # of AdamW: embeddings, norms, biases, the unembedding; without Muon all
    warmup: int = 100  # steps of linear warm-up; then linear decay to zero, so that the end counts
    weight_decay: float = 0.01  # of both; torch's for AdamW
    clip: float = 1.0  # largest gradient norm, the usual one
    ema: float = 0.999  # decay of the averaged weights, the ones that are evaluated and shipped
    objective: str = "simple"  # eq. (4), or elbo, eq. (3)
    supervise: str = "all"  # eq. (5), as 2606.18022 is said to do, or final
    grad_loops: int = 0  # eq. (5): only the last so many loops carry gradient; 0 = all
    carry: int = 0  # ours, see `loss`: an example stays, grad_loops loops a step, until right or so many loops old
    loops_min: int = 0  # from 1: the loop count is drawn from loops_min..loops at each step, eq. (7); 0 = always loops
    seed: int = 0
    eval_every: int = 1000  # steps; one evaluation takes seconds
    save_every: int = 250  # steps: the half minute or so that a stop may cost

    def __post_init__(self):
        if self.objective not in WEIGHTS or self.supervise not in ("all", "final"):
            raise BadInput("objective is simple or elbo, supervise all or final")
        if min(self.steps, self.batch, self.warmup, self.eval_every, self.save_every) < 1:
            raise BadInput("steps, batch, warmup, eval_every and save_every are at least 1")
        if not (self.lr > 0 and self.lr_rest > 0 and self.clip > 0 and 0 <= self.ema < 1 and 0 <= self.seed < 2**32):
            raise BadInput("lr, lr_rest and clip are above 0, ema from 0 to below 1, seed from 0 to below 2**32")
        if self.grad_loops < 0 or self.carry and (self.loops_min or not 0 < self.grad_loops <= self.carry):
            raise BadInput("grad_loops is at least 0; carry needs loops_min=0 and a grad_loops of 1 to carry")


def make_optimizers(model, training):
    """[(optimizer, peak learning rate), ..]: Muon for the matrices inside the layers, AdamW for the rest."""
    inside, rest = [], []
    for name, w in model.named_parameters():
        matrix = training.muon and w.ndim == 2 and name.startswith(("head.", "block.", "tail."))
        (inside if matrix else rest).append(w)
    pairs = [(torch.optim.AdamW(rest, weight_decay=training.weight_decay, fused=True), training.lr_rest)]
    if inside:
        pairs.append((torch.optim.Muon(inside, weight_decay=training.weight_decay), training.lr))
    return pairs


def pick_device(name=None):
    """The torch.device called `name`, cpu or cuda; by default cuda if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("torch finds no CUDA device here")
    return torch.device(name)


def save(path, content):
    """torch.save, atomically: whole under its name, or not at all."""
    buffer, part = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    torch.save(content, buffer)  # to memory: a full disk is an OSError then, not an obscure one of torch
    try:
        with open(part, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path):
    """What `save` wrote, its checksums compared; BadInput for anything else. Nothing in the file can run code."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged bytes can raise anything
        raise BadInput(f"{path}: damaged, or not written by rmdm ({type(e).__name__})") from e


def load(path, device="cpu", task=None):
    """A model ready to use, with the averaged weights of model.pt or checkpoint.pt, a file or a run's folder; its
    `about` is what was given to `train`. Raises BadInput for a damaged file and for the model of another task."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    saved = read(path)
    try:
        model, made_for = RMDM(Config(**saved["config"])), saved["about"].get("task")
        model.load_state_dict(saved["ema"])
    except Exception as e:  # of another program or version
        raise BadInput(f"{path}: weights and configuration do not fit ({' '.join(str(e).split())[:100]})") from e
    if task not in (None, made_for):
        raise BadInput(f"{path}: made for {made_for}, not for {task}")
    model.about = saved["about"]
    return model.to(device).eval()


def begin(out, config, training, about=None, resume=False):
    """The settings of a run in the folder `out`, and the checkpoint that it goes on from, {} for a new run. Raises
    BadInput if the folder is in use, or its run was begun with other settings. To call before data are made, too."""
    settings, out = dict(config=asdict(config), train=asdict(training), about=about or {}), Path(out)
    settings = json.loads(json.dumps(settings))  # plain numbers, strings and lists, as read back
    if not resume:
        if out.exists() and any(out.iterdir()):
            raise BadInput(f"{out} is in use: resume its run (--resume, resume=True) or choose another (--out, out)")
        return settings, {}
    saved = read(out / "checkpoint.pt")
    for part, new in settings.items():
        for key in new | saved[part]:
            if saved[part].get(key) != new.get(key):
                old = str(saved[part].get(key))[:40]
                raise BadInput(f"{out}: the run was begun with {key}={old}, not {str(new.get(key))[:40]}")
    return settings, saved


def train(model, training, batch, evaluate, out, about=None, resume=False, loss=loss):
    """Train `model` in place; returns the averaged (EMA) model.

    batch(n, generator) -> x0 (n, N) int64, editable (n, N) bool, on the model's device; a new run tries one example
    evaluate(model)     -> dict of numbers for the log, called on the averaged model, at `eval_every` and at the end
    out                 a new folder for checkpoint.pt (to resume), model.pt (averaged weights), log.jsonl
    about               plain facts to keep, such as task, options and data
    resume              go on from the checkpoint in `out`; model, training and about must be as they were. On a CPU the
                        run ends bit-identical to one never interrupted, if batch draws from its generator alone
    loss                a function like `loss` for another diffusion process, as in evidence/uniform.py"""
    device, out = next(model.parameters()).device, Path(out)
    settings, saved = begin(out, model.config, training, about, resume)
    optimizers = make_optimizers(model, training)
    generator = torch.Generator(device).manual_seed(training.seed)  # all randomness after initialization
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    step, seconds, flops, carried = 0, 0.0, 0, {}
    how = {key: getattr(training, key) for key in ("objective", "supervise", "grad_loops")}
    how |= dict(loops=training.carry, carried=carried) if training.carry else dict(loops=model.config.loops)

    def note(entry, mode="a"):
        with open(out / "log.jsonl", mode) as log:
            print(json.dumps(entry, default=float), file=log)

    def checkpoint():
        saved = settings | dict(step=step, seconds=seconds, flops=flops, ema=ema.state_dict())
        if step == training.steps:  # first, since with the checkpoint the run counts as finished
            save(out / "model.pt", saved)
        saved |= dict(optimizers=[o.state_dict() for o, _ in optimizers], rng=generator.get_state())
        save(out / "checkpoint.pt", saved | dict(carried=carried, model=model.state_dict()))

    if saved:
        step, seconds, flops = saved["step"], saved["seconds"], saved["flops"]
        carried |= {key: x.to(device) for key, x in saved["carried"].items()}
        generator.set_state(saved["rng"])
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for (optimizer, _), state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    else:
        with torch.no_grad():  # one example, none carried: what cannot be trained is refused before there is a folder
            loss(model, *batch(1, torch.Generator(device)), **copy.deepcopy(how))
        out.mkdir(parents=True, exist_ok=True)
        checkpoint()
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device} {platform.machine()}"
        facts = dict(step=0, parameters=sum(w.numel() for w in model.parameters()), device=where)
        facts |= dict(torch=torch.__version__, threads=torch.get_num_threads())
        facts |= settings["about"] | settings["train"] | settings["config"] | dict(coords=len(model.coords))
        note(facts, "x")  # x: of two processes in one folder the second fails
    recent, clock = [], time.perf_counter()
    with tqdm(range(step + 1, training.steps + 1), initial=step, total=training.steps, unit="step") as bar:
        for step in bar:
            if 0 < training.loops_min < (loops := model.config.loops):  # (7)
                how["loops"] = int(torch.randint(training.loops_min, loops + 1, (), generator=generator, device=device))
            x0, editable = batch(training.batch, generator)
            with autocast(device):
                value, right = loss(model, x0, editable, generator=generator, **how)
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            scale = min(step / training.warmup, 1) * (1 - (step - 1) / training.steps)
            for optimizer, peak in optimizers:
                optimizer.param_groups[0]["lr"] = scale * peak
                optimizer.step()
                optimizer.zero_grad()
            decay = min(training.ema, step / (step + 10))  # early on, forget the initialization
            with torch.no_grad():
                for average, w in zip(ema.parameters(), model.parameters()):
                    average.lerp_(w, 1 - decay)
            back = min(training.grad_loops or how["loops"], how["loops"])  # loops without gradient go forward only
            reads = back if training.supervise == "all" else 1
            forward = back if training.carry else how["loops"]
            flops += len(x0) * (model.flops(forward, reads) + 2 * model.flops(back, reads))
            recent.append(torch.stack([value.detach(), right, norm]))
            last = step == training.steps
            evaluating, saving = last or step % training.eval_every == 0, last or step % training.save_every == 0
            if evaluating or saving or step % 25 == 0:
                mean, recent = torch.stack(recent).mean(0).tolist(), []
                seconds += time.perf_counter() - clock  # of training alone
                if not math.isfinite(mean[0] + mean[2]):
                    why = f"the loss became {mean[0]}, its gradient {mean[2]}, by step {step}"
                    raise BadInput(f"{why}; the checkpoint in {out} is from before")
                bar.set_postfix(loss=f"{mean[0]:.4f}", accuracy=f"{mean[1]:.3f}", refresh=False)
                entry = dict(step=step, loss=mean[0], accuracy=mean[1]) | (evaluate(ema) if evaluating else {})
                note(entry | dict(seconds=round(seconds, 1), flops=flops))
                if saving:
                    checkpoint()
                clock = time.perf_counter()
    return ema


# ---- 6. What the scripts share ----

def override(pairs, *configs):
    """Apply "name=value" strings to the fields of the given dataclasses, typed as they are: the new dataclasses."""
    fixed = ("vocab", "coords", "seed")  # by the task, or by an option of the script
    kinds = {f.name: type(getattr(c, f.name)) for c in configs for f in fields(c) if f.name not in fixed}
    changes = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kinds:
            raise BadInput(f"no field {name[:80]!r}; there are {', '.join(kinds)}")
        try:
            changes[name] = {"true": True, "false": False}[text.lower()] if kinds[name] is bool else kinds[name](text)
        except (ValueError, KeyError):
            raise BadInput(f"{name} must be of type {kinds[name].__name__}, not {text[:80]!r}") from None
    return [replace(c, **{name: changes[name] for name in changes if hasattr(c, name)}) for c in configs]


def run_script(main):
    """Run a script's main(): bad input is one line and exit code 2, Ctrl-C one line and 130."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (BadInput, OSError, MemoryError, torch.OutOfMemoryError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
