"""Use a trained model: solve a puzzle, or measure the model on a file.

    python sample.py sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
    python sample.py sudoku --checkpoint runs/sudoku --steps 20 --order margin < puzzle.txt
    python sample.py sudoku --data puzzles.csv --steps 1 5 20 81        # accuracy on a published file
    python sample.py sudoku --data puzzles.csv --by level --json        # by a column of the file, as JSON

The exit code is 0 if the answer is right, 1 if it is not, 2 if the input is bad.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import rmdm
import train_sudoku as sudoku
from rmdm import BadInput

KEYS = ("n", "exact", "valid", "cell", "nfe", "layer_passes", "seconds")


def solve(model, text, steps, how):
    """Print the model's answer to one puzzle; True if it is right."""
    puzzle = sudoku.parse(text)
    began = time.perf_counter()
    x = torch.from_numpy(puzzle).long()[None].to(next(model.parameters()).device)
    out = rmdm.sample(model, x, steps=steps, **how)
    board = out.x[0].cpu().numpy()
    print(sudoku.draw(board))
    wrong = sudoku.conflict(board)
    print(
        f"{'right: every row, column and box holds 1 to 9' if wrong is None else 'wrong: ' + wrong} "
        f"({out.passes[0]} steps, {out.nfe[0]} loops, {time.perf_counter() - began:.2f} s)"
    )
    return wrong is None


def measure(model, path, by, steps, how):
    """Scores over a file, for all of it ("all") and for each value of its column `by`: {group: scores}."""
    groups = {}
    with tqdm(desc=f"{path}, T={steps}", unit="puzzle") as bar:
        for puzzles, solutions, labels in sudoku.read_puzzles(path, 1000, by):
            labels = np.array(labels)
            for label in dict.fromkeys(labels.tolist()):
                some = labels == label
                score = sudoku.evaluate(model, puzzles[some], solutions[some], steps=steps, **how)
                groups.setdefault(label, []).append([score[key] for key in KEYS])
                bar.update(int(some.sum()))
    if not groups:
        raise BadInput(f"{path}: no puzzle in it")
    if by:
        groups["all"] = sum(groups.values(), [])
    result = {}
    for label, rows in groups.items():
        n, *means, seconds = zip(*rows)
        means = [float(np.average(mean, weights=n)) for mean in means]
        result[label or "all"] = dict(zip(KEYS, (sum(n), *means, sum(seconds))))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=["sudoku"])
    add("puzzle", nargs="*", help="81 characters, blanks as 0 . _ or *; default: read from standard input")
    add("--checkpoint", metavar="FILE_OR_RUN", default="runs/sudoku", help="default: %(default)s")
    add("--data", metavar="FILE", nargs="+", help="measure on these files instead")
    add("--by", metavar="COLUMN", help="with --data: break the result down by this column")
    add("--json", action="store_true", help="with --data: one JSON object a line")
    add("--steps", type=int, nargs="+", default=[81], help="denoising steps T (default: 81, one cell each)")
    add("--loops", type=int, help="loops L in each step (default: as trained)")
    add("--order", choices=rmdm.ORDERS, default="confidence")
    add("--seed", type=int, default=0, help="for the orders that draw (default: 0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_intermixed_args()
    if min(args.steps) < 1 or (args.loops or 1) < 1:
        raise BadInput("--steps and --loops are at least 1")
    device = rmdm.pick_device(args.device)
    model = rmdm.load(args.checkpoint, device, "sudoku")
    how = dict(loops=args.loops, order=args.order, generator=torch.Generator(device).manual_seed(args.seed))
    if not args.data:
        return 0 if solve(model, " ".join(args.puzzle) or sys.stdin.read(), args.steps[0], how) else 1
    for path in args.data:
        for steps in args.steps:
            for label, score in measure(model, path, args.by, steps, how).items():
                if args.json:
                    print(json.dumps({"file": path, "group": label, "steps": steps} | score), flush=True)
                    continue
                percent = "  ".join(f"{key} {100 * score[key]:5.1f}%" for key in ("exact", "valid", "cell"))
                print(
                    f"{path}  {label}  T={steps}  n={score['n']}  {percent}  nfe {score['nfe']:.1f}  "
                    f"layer passes {score['layer_passes']:.1f}  {score['seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    rmdm.cli(main)
