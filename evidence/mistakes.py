"""What goes wrong in Countdown: search or arithmetic? First mistakes by kind, and whether answers begin well.

    python evidence/mistakes.py weights/countdown-3.pt              # weights or a run
    python evidence/mistakes.py RUN --data countdown_cd3.jsonl      # the problems of a file

Without --data the problems are those that the training held out. Prints one JSON object for each set
of problems, with shares of all answers: `solved`; `begins well`, the left side of the first equation is that of a
solution, whatever result is written behind it; and each kind of first mistake.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from noise import held_out

import rmdm
from train_countdown import OPS, calculate, check_text, decode, read_file, start

SIDE = re.compile("N([-+*/])N=".replace("N", "(0|[1-9][0-9]{0,8})"))  # the left side of an equation


def begins_well(problem, answer):
    """Whether the left side of the first equation begins a solution: judges the search apart from the arithmetic."""
    *left, target = map(int, problem)
    if not (found := SIDE.match(answer)):
        return False
    a, op, b = int(found[1]), found[2], int(found[3])
    for x in (a, b):
        if x not in left:
            return False
        left.remove(x)

    def solvable(values):
        if None in values or len(values) == 1:
            return values == [target]
        pairs = ((a, op, b, rest) for a, b, *rest in itertools.permutations(values) for op in OPS)
        return any(solvable([calculate(a, op, b), *rest]) for a, op, b, rest in pairs)

    return solvable([calculate(a, op, b), *left])


def kinds(n):
    """How what `check_text` says of an answer for n operands can begin."""
    false = [f"false equation {k}" for k in range(1, n)]
    return ["syntax", *false, "number not available", "number left over", "wrong target"]


def mistakes(model, problems, **how):
    """Answer problems (P, n+1) with rmdm.sample_all(**how): a dict of shares."""
    out = rmdm.sample_all(model, *start(model, problems), **how)
    answers = [decode(tokens) for tokens in out.x.tolist()]
    wrong = [check_text(*pair) for pair in zip(problems, answers)]
    well = [w is None or begins_well(*pair) for w, *pair in zip(wrong, problems, answers)]
    shares = {"n": len(problems), "solved": wrong.count(None) / len(wrong), "begins well": float(np.mean(well))}
    counts = {kind: sum(str(w).startswith(kind) for w in wrong) for kind in kinds(problems.shape[1] - 1)}
    return shares | {kind: count / len(wrong) for kind, count in counts.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="FILE_OR_RUN")
    parser.add_argument("--data", metavar="FILE", help="take the problems from this file")
    parser.add_argument("--steps", type=int, metavar="T", help="denoising steps; default: one token a step")
    args = parser.parse_args()
    model = rmdm.load(args.checkpoint, task="countdown")
    N = len(model.config.coords)
    if args.data:
        sets = {args.data: np.array([problem for problem, _ in read_file(args.data)])}
    else:
        sets = {f"held-out {key}": test for key, (test, _) in zip(("operands", "targets"), held_out(model))}
    for name, problems in sets.items():
        if not len(problems):
            raise rmdm.BadInput(f"{name}: no problem in it")
        steps = args.steps or N
        about = dict(set=name, checkpoint=str(args.checkpoint), steps=steps)
        print(json.dumps(about | mistakes(model, problems, steps=steps)), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
