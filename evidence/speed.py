"""How fast is it? The Sudoku model beside its nearest relatives, in turns, so that a busy machine is unkind to all.

    OMP_NUM_THREADS=1 python evidence/speed.py > evidence/logs/speed.jsonl      # two minutes of an idle CPU

Prints JSON objects: medians of whole training steps, with what they keep for the backward pass, and of sampling.
Times are CPU time, which others on the machine disturb less; on one thread of an idle machine that is time.
"""

import copy
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm
import train_sudoku


class Plain(rmdm.RMDM):
    """An ordinary transformer, layers x loops layers deep, with the same read-offs."""

    def __init__(self, config):
        super().__init__(replace(config, layers=config.layers * config.loops, inject=False))

    def loop(self, h, h0, l, t):
        K, l = len(self.block) // self.config.loops, int(l[0])
        return self.block[K * (l - 1) : K * l](h)


class KernelLayer(rmdm.Layer):
    """Attention by torch's kernel, as on a GPU."""

    def forward(self, h):
        q, k, v = self.qkv(self.norm1(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, (self.bias * self.same).sum(1).to(q.dtype))
        h = h + self.out(a.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


def training_step(model, size, loops=None, grad_loops=0, context=rmdm.autocast):
    """A function that does a step as rmdm.train does, on random tokens; in float32 with context=nullcontext."""
    c, g, training = model.config, torch.Generator().manual_seed(0), rmdm.TrainConfig()
    average, optimizers = copy.deepcopy(model), rmdm.make_optimizers(model, training)
    x0 = torch.randint(1, c.vocab, (size, len(c.coords)), generator=g)
    how = dict(editable=torch.ones_like(x0, dtype=torch.bool), loops=loops, grad_loops=grad_loops, generator=g)

    def step():
        with context(torch.device("cpu")):
            value, _ = rmdm.loss(model, x0, **how)
        rmdm.update(value, model, average, optimizers, training, 1)

    return step


def kept(step):
    """MiB that a training step keeps for its backward pass."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(sizes.values()) / 2**20


def in_turns(rounds, jobs):
    """{name: median seconds of CPU time}"""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            seconds[name].append(time.process_time() - began)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def main():
    print(json.dumps(dict(kind="about", torch=torch.__version__, threads=torch.get_num_threads())), flush=True)
    (preset, training, _) = train_sudoku.PRESETS["short"]
    size = training.batch
    model = rmdm.load(Path(__file__).parents[1] / "weights" / "sudoku-short.pt")
    models = {f"{L} loops": rmdm.RMDM(replace(preset, loops=L)) for L in (8, 4, 16)}
    models["8 layers of their own, no loops"] = Plain(replace(preset, loops=8))
    layer, rmdm.Layer = rmdm.Layer, KernelLayer
    models["8 loops, torch's attention kernel"] = rmdm.RMDM(replace(preset, loops=8))
    rmdm.Layer = layer
    jobs = {name: training_step(model, size) for name, model in models.items()}
    wide = rmdm.RMDM(replace(preset, loops=8, width=128, heads=4))
    jobs |= {"8 loops, d = 128": training_step(wide, size)}
    for name, other in (("8 loops", models["8 loops"]), ("8 loops, d = 128", wide)):
        jobs[f"{name}, float32"] = training_step(other, size, context=nullcontext)
    jobs["12 loops, the last 8 with gradient: the preset's mean"] = training_step(models["16 loops"], size, 12, 8)
    memory = {name: kept(job) for name, job in jobs.items()}  # this warms up, too
    times = in_turns(15, jobs)
    for name, seconds in times.items():
        row = {"model": name, "ms": 1000 * seconds, "of 8 loops": seconds / times["8 loops"], "MiB kept": memory[name]}
        print(json.dumps({"kind": "training step"} | row), flush=True)
    filled = {}
    puzzles, solutions = train_sudoku.generate(128, 9)
    hows = {f"T={T}": dict(steps=T) for T in (1, 20, 81)} | {"T=81, threshold=0.99": dict(steps=81, threshold=0.99)}

    def solve(name):
        filled[name] = rmdm.sample(model, *train_sudoku.start(model, puzzles), **hows[name])

    for name, seconds in in_turns(1, {name: partial(solve, name) for name in hows}).items():
        exact = train_sudoku.score(puzzles, solutions, filled[name].x.numpy())["exact"]
        score = {"exact, %": 100 * exact, "loops a puzzle": filled[name].loops.double().mean().item()}
        print(json.dumps({"kind": "sampling", "how": name, "puzzles/s": 128 / seconds} | score), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
