"""Where do the loops help? The cross-entropy after each loop, by the share of the answer that is masked.

    python evidence/noise.py sudoku weights/sudoku-short.pt             # weights or a run
    python evidence/noise.py countdown RUN --data problems.jsonl        # problems of a file, with solutions

Without --data the problems are those that the training held out. Prints one JSON object, and a table
on standard error: a row a loop, a column a share t, nats a token that is masked on average. By eq. (3) the integral
over t of a row's numbers, times the number of editable tokens, is the NELBO with so many loops.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm
import train_countdown
import train_sudoku

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def held_out(model):
    """The sets of problems, with solutions, that the training of `model` tested on; the first is the main one."""
    about = model.about
    if about["data"] is not None:
        raise rmdm.BadInput(f"trained on {about['data']}: what it held out is known for generated problems alone")
    if about["task"] == "sudoku":
        puzzles = train_sudoku.generated(about["puzzles"] + train_sudoku.HELD_OUT, about["seed"])
        return train_sudoku.split(*puzzles, train_sudoku.HELD_OUT)[1:]
    problems = train_countdown.generate(about["numbers"], about["problems"], about["seed"])
    return train_countdown.split(*problems, about["seed"])[1:]


def by_noise(model, x0, editable):
    """{t: [nats after loop 1, 2, ..]} for the times t at which these shares are masked."""
    nats = {}
    for share in SHARES:
        t = rmdm.alpha_inverse(torch.full((len(x0),), 1 - share, device=x0.device))
        generator = torch.Generator(x0.device).manual_seed(0)
        ce, _, _ = rmdm.masked_ce(model, x0, *rmdm.corrupt(x0, t, editable, generator), t, supervise="all")
        nats[share] = (ce.sum((1, 2)) / (share * editable.sum())).tolist()
    return nats


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("sudoku", "countdown"))
    parser.add_argument("checkpoint", metavar="FILE_OR_RUN")
    parser.add_argument("--data", metavar="FILE", help="take the problems from this file")
    args = parser.parse_args()
    task = {"sudoku": train_sudoku, "countdown": train_countdown}[args.task]
    model = rmdm.load(args.checkpoint, task=args.task)
    if args.data:
        rows = [row for row in task.read_file(args.data) if row[1].any()]
        if not rows:
            raise rmdm.BadInput(f"{args.data}: no problem with a solution in it")
        problems, solutions = (np.array(part) for part in zip(*rows))
    else:
        problems, solutions = held_out(model)[0]
    _, editable = task.start(model, problems)
    x0 = torch.from_numpy(solutions if task is train_sudoku else task.encode(problems, solutions)).long()
    nats = by_noise(model, x0, editable)
    print(json.dumps(dict(checkpoint=args.checkpoint, data=args.data, n=len(x0), nats=nats)), flush=True)
    print("      " + "".join(f"{f't={t}':>8}" for t in nats), file=sys.stderr)
    for l, row in enumerate(zip(*nats.values()), 1):
        print(f"L={l:<4}" + "".join(f"{x:8.3f}" for x in row), file=sys.stderr)


if __name__ == "__main__":
    rmdm.run_script(main)
