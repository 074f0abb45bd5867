"""Use a trained model: solve problems, watch them being solved, measure the model.

    python sample.py sudoku ...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976
    python sample.py countdown 35,27,20,42                   # operands, then the target
    python sample.py sudoku puzzles.txt                      # a file of many, or standard input
    python sample.py countdown --show 35,27,20,42            # the denoising, loop by loop and step by step
    python sample.py sudoku --checkpoint runs/sudoku --steps 20 --tries 1 PUZZLE
    python sample.py sudoku --data puzzles.csv --steps 1,5,20,81    # accuracy on a file

A Sudoku is 81 digits with blanks as 0 . _ or *, on one line or as a drawn grid. Exit code: 0 if every answer
is right, 1 if one is not, 2 if the input is bad.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import rmdm
import train_countdown
import train_sudoku
from rmdm import MASK, BadInput

# What a task brings: CHARS, LINE, SCORE, AGAIN, parse, read_file, start, judge, check, evaluate, name, draw.
TASKS = {"sudoku": train_sudoku, "countdown": train_countdown}
WEIGHTS = {81: "sudoku-long.pt", 4: "countdown-3.pt", 5: "countdown-4.pt"}  # by the length of a problem
COLOR = bool(sys.stdout and sys.stdout.isatty()) and not os.environ.get("NO_COLOR")
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33


def paint(text, color):
    return f"\033[{color}m{text}\033[0m" if COLOR and text.strip() else text


def sure_color(p):
    return GREEN if p >= 0.9 else YELLOW if p >= 0.5 else RED


# ---- solve and show ----


def read(task, arguments):
    """The problems named on the command line, in a file, or on standard input: an array, one a row."""
    text, where = " ".join(arguments), ""
    if not arguments or text == "-":
        where, text = "standard input", (sys.stdin.buffer.read() if sys.stdin else b"").decode("utf-8-sig", "replace")
    elif os.path.isfile(text):
        where, text = text, Path(text).read_text("utf-8-sig", "replace")
    elif re.search(r"[A-Za-z/\\]", text):
        raise BadInput(f"{text[:80]}: neither a problem nor a file")
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not where or not any(len(line.strip()) >= task.LINE for _, line in lines):
        return task.parse("\n".join(line for _, line in lines))[None]  # one, maybe drawn over many lines
    problems = []
    for n, line in lines:
        try:
            problems.append(task.parse(line))
            if len(problems[0]) != len(problems[-1]):
                raise BadInput("not as long as the problems before")
        except BadInput as e:
            raise BadInput(f"{where}, line {n}: {e}") from None
    return np.stack(problems)


def side_by_side(*blocks):
    return "\n".join("    ".join(lines) for lines in zip(*blocks))


@torch.no_grad()
def show_loops(task, model, x, editable, loops):
    """What the first denoising step would answer if it were read off after fewer loops."""
    everything_masked = torch.ones(1, device=x.device)  # t = 1
    p = model(x[None], everything_masked, loops, "all")[0][:, 0].softmax(-1).cpu()  # (L, N, V)
    (sure, token), x, editable = p.max(-1), x.tolist(), editable.cpu()
    print(f"the first step, read off loop by loop ({task.CHARS[MASK]} where nothing reaches 50%):\n")
    blocks, every = [], -(-loops // 9)  # at most nine pictures, the last loop's among them
    for l in range((loops - 1) % every, loops, every):
        cells = [task.CHARS[given] for given in x]
        for i in editable.nonzero()[:, 0].tolist():
            if sure[l, i] >= 0.5:
                cells[i] = paint(task.CHARS[token[l, i]], sure_color(sure[l, i]))
        title = f"loop {l + 1}: {int((sure[l, editable] >= 0.9).sum())}/{int(editable.sum())} > 90%"
        blocks.append([title.ljust(21), *task.draw(cells)])
    across = 3 if len(blocks[0]) > 2 else 1  # grids side by side, lines one below the other
    for i in range(0, len(blocks), across):
        print(side_by_side(*blocks[i : i + across]), "\n" if across > 1 else "")


def show_steps(task, editable, trace):
    """What each denoising step revealed and how sure it was; on a terminal, one frame over the other."""
    for k, step in enumerate(trace, 1):
        new = step["revealed"].nonzero()[:, 0].tolist()
        sure, cells = step["sure"].tolist(), [task.CHARS[token] for token in step["x"].tolist()]
        names = {i: f"{task.name(i, len(cells))}{cells[i]} {100 * sure[i]:.1f}%" for i in new}
        for i in range(len(cells)):
            if i in new:
                cells[i] = paint(cells[i], f"7;{sure_color(sure[i])}")
            elif not editable[i]:
                cells[i] = paint(cells[i], BOLD)
        lines = task.draw(cells)
        if COLOR and k > 1:
            time.sleep(0.15)
            print(f"\033[{len(lines) + 3}A\033[J", end="")  # so many lines up, and clear from there
        print(f"step {k} of {len(trace)}, {step['loops']} loops: revealed {len(new)}", *lines, sep="\n")
        best = [paint(names[i], sure_color(sure[i])) for i in sorted(new, key=lambda i: -sure[i])[:4]]
        print("  ".join(best) + (f"  and {len(new) - 4} more" if len(new) > 4 else ""), "\n", flush=True)


def solve(task, model, problems, show, **how):
    """Print the answers to problems (n, ...), 100 at a time; True if all are right."""
    right, began = 0, time.perf_counter()
    for some in np.array_split(problems, range(100, len(problems), 100)):
        x, editable = task.start(model, some)
        out = rmdm.sample_all(model, x, editable, lambda i, x: task.judge(some[i.tolist()], x), trace=show, **how)
        for n, answer in enumerate(out.x.cpu().numpy()):
            if show:
                show_loops(task, model, x[n], editable[n], how["loops"] or model.config.loops)
                show_steps(task, editable[n], out.trace[n])
            wrong = task.check(some[n], answer)
            right += wrong is None
            before = [paint(task.CHARS[token], BOLD) for token in x[n].tolist()]
            after = [paint(task.CHARS[t].strip() or " ", GREEN if e else BOLD) for t, e in zip(answer, editable[n])]
            grids = [task.draw(before), task.draw(after)]
            print(side_by_side(*grids) if len(grids[0]) > 1 else grids[1][0])
            verdict = f"{paint('right', GREEN)}, checked by the rules"
            if wrong:
                verdict = f"{paint('not solved', RED)}: {wrong}"
            print(f"{verdict} (tries: {out.tries[n]}, steps: {out.passes[n]}, loops: {out.nfe[n].sum()})\n")
    print(f"{right} of {len(problems)} right, {time.perf_counter() - began:.2f} s")
    return right == len(problems)


# ---- the command ----


def load(args, problem):
    """The checkpoint as named, or the one that comes along for such a problem, and its model."""
    checkpoint = args.checkpoint
    if checkpoint is None:
        if len(problem) not in WEIGHTS:
            raise BadInput(f"no weights for {len(problem) - 1} operands come along: name your own by --checkpoint")
        checkpoint = Path(__file__).parent / "weights" / WEIGHTS[len(problem)]
    return checkpoint, rmdm.load(checkpoint, args.device, args.task)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=list(TASKS))
    add("problem", nargs="*", help="a problem or a file of problems; default: standard input")
    add("--checkpoint", metavar="FILE_OR_RUN", help="default: the weights that come with this repository")
    add("--show", action="store_true", help="show the denoising: one step loop by loop, then step by step")
    add("--steps", metavar="T,..", help="denoising steps; default: as many as there are positions")
    add("--loops", type=int, metavar="L", help="loops in each step; default: as trained")
    add("--eps", type=float, default=0.0, help="stop looping when h changes by a smaller share, say 0.1")
    add("--order", choices=rmdm.ORDERS, default="confidence")
    add("--threshold", type=float, help="reveal all that is at least so sure; default: 0.99 (none with --data)")
    add("--temperature", type=float, help="of the tokens drawn; default: 1 if ancestral, else 0")
    add("--tries", type=int, help="try again what the rules refuse; default: 32 (1 with --data)")
    add("--noise", type=float, help="on h^0, in all tries but the first; default: 0.2 (Countdown: 0)")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--data", metavar="FILE", help="measure on this file instead")
    add("--json", action="store_true", help="with --data: one JSON object a line")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    args = parser.parse_intermixed_args()
    args.device, task = rmdm.pick_device(args.device), TASKS[args.task]
    if args.steps is not None and not re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", args.steps):
        raise BadInput(f"--steps is a number, or several with commas, not {args.steps[:40]!r}")
    if not 0 <= args.seed < 2**32 or not 0 <= (args.noise or 0) < float("inf"):
        raise BadInput("--seed is from 0 to below 2**32, --noise at least 0")
    steps = [int(T) for T in args.steps.split(",")] if args.steps else []
    if args.data is None:  # for solving, what solves most in seconds; measuring is of one careful try unless asked
        args.tries = 32 if args.tries is None else args.tries
        args.threshold = 0.99 if args.threshold is None and args.order != "ancestral" else args.threshold
    how = {name: getattr(args, name) for name in ("loops", "eps", "order", "threshold", "temperature")}
    how |= dict(tries=1 if args.tries is None else args.tries)
    how["again"] = task.AGAIN | ({} if args.noise is None else dict(noise=args.noise))
    generator = torch.Generator(args.device)
    if args.data is None:
        if args.json or len(steps) > 1:
            raise BadInput("--json and several --steps need --data")
        problems = read(task, args.problem)
        _, model = load(args, problems[0])
        steps = steps[0] if steps else len(model.config.coords)
        how |= dict(steps=steps, generator=generator.manual_seed(args.seed))
        return 0 if solve(task, model, problems, args.show, **how) else 1
    if args.problem or args.show:
        raise BadInput("--data takes no problem and no --show")
    rows = list(task.read_file(args.data))
    if not rows:
        raise BadInput(f"{args.data}: no problem in it")
    problems, solutions = (np.array(part) for part in zip(*rows))
    checkpoint, model = load(args, problems[0])
    for T in steps or [len(model.config.coords)]:  # for each the generator anew: no score depends on another
        score = task.evaluate(model, problems, solutions, steps=T, generator=generator.manual_seed(args.seed), **how)
        about = dict(file=args.data, checkpoint=str(checkpoint), steps=T) | how
        about |= dict(loops=args.loops or model.config.loops, max_tries=how["tries"]) | score
        if args.json:
            print(json.dumps(about, default=lambda f: f.__name__), flush=True)
            continue
        keys = [key for key in (task.SCORE, "valid", "within_1", "cell") if score.get(key) is not None]
        shares = [f"{key} {100 * score[key]:.1f}%" for key in keys]
        cost = f"tries {score['tries']:.2f}  nfe {score['nfe']:.1f}  {score['seconds']:.1f} s"
        print("  ".join([args.data, f"T={T}", f"n={score['n']}", *shares, cost]), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
