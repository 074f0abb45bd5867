"""Use a trained model: solve puzzles, watch them being solved, measure the model.

    python sample.py sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
    python sample.py sudoku puzzles.txt                      # a file of many, or standard input
    python sample.py sudoku --show PUZZLE               # the denoising, step by step and loop by loop
    python sample.py sudoku --checkpoint runs/sudoku --steps 20 --loops adaptive PUZZLE
    python sample.py sudoku --data puzzles.csv --steps 1,5,20,81 --by level       # accuracy on a file
    python sample.py sudoku --data puzzles.csv --sweep       # accuracy by loops and steps

A puzzle is 81 digits with blanks as 0 . _ or *, on one line or as a drawn grid. Exit code: 0 if every answer
is right, 1 if one is not, 2 if the input is bad.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rmdm
import train_sudoku as sudoku
from rmdm import MASK, BadInput

WEIGHTS = {"sudoku": Path(__file__).parent / "weights" / "sudoku-small.pt"}
EPS = 0.1  # change of h below which `--loops adaptive` stops, eq. (7): saves little as yet, see the README
COLOR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33


def paint(text, color):
    return f"\033[{color}m{text}\033[0m" if COLOR else str(text)


def sure_color(p):
    return GREEN if p >= 0.9 else YELLOW if p >= 0.5 else RED


def place(cell):
    return f"r{cell // 9 + 1}c{cell % 9 + 1}"


# ---- solve and show ----


def read(arguments):
    """The puzzles named on the command line, in a file, or on standard input: (n, 81)."""
    text, where = " ".join(arguments), ""
    if not arguments or text == "-":
        text, where = sys.stdin.read(), "standard input"
    elif len(text) != 81 and re.search(r"[A-Za-z/\\]", text):  # not a puzzle, so a file
        where = text
        try:
            text = Path(text).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"{where}: {getattr(e, 'strerror', None) or 'not a text file'}") from e
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if where and any(len(line.strip()) >= 81 for _, line in lines):  # one puzzle a line; else a drawn grid
        puzzles = []
        for n, line in lines:
            try:
                puzzles.append(sudoku.parse(line))
            except BadInput as e:
                raise BadInput(f"{where}, line {n}: {e}") from None
        return np.stack(puzzles)
    return sudoku.parse("\n".join(line for _, line in lines))[None]


def as_far_as_right(puzzle, trace):
    """Replay the reveals, surest first in each step, up to the first that breaks a rule: (board, which rule)."""
    board = puzzle.copy()
    for step in trace:
        cells = step["revealed"].nonzero()[:, 0]
        for cell in cells[step["sure"][cells].argsort(descending=True)].tolist():
            board[cell] = step["x"][cell]
            if (broken := sudoku.conflict(board)) is not None:
                board[cell] = MASK
                return board, f"{place(cell)}={step['x'][cell]} breaks a rule, {broken}"
    return board, None


def side_by_side(*grids, gap="    "):
    return "\n".join(gap.join(lines) for lines in zip(*grids))


def show_steps(puzzle, trace):
    """What each denoising step revealed and how sure it was; on a terminal, one frame over the other."""
    for k, step in enumerate(trace, 1):
        new = step["revealed"].nonzero()[:, 0].tolist()
        x, sure = step["x"].tolist(), step["sure"].tolist()
        cells = [
            paint(x[i], BOLD) if puzzle[i] else paint(x[i], f"7;{sure_color(sure[i])}") if i in new else x[i]
            for i in range(81)
        ]
        if COLOR and k > 1:
            time.sleep(0.15)
            print("\033[14A\033[J", end="")  # 14 lines up, and clear from there
        print(f"step {k} of {len(trace)}, {step['loops']} loops: revealed {len(new)}")
        print("\n".join(sudoku.draw(cells)))
        best = sorted(new, key=lambda i: -sure[i])
        named = [paint(f"{place(i)}={x[i]} {100 * sure[i]:.1f}%", sure_color(sure[i])) for i in best[:4]]
        print("  ".join(named) + (f"  and {len(new) - 4} more" if len(new) > 4 else ""), "\n", flush=True)


def show_loops(model, puzzle, loops):
    """What the first denoising step would answer if it were read off after each loop."""
    x = torch.from_numpy(puzzle).long()[None].to(next(model.parameters()).device)
    with torch.no_grad():
        everything_masked = torch.ones(1, device=x.device)  # t = 1
        p = model(x, everything_masked, loops, range(1, loops + 1))[:, 0].softmax(-1).cpu()  # (L, 81, V)
    sure, digits = p.max(-1)
    blank = torch.from_numpy(puzzle == MASK)
    print("the first step, read off after each loop (blank where no digit reaches 50%):\n")
    grids = []
    for l in range(loops):
        cells = [
            paint(puzzle[i], BOLD) if puzzle[i]
            else paint(digits[l, i].item(), sure_color(sure[l, i])) if sure[l, i] >= 0.5 else 0
            for i in range(81)
        ]
        title = f"loop {l + 1}: {int((sure[l, blank] >= 0.9).sum())}/{int(blank.sum())} over 90%"
        grids.append([title.ljust(21), *sudoku.draw(cells)])
    for i in range(0, loops, 3):
        print(side_by_side(*grids[i : i + 3]), "\n")


def solve(model, puzzles, show, **how):
    """Print the answers to puzzles (n, 81), 100 at a time; True if all are right."""
    right, seconds = 0, 0.0
    for some in np.array_split(puzzles, range(100, len(puzzles), 100)):
        began = time.perf_counter()
        x = torch.from_numpy(some).long().to(next(model.parameters()).device)
        out = rmdm.sample(model, x, trace=True, **how)
        seconds += time.perf_counter() - began
        for n, puzzle in enumerate(some):
            trace = [{k: v[n].cpu() for k, v in step.items()} for step in out.trace if step["loops"][n]]
            if show:
                show_loops(model, puzzle, how["loops"] or model.config.loops)
                show_steps(puzzle, trace)
            board, broken = as_far_as_right(puzzle, trace)
            right += broken is None
            answer = [paint(d, BOLD if puzzle[i] else GREEN) if d else 0 for i, d in enumerate(board)]
            print(side_by_side(sudoku.draw([paint(d, BOLD) if d else 0 for d in puzzle]), sudoku.draw(answer)))
            cost = f"{out.passes[n]} steps, {out.nfe[n]} loops"
            if broken is None:
                print(f"{paint('right', GREEN)}, checked by the rules ({cost})\n")
            else:
                left = f"shown up to there, {(board == MASK).sum()} cells left"
                print(f"{paint('not solved', RED)}: {broken}; {left} ({cost})\n")
    print(f"{right} of {len(puzzles)} right, {seconds:.2f} s")
    return right == len(puzzles)


# ---- measure ----


def measure(model, path, by, **how):
    """Scores over a file, in constant memory: {group: scores} for each value of column `by`, then "all"."""
    totals = {}
    with tqdm(desc=f"{path}, T={how['steps']}", unit=" puzzles", dynamic_ncols=True, leave=False) as bar:
        for puzzles, solutions, labels in sudoku.read_puzzles(path, 1000, by):
            labels = np.array(labels)
            for label in dict.fromkeys(labels.tolist()):
                some = labels == label
                score = sudoku.evaluate(model, puzzles[some], solutions[some], **how)
                weighted = {key: score[key] * (1 if key in ("n", "seconds") else score["n"]) for key in score}
                for group in {label, "all"} if by else {"all"}:
                    total = totals.setdefault(group, dict.fromkeys(score, 0))
                    totals[group] = {key: total[key] + weighted[key] for key in score}
                bar.update(score["n"])
    if not totals:
        raise BadInput(f"{path}: no puzzle in it")
    totals["all"] = totals.pop("all")  # last
    return {
        group: {key: total[key] if key in ("n", "seconds") else total[key] / total["n"] for key in total}
        for group, total in totals.items()
    }


def sweep(model, path, **how):
    """Print accuracy by loops (rows) and steps (columns), all from this one model."""
    L, steps = model.config.loops, (1, 5, 20, 81)
    print(f"exact, %, on {path}, order {how['order']}\n      " + "".join(f"{f'T={T}':>8}" for T in steps))
    for loops in sorted({max(1, L // 4), max(1, L // 2), L, L * 3 // 2, L * 2}):
        scores = [measure(model, path, None, **how | {"steps": T, "loops": loops})["all"] for T in steps]
        print(f"L={loops:<4}" + "".join(f"{100 * score['exact']:8.1f}" for score in scores), flush=True)


def number(kind, low, high=float("inf")):
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < float("inf") else "")  # for argparse
    return parse


def main():
    parser = rmdm.command_line(__doc__)
    add = parser.add_argument
    add("task", choices=list(WEIGHTS))
    add("puzzle", nargs="*", help="a puzzle or a file of puzzles; default: standard input")
    add("--checkpoint", metavar="FILE_OR_RUN", help="default: the weights that come with this repository")
    add("--show", action="store_true", help="show the denoising: one step loop by loop, then step by step")
    add("--steps", default="81", metavar="T,...", help="denoising steps; default 81, a cell each")
    add("--loops", help="loops L in each step, a number or `adaptive`; default: as trained")
    add("--order", choices=rmdm.ORDERS, default="confidence")
    add("--threshold", type=number(float, 0, 1), help="at each step reveal all that is at least this sure")
    add("--temperature", type=number(float, 0, 100), help="of the digits drawn; default: 1 if ancestral, else 0")
    add("--seed", type=int, default=0, help="for orders and temperatures that draw")
    add("--data", metavar="FILE", nargs="+", help="measure on these files instead")
    add("--by", metavar="COLUMN", help="with --data: also by the values of this column")
    add("--json", action="store_true", help="with --data: one JSON object a line")
    add("--sweep", action="store_true", help="with --data: a table by loops and steps")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_intermixed_args()
    adaptive = args.loops == "adaptive"
    if not (args.loops is None or adaptive or args.loops.isdecimal() and 1 <= int(args.loops) <= 1000):
        raise BadInput(f"--loops is a number from 1 to 1000 or `adaptive`, not {args.loops!r}")
    if args.data and (args.puzzle or args.show) or not args.data and (args.by or args.json or args.sweep):
        raise BadInput("--data takes no puzzle and no --show; --by, --json and --sweep need --data")
    if args.sweep and (args.by or args.json or args.loops or args.steps != "81"):
        raise BadInput("--sweep prints its own table: it takes no --by, --json, --loops or --steps")
    if not all(T.isdecimal() and int(T) for T in args.steps.split(",")):
        raise BadInput(f"--steps is a number from 1, or several with commas, not {args.steps!r}")
    steps = [int(T) for T in args.steps.split(",")]
    device = rmdm.pick_device(args.device)
    model = rmdm.load(args.checkpoint or WEIGHTS[args.task], device, args.task)
    how = dict(
        loops=None if adaptive or not args.loops else int(args.loops),
        eps=EPS if adaptive else 0.0,
        order=args.order,
        threshold=args.threshold,
        temperature=args.temperature,
        generator=torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed),
    )
    if not args.data:
        return 0 if solve(model, read(args.puzzle), args.show, steps=steps[0], **how) else 1
    for path in args.data:
        if args.sweep:
            sweep(model, path, **how)
            continue
        for T in steps:
            for group, score in measure(model, path, args.by, steps=T, **how).items():
                if args.json:
                    known = {key: None if np.isnan(value) else value for key, value in score.items()}
                    print(json.dumps({"file": path, "group": group, "steps": T} | known), flush=True)
                    continue
                percent = "  ".join(f"{key} {100 * score[key]:5.1f}%" for key in ("exact", "valid", "cell"))
                cost = f"nfe {score['nfe']:.1f}  layer passes {score['layer_passes']:.1f}  {score['seconds']:.1f} s"
                print(f"{path}  {group}  T={T}  n={score['n']}  {percent}  {cost}", flush=True)


if __name__ == "__main__":
    rmdm.cli(main)
