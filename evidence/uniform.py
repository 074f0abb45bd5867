"""Uniform-state diffusion with recursion on Sudoku, and how another process is plugged into rmdm.py.

    python evidence/uniform.py                                              # trains as train_sudoku.py does, measures
    python evidence/uniform.py --set loops=1 loops_min=0 --out runs/flat   # any field of Config and TrainConfig
    python evidence/uniform.py --out runs/flat --data puzzles.csv           # measures that run on a file

Noise is a random digit, not MASK, so that every token can be revised at every step (2602.15014; bound: 2412.10193).
bar(x, a) = C a x + (1 - a) is C times the law of a token of law x, redrawn with probability 1 - a (~: up to a factor):

    forward   q(x_t | x0)   = bar(x0, alpha_t) / C
    denoiser  p(x0 | x_t)   ~ m bar(x_t, alpha_t)
    reverse   p(x_s | x_t)  ~ bar(m, alpha_s) bar(x_t, alpha_t / alpha_s)      s = 0: the denoiser
    NELBO     E_t[ -alpha'_t / (C alpha_t) sum_j (M_j - X_j + X_j log(X_j / M_j)) ], summed over positions, where
              X = bar(x0, alpha_t) and M = bar(m, alpha_t), each divided by its value at the token of x_t

m is p(x0^i | x_t without position i). With the denoiser in its place neither the reverse step nor the NELBO is exact
(2605.22765), so the network gives log m; cross-entropy is taken of the denoiser, which is Bayes' rule away.
Our choices: an editable digit d is fed in as d + 9, which tells noise from clues, as MASK does in masking; t is an
input, since no count of MASKs tells it; the "greedy" sampler takes the likeliest x0 and noises it anew, to time s."""

import argparse
import itertools
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm
import train_sudoku as sudoku

C = 9  # a token's values are 1..C


def one_hot(x):
    return F.one_hot(x - 1, C).double()


def bar(x, a):
    return C * a * x + 1 - a


def corrupt(x0, t, editable, generator=None):
    """Forward process: x_t (B, N); each editable token is redrawn with probability 1 - alpha_t."""
    redrawn = editable & (torch.rand(x0.shape, generator=generator, device=x0.device) < 1 - rmdm.alpha(t)[:, None])
    return torch.where(redrawn, torch.randint(1, C + 1, x0.shape, generator=generator, device=x0.device), x0)


def reverse(m, x_t, t, s):
    """p(x_s | x_t) (B, N, C) for m (B, N, C), x_t (B, N) and s < t, tensors without axes; with s = 0 the denoiser."""
    p = bar(m, rmdm.alpha(s)) * bar(one_hot(x_t), rmdm.alpha(t) / rmdm.alpha(s))
    return p / p.sum(-1, keepdim=True)


def integrand(m, x0, x_t, t):
    """The NELBO's, for each position: m (R, B, N, C), x0 and x_t (B, N), t (B,) -> (R, B, N)."""
    a, here = rmdm.alpha(t).clamp(min=2**-24)[:, None, None], one_hot(x_t)  # clamp: 0 divided by 0 at t = 1
    X, M = bar(one_hot(x0), a), bar(m, a)
    X, M = X / (X * here).sum(-1, keepdim=True), M / (M * here).sum(-1, keepdim=True)
    return (-rmdm.alpha_prime(t)[:, None, None] / (C * a) * (M - X + X * (X / M).log())).sum(-1)


def costs(model, x0, editable, t, objective, generator=None, **how):
    """Nats at each position (R, B, N), 0 where not editable: "elbo", the integrand, or "simple", the denoiser's
    cross-entropy. Also the share of editable tokens that the last loop gets right. R, `how` as in RMDM.forward."""
    x_t, t = corrupt(x0, t, editable, generator), t.double()
    logits = model(x_t + C * editable, t.float(), **how)[0][..., 1 : C + 1].double()  # log m
    log_p = (logits + bar(one_hot(x_t), rmdm.alpha(t)[:, None, None]).log()).log_softmax(-1)  # of the denoiser
    ce = -log_p.gather(3, (x0 - 1).expand(log_p.shape[:3])[..., None])[..., 0]
    nats = ce if objective == "simple" else integrand(logits.softmax(-1), x0, x_t, t)
    right = (log_p[-1].argmax(-1) + 1 == x0)[editable].double().mean()
    return torch.where(editable, nats, 0), right


def loss(model, x0, editable, objective="simple", generator=None, **how):
    """What rmdm.train asks for: rmdm.loss for this process."""
    nats, right = costs(model, x0, editable, rmdm.sample_t(len(x0), generator, x0.device), objective, generator, **how)
    return nats.sum((1, 2)).mean() / editable.sum().clamp(min=1), right


@torch.no_grad()
def nelbo(model, x0, editable, generator=None):
    """rmdm.nelbo for this process: one unbiased estimate for each example, (B,) nats."""
    return costs(model, x0, editable, rmdm.sample_t(len(x0), generator, x0.device), "elbo", generator)[0][0].sum(1)


@torch.no_grad()
def sample(model, x, editable, steps, greedy=False, generator=None):
    """Put noise in the editable positions of x (B, N), then take T = `steps` reverse steps, the last one an argmax.
    Returns rmdm.Filled; its trace has for each step x, as it was before, and guess, the denoiser's likeliest x0."""
    one, loops, trace = torch.ones(len(x), dtype=torch.float64, device=x.device), 0, []
    x = corrupt(x.clamp(min=1), one, editable, generator)  # the clamp: MASK is no token here
    for left in range(steps, 0, -1):
        t, s = torch.tensor([left, left - 1], dtype=torch.float64, device=x.device) / steps
        logits, used, _ = model.infer(x + C * editable, (t * one).float())
        m, loops = logits[..., 1 : C + 1].double().softmax(-1), loops + used
        guess = torch.where(editable, reverse(m, x, t, 0 * t).argmax(-1) + 1, x)
        trace.append(dict(x=x, guess=guess))
        drawn = 1 + torch.multinomial(reverse(m, x, t, s).flatten(0, 1), 1, generator=generator).view(x.shape)
        x = corrupt(guess, s * one, editable, generator) if greedy or left == 1 else torch.where(editable, drawn, x)
    return rmdm.Filled(x, torch.full_like(loops, steps), loops, trace)


def evaluate(model, puzzles, solutions, steps, greedy=False):
    """Solve puzzles (n, 81) once: n and means. `held`: share of blanks that at half time hold a wrong digit which the
    denoiser guesses too; `mended`: share of these that end right; `spoiled`: share of the right ones, so held, that
    end wrong. Masking has revealed digits there, and mends and spoils none of them."""
    device = next(model.parameters()).device
    x, x0 = (torch.from_numpy(part).long().to(device) for part in (puzzles, solutions))
    editable, g, parts = x == rmdm.MASK, torch.Generator(device).manual_seed(0), torch.arange(len(x)).split(128)
    bound = torch.cat([nelbo(model, x0[i], editable[i], g) for i in parts])
    outs = [sample(model, x[i], editable[i], steps, greedy, g) for i in parts]
    held, guess = (torch.cat([out.trace[steps // 2][key] for out in outs]) for key in ("x", "guess"))
    right, wrong, agreed = torch.cat([out.x for out in outs]) == x0, held != x0, editable & (held == guess)
    shares = dict(exact=right.all(1), cell=right[editable], nfe=torch.cat([out.loops for out in outs]), nelbo=bound)
    shares |= dict(held=(wrong & agreed)[editable], mended=right[wrong & agreed], spoiled=~right[agreed & ~wrong])
    return dict(n=len(x)) | {key: of.double().mean().item() if len(of) else None for key, of in shares.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="RUN", default="runs/uniform", help="the run's folder (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--data", metavar="FILE", help="measure the run in that folder on this, with solutions")
    args, device, task = parser.parse_args(), rmdm.pick_device(), "sudoku-uniform"
    if args.data:
        model = rmdm.load(args.out, device, task)
        puzzles, solutions, _ = sudoku.read(rmdm.read_text(args.data), args.data)
        known = solutions.all(1)
        rmdm.require(known.any(), f"{args.data}: no puzzle with a solution")
        test = puzzles[known], solutions[known]
    else:
        seen, test = sudoku.split(*sudoku.generated(10_000 + sudoku.HELD_OUT, args.seed), sudoku.HELD_OUT)
        config, training = rmdm.override(args.set, sudoku.OURS, rmdm.TrainConfig(5500, loops_min=8, grad_loops=8))
        rmdm.require(not training.carry, "carried examples are for masking alone")
        training, check = replace(training, seed=args.seed), lambda model: evaluate(model, *np.array(test)[:, :128], 20)
        torch.manual_seed(args.seed)
        model, batch = rmdm.RMDM(replace(config, vocab=2 * C + 1, time=True)).to(device), sudoku.batches(*seen, device)
        with redirect_stdout(sys.stderr):  # standard output is for JSON
            model = rmdm.train(model, training, batch, check, args.out, dict(task=task), args.resume, loss)
    for sampler, T in itertools.product(("ancestral", "greedy"), (1, 5, 20, 81)):
        scores = evaluate(model, *test, T, sampler == "greedy")
        print(json.dumps(dict(run=args.out, data=args.data, sampler=sampler, T=T) | scores), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
