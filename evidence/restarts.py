"""Which options make the most of restarts, eq. (8)? Every variant has as many tries at hard problems that were
generated here, so that no public set is tuned on.

    python evidence/restarts.py sudoku       # the 64 of 8,192 generated puzzles on which a search guesses most often
    python evidence/restarts.py countdown    # 64 generated problems, four operands, with held-out targets

A variant is one JSON object a line: the share of tries that succeed, their mean loops, and what share of the problems
would be solved for the operations of so many loops of the default's model. This does not depend on the machine.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from results import flops

import rmdm
import sample
import train_countdown
import train_sudoku

TRIES, BUDGETS = 32, {"sudoku": (125, 250, 500, 1000), "countdown": (32, 64, 128, 256)}  # loops
STEPS, WEIGHTS = {"sudoku": 81, "countdown": 52}, {"sudoku": "sudoku-short", "countdown": "countdown-4"}
VARIANTS = {  # what differs from the default of further tries in sample.py
    "sudoku": {
        "the default": {},
        "nothing given up": dict(give_up=None),
        "every step from h^0": dict(later_loops=None),
        "4 later loops": dict(later_loops=4),
        "32 loops, 16 later": dict(loops=32, later_loops=16),
        "threshold 0.97": dict(threshold=0.97),
        "threshold 0.9": dict(threshold=0.9),
        "noise 0.1": dict(noise=0.1),
        "noise 0.3": dict(noise=0.3),
        "long model": dict(model="sudoku-long"),
    },
    "countdown": {
        "the default": {},
        "nothing given up": dict(give_up=None),
        "8 steps": dict(steps=8),
        "threshold 0.9": dict(threshold=0.9),
        "1 loop": dict(loops=1),
        "surest first": dict(order="confidence"),
        "temperature 1.3": dict(temperature=1.3),
    },
}


def problems(task):
    """Problems (64, ..) on which nothing was trained."""
    if task is train_countdown:
        found, _ = train_countdown.generate(4, 3000, seed=777)
        found = found[np.isin(found[:, 4], train_countdown.held_out_targets(4))]
        return found[np.random.default_rng(0).permutation(len(found))[:64]]
    from classical import candidates, depth_first

    puzzles, _ = train_sudoku.generated(8192, seed=424_242)
    return puzzles[np.argsort(-depth_first(candidates(puzzles))[1], kind="stable")[:64]]


def within(right, tries):
    """From right (n, TRIES) bool: the share of problems that so many tries solve, in expectation, without bias. None
    for less than one try."""
    if tries < 1:
        return None
    tries = min(int(tries), TRIES)
    wrong = TRIES - right.sum(1)
    none = [np.prod((w - np.arange(tries)) / (TRIES - np.arange(tries))) for w in wrong]  # 0 where tries > w
    return 1 - np.mean(none)


def main():
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    rmdm.require(name in VARIANTS, "usage: python evidence/restarts.py sudoku|countdown")
    task, base = sample.TASKS[name], dict(steps=STEPS[name]) | sample.SOLVE[name]["again"]
    given = problems(task)
    rows, base_loop = given.repeat(TRIES, 0), None
    for variant, change in VARIANTS[name].items():
        options = base | dict(give_up=lambda x: sample.hopeless(task, x, 1)) | change
        file = Path(__file__).parents[1] / "weights" / f"{options.pop('model', WEIGHTS[name])}.pt"
        model, generator, right, loops = rmdm.load(file), torch.Generator().manual_seed(0), [], 0
        form = asdict(model.config)
        one_loop = flops(form | dict(coords=len(form["coords"])), 1, 0)  # operations
        base_loop = base_loop or one_loop
        for i in range(0, len(rows), 64):
            some = rows[i : i + 64]
            filled = sample.attempt(task, model, some, task.SYMMETRY, generator, False, options)
            right.append(task.right(some, filled.x.numpy()))
            loops += filled.loops.sum().item()
        right, loops = np.concatenate(right).reshape(len(given), TRIES), loops / len(rows)
        solved = {f"{budget} loops": within(right, budget * base_loop / (loops * one_loop)) for budget in BUDGETS[name]}
        row = dict(task=name, variant=variant, n=len(given), tries=TRIES, right=right.mean(), loops=loops)
        print(json.dumps(row | solved), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rmdm.run_script(main)
