"""Use a trained model: solve problems, watch them being solved, measure the model.

    python sample.py sudoku ...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976
    python sample.py countdown 35,27,20,42                   # operands, then the target
    python sample.py sudoku puzzles.txt                      # a file of many, or standard input
    python sample.py countdown --show 35,27,20,42            # the denoising, loop by loop and step by step
    python sample.py sudoku --checkpoint runs/sudoku --steps 20 --loops adaptive PUZZLE
    python sample.py sudoku --data puzzles.csv --steps 1,5,20,81 --by level       # accuracy on a file
    python sample.py countdown --data problems.jsonl --sweep                      # accuracy by loops and steps

A Sudoku is 81 digits with blanks as 0 . _ or *, on one line or as a drawn grid. Exit code: 0 if every answer
is right, 1 if one is not, 2 if the input is bad.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import rmdm  # isort: skip; first, since it sets up what torch reads when it is imported
import numpy as np
import torch
from tqdm import tqdm

import train_countdown
import train_sudoku
from rmdm import MASK, BadInput

# What a task brings: CHARS, LINE, SCORE, parse, read_file, start, evaluate, judge, place and draw.
TASKS = {"sudoku": train_sudoku, "countdown": train_countdown}
WEIGHTS = Path(__file__).parent / "weights"  # TASK-small.pt
EPS = 0.1  # of `--loops adaptive`, eq. (7): on Sudoku the largest tried that cost no accuracy, see the README
COLOR = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33


def paint(text, color):
    return f"\033[{color}m{text}\033[0m" if COLOR and text.strip() else text


def sure_color(p):
    return GREEN if p >= 0.9 else YELLOW if p >= 0.5 else RED


# ---- solve and show ----


def read(task, arguments):
    """The problems named on the command line, in a file, or on standard input: an array, one a row."""
    text, where = " ".join(arguments), ""
    if not text or text == "-":
        text, where = None, "standard input"
    elif Path(text[:255]).is_file() or len(text) != 81 and re.search(r"[A-Za-z/\\]", text):
        where = text
    if where:
        try:
            text = (Path(text).read_bytes() if text else sys.stdin.buffer.read()).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"{where}: {getattr(e, 'strerror', None) or 'not a text file'}") from e
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


def show_loops(task, model, x, editable, loops):
    """What the first denoising step would answer if it were read off after fewer loops."""
    with torch.no_grad():
        everything_masked = torch.ones(1, device=x.device)  # t = 1
        p = model(x[None], everything_masked, loops, range(1, loops + 1))[:, 0].softmax(-1).cpu()  # (L, N, V)
    (sure, token), x, editable = p.max(-1), x.tolist(), editable.cpu()
    print(f"the first step, read off loop by loop ({task.CHARS[MASK]} where nothing reaches 50%):\n")
    blocks, every = [], -(-loops // 9)  # at most nine pictures, the last loop's among them
    for l in range((loops - 1) % every, loops, every):
        cells = [task.CHARS[given] if given else task.CHARS[MASK] for given in x]
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
        names = {i: f"{task.place(i, len(cells))}{cells[i]} {100 * sure[i]:.1f}%" for i in new}
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
    right, seconds, device = 0, 0.0, next(model.parameters()).device
    for some in np.array_split(problems, range(100, len(problems), 100)):
        began = time.perf_counter()
        x, editable = task.start(model, some, device)
        out = rmdm.sample(model, x, editable, trace=True, **how)
        seconds += time.perf_counter() - began
        for n, problem in enumerate(some):
            trace = [{k: v[n].cpu() for k, v in step.items()} for step in out.trace if step["loops"][n]]
            if show:
                show_loops(task, model, x[n], editable[n], how["loops"] or model.config.loops)
                show_steps(task, editable[n], trace)
            tokens, wrong = task.judge(problem, out.x[n].tolist(), trace)
            right += wrong is None
            before = [paint(task.CHARS[token], BOLD) for token in x[n].tolist()]
            after = [paint(task.CHARS[t].strip(), GREEN if e else BOLD) for t, e in zip(tokens, editable[n])]
            grids = [task.draw(before), task.draw(after)]
            print(side_by_side(*grids) if len(grids[0]) > 1 else grids[1][0])
            verdict = paint("right", GREEN) + ", checked by the rules"
            if wrong:
                verdict = f"{paint('not solved', RED)}: {wrong}"
            print(f"{verdict} ({out.passes[n]} steps, {out.nfe[n]} loops)\n")
    print(f"{right} of {len(problems)} right, {seconds:.2f} s")
    return right == len(problems)


# ---- measure ----


def measure(task, model, path, by, **how):
    """Scores over a file, in constant memory: {group: scores} for each value of column `by`, then "all"."""
    totals = {}
    with tqdm(desc=f"{path}, T={how['steps']}", unit=" problems", dynamic_ncols=True, leave=False) as bar:
        for problems, solutions, labels in task.read_file(path, 1000, by):
            for label in dict.fromkeys(labels):
                some = np.array(labels) == label
                score = task.evaluate(model, problems[some], solutions[some], **how)
                for group in (label if label != "all" else f"{by}=all", "all") if by else ("all",):
                    old = totals.get(group, dict.fromkeys(score, 0))
                    n = old["n"] + score["n"]
                    totals[group] = {key: (old["n"] * old[key] + score["n"] * score[key]) / n for key in score}
                    totals[group] |= dict(n=n, seconds=old["seconds"] + score["seconds"])
                bar.update(score["n"])
    if not totals:
        raise BadInput(f"{path}: no problem in it")
    return totals | {"all": totals.pop("all")}  # last


def classical(path):
    """Print, as JSON, what solvers without a network do on a file of Sudokus: shares solved, and guesses."""
    found = [train_sudoku.classical(puzzles) for puzzles, _, _ in train_sudoku.read_file(path, 1000)]
    if not found:
        raise BadInput(f"{path}: no problem in it")
    naked, both, guesses = np.concatenate(found, 1)
    counts = {"guesses, median": np.median(guesses), "mean": guesses.mean(), "most": int(guesses.max())}
    shares = {"naked singles": naked.mean(), "naked and hidden singles": both.mean(), "search": (guesses >= 0).mean()}
    print(json.dumps(dict(file=path, n=len(naked)) | shares | counts), flush=True)


def report(about, score, as_json):
    """Print one line of scores; what is unknown (a file without solutions) is null, or left out."""
    if as_json:
        known = {key: None if np.isnan(value) else value for key, value in score.items()}
        return print(json.dumps(about | known), flush=True)
    cost = [f"nfe {score['nfe']:.1f}", f"layer passes {score['layer_passes']:.1f}", f"{score['seconds']:.1f} s"]
    shares = {key: x for key, x in score.items() if key not in ("n", "nfe", "layer_passes", "seconds")}
    shares = [f"{key} {100 * x:.1f}%" for key, x in shares.items() if not np.isnan(x)]
    what = [about["file"], about["group"], f"T={about['steps']}", f"n={score['n']}"]
    print("  ".join([*what, *shares, *cost]), flush=True)


def main():
    parser = rmdm.command_line(__doc__)
    add = parser.add_argument
    add("task", choices=list(TASKS))
    add("problem", nargs="*", help="a problem or a file of problems; default: standard input")
    add("--checkpoint", metavar="FILE_OR_RUN", help="default: the weights that come with this repository")
    add("--show", action="store_true", help="show the denoising: one step loop by loop, then step by step")
    add("--steps", metavar="T,...", help="denoising steps; default: as many as there are positions")
    add("--loops", help="loops L in each step, a number or `adaptive`; default: as trained")
    add("--eps", type=rmdm.within(float, 1e-6, 1e6), help=f"stop when h changes by a smaller share; adaptive: {EPS}")
    add("--order", choices=rmdm.ORDERS, default="confidence")
    add("--threshold", type=rmdm.within(float, 0, 1), help="at each step reveal all that is at least this sure")
    add("--temperature", type=rmdm.within(float, 0, 100), help="of the tokens drawn; default: 1 if ancestral, else 0")
    add("--seed", type=rmdm.within(int, 0, 2**32), default=0, help="for orders and temperatures that draw")
    add("--data", metavar="FILE", nargs="+", action="extend", help="measure on these files instead")
    add("--by", metavar="COLUMN", help="with --data: also by the values of this column")
    add("--json", action="store_true", help="with --data: one JSON object a line")
    add("--sweep", action="store_true", help="with --data: a table by loops and steps")
    add("--classical", action="store_true", help="with --data: Sudoku solvers without a network, instead")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_intermixed_args()
    adaptive = args.loops == "adaptive"
    if not (args.loops is None or adaptive or re.fullmatch("0*[1-9][0-9]{0,2}", args.loops)):
        raise BadInput(f"--loops is a number from 1 to 999 or `adaptive`, not {args.loops!r}")
    if args.data and (args.problem or args.show):
        raise BadInput("--data takes no problem and no --show")
    if not args.data and (args.by or args.json or args.sweep or args.classical):
        raise BadInput("--by, --json, --sweep and --classical need --data")
    if args.sweep and (args.by or args.json or args.loops or args.steps):
        raise BadInput("--sweep prints its own table: it takes no --by, --json, --loops or --steps")
    if args.steps and not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", args.steps):
        raise BadInput(f"--steps is a number from 1, or several with commas, not {args.steps[:40]!r}")
    if not args.data and "," in (args.steps or ""):
        raise BadInput("several --steps need --data")
    if args.classical:
        if args.task != "sudoku":
            raise BadInput("--classical is for Sudoku")
        return [classical(path) for path in args.data] and 0
    device, task = rmdm.pick_device(args.device), TASKS[args.task]
    checkpoint = args.checkpoint or WEIGHTS / f"{args.task}-small.pt"
    model = rmdm.load(checkpoint, device, args.task)
    L, N = model.config.loops, len(model.config.coords)
    steps = [int(T) for T in args.steps.split(",")] if args.steps else [N]
    how = dict(
        loops=None if adaptive or not args.loops else int(args.loops),
        eps=args.eps if args.eps is not None else EPS if adaptive else 0.0,
        order=args.order,
        threshold=args.threshold,
        temperature=args.temperature,
        generator=torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed),
    )
    if not args.data:
        return 0 if solve(task, model, read(task, args.problem), args.show, steps=steps[0], **how) else 1
    for path in args.data:
        if args.sweep:
            def first(L, T):
                score = measure(task, model, path, None, **how | {"steps": T, "loops": L})["all"]
                return 100 * score[task.SCORE]

            print(f"{task.SCORE}, %, on {path}, order {args.order}")
            rmdm.grid(first, sorted({max(1, L // 4), max(1, L // 2), L, L * 3 // 2, L * 2}), (1, 5, 20, N))
            continue
        for T in steps:
            for group, score in measure(task, model, path, args.by, steps=T, **how).items():
                about = dict(file=path, group=group, checkpoint=args.checkpoint or checkpoint.name, steps=T)
                about |= dict(loops="adaptive" if adaptive else how["loops"] or L)
                about |= dict(eps=how["eps"], order=args.order, threshold=args.threshold)
                report(about, score, args.json)


if __name__ == "__main__":
    rmdm.cli(main)
