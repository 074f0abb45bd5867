"""Use a trained model: solve problems, watch them being solved, or measure the model.

    python sample.py sudoku ...6...1..7......8.3.4.1.........6.5.41...3..85...3...2...19...7....8.........976
    python sample.py countdown 35,27,20,42                   # operands, then the target
    python sample.py sudoku puzzles.txt                      # a file of many, or standard input
    python sample.py countdown --show 35,27,20,42            # the denoising, loop by loop and step by step
    python sample.py sudoku --checkpoint runs/sudoku --steps 20 --tries 1 PUZZLE
    python sample.py sudoku --data puzzles.csv --steps 1,5,20,81    # scores on a file

Without --data it *solves*: an answer that breaks the task's rules is tried again, many times. With --data it
*measures*: one plain try a problem. With --data and --tries it measures what solving would make of the file.

A Sudoku is 81 digits, with 0 . _ or * for a blank, on one line or drawn as a grid. Exit code: 0 if every answer is
right, 1 if one is not, 2 if the input is bad. With --data it is 0 for any scores.
"""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import rmdm
import train_countdown
import train_sudoku
from rmdm import MASK, BadInput, require

# What a task brings: CHARS, LENGTHS, SCORE, SYMMETRY, read, start, right, broken, check, score, cell_name, draw, and
# picture if SYMMETRY is not None.
TASKS = {"sudoku": train_sudoku, "countdown": train_countdown}
COLOR = bool(sys.stdout and sys.stdout.isatty()) and not os.environ.get("NO_COLOR")
BOLD, RED, GREEN, YELLOW = 1, 31, 32, 33

# The weights of a first try and of further tries, by the length of a problem: 81 cells, or operands and target.
WEIGHTS = {
    81: ("sudoku-long.pt", "sudoku-short.pt"),
    4: ("countdown-3.pt", "countdown-3.pt"),
    5: ("countdown-4.pt", "countdown-4.pt"),
}
# At most how many tries, and the options of rmdm.sample in the first try and in further ones. A quick first try solves
# what is easy. For the rest many cheap tries solve more than a few careful ones. evidence/restarts.py compares options
# on hard problems that it generates.
QUICK = dict(loops=16, later_loops=8, threshold=0.99)
SOLVE = {
    "sudoku": dict(tries=256, first=QUICK, again=QUICK | dict(noise=0.2)),
    "countdown": dict(
        tries=1024,
        first=dict(threshold=0.99),
        again=dict(threshold=0.99, order="random", temperature=1.0),
    ),
}
MEASURE = dict(tries=1, first={}, again={})  # one try as in the paper: no threshold, no later_loops
BATCH = {"cpu": 64, "cuda": 1024}  # tries side by side; on a CPU more gain nothing


# ---- restarts, eq. (8): ours ----

@dataclass
class Solved:
    """What `solve` returns, for P problems."""

    x: np.ndarray  # (P, N) answers: the first right one, else the last
    tries: np.ndarray  # (P,) tries that were run
    first: np.ndarray  # (P,) which try was the first right one; 0 = none
    steps: np.ndarray  # (P,) denoising steps in all tries
    loops: np.ndarray  # (P,) loops in all tries
    traces: list  # if asked for: the denoising steps of the answer, see rmdm.Filled
    rounds: list  # (tries a problem so far, share solved, seconds so far) after each round

    @property
    def right(self):
        """(P,) bool."""
        return self.first > 0

    def scores(self):
        """Means over the problems, and the share solved within n tries, for n = 1, 2, 4, .."""
        means = {key: getattr(self, key).mean().item() for key in ("tries", "steps", "loops")}
        limits = (2**k for k in range(self.rounds[-1][0].bit_length()))
        return means | {f"within_{n}": (self.right & (self.first <= n)).mean().item() for n in limits}


def solve(task, models, problems, steps=1, tries=1, first={}, again={}, generator=None, trace=False):
    """Solve problems (P, ..) by rmdm.sample, with restarts: what the task's rules refuse is tried again.

    models        those of the first try and of further tries
    steps, tries  denoising steps in a try, and tries: at most so many
    first, again  options of rmdm.sample, in the first try and in further tries. Where the task has symmetries (Sudoku),
                  each further try sees the problem through a random one

    After the first try, problems that are left get several tries in each round: 8, then 16, and so on, as far as a
    batch has room. Side by side in one batch they cost hardly more than one. All tries of a round are counted. A try
    ends as soon as it breaks a rule, or another one of its round has solved the problem."""
    P, N, batch = len(problems), len(models[0].config.coords), BATCH[models[0].coords.device.type]
    require(1 <= tries <= 10**6, "tries is from 1 to a million")
    out = Solved(np.zeros((P, N), int), *np.zeros((4, P), int), [None] * P, [])
    todo, began = np.arange(P), time.perf_counter()
    run = 0  # tries that each problem in `todo` has had
    bar = rmdm.progress(total=P, desc="solved", unit="problem", leave=False, delay=1)  # none in the first second
    try:
        while len(todo) and run < tries:
            room = max(1, batch // len(todo))
            k = min(tries - run, 4 << len(out.rounds), room) if run else 1  # tries of each: 1, then 8, 16, ..
            for some in np.array_split(todo, range(batch // k, len(todo), batch // k)):
                rows = some.repeat(k)  # each problem k times
                symmetry = task.SYMMETRY if run else None
                options = dict(steps=steps) | (again if run else first)
                if tries > 1:  # a single try is seen through, for its score
                    options |= dict(give_up=lambda x: hopeless(task, x, k))
                filled = attempt(task, models[run > 0], problems[rows], symmetry, generator, trace, options)
                x = filled.x.cpu().numpy()
                good = task.right(problems[rows], x).reshape(-1, k)
                chosen = np.where(good.any(1), good.argmax(1), k - 1)  # the first right one, or the last
                at = np.arange(len(some)) * k + chosen
                out.x[some] = x[at]
                out.first[some] = np.where(good.any(1), run + 1 + chosen, 0)
                out.tries[some] += k
                out.steps[some] += filled.steps.cpu().numpy().reshape(-1, k).sum(1)
                out.loops[some] += filled.loops.cpu().numpy().reshape(-1, k).sum(1)
                if trace:
                    for i, row in zip(some, at):
                        taken = ({key: value[row] for key, value in step.items()} for step in filled.trace)
                        out.traces[i] = [step for step in taken if step["loops"]]
                bar.update(int(good.any(1).sum()))
            run, todo = run + k, todo[~out.right[todo]]
            out.rounds.append((run, out.right.mean().item(), time.perf_counter() - began))
    except KeyboardInterrupt:
        spent = f"{out.tries.sum():,} tries, {out.loops.sum():,} loops, {time.perf_counter() - began:.1f} s"
        raise KeyboardInterrupt(f"stopped: {out.right.sum()} of {P} solved after {spent}") from None
    finally:
        bar.close()
    return out


def hopeless(task, x, k):
    """Which of k tries at each problem, x (P * k, N), need not go on: (P * k,) bool. Those that break a rule already,
    and those beside one that is full and breaks none."""
    broken = task.broken(x)
    solved = ~broken & (x != MASK).all(1)
    return broken | solved.view(-1, k).any(1).repeat_interleave(k)


def attempt(task, model, problems, symmetry, generator, trace, options):
    """One try at each of the problems, through a random symmetry if the task has one: rmdm.Filled.

    options are those of rmdm.sample. Its `give_up` sees x as it is after the symmetry."""
    x, editable = task.start(model, problems)
    if symmetry is None:
        return rmdm.sample(model, x, editable, generator=generator, trace=trace, **options)
    source, names = symmetry(len(x), generator, x.device)
    x, editable = task.picture(x, source, names), editable.gather(1, source)
    filled = rmdm.sample(model, x, editable, generator=generator, trace=trace, **options)
    source, names = source.argsort(1), names.argsort(1)  # the way back
    filled.x = task.picture(filled.x, source, names)
    for step in filled.trace:
        step |= {key: step[key].gather(1, source) for key in ("revealed", "sure")}
        step["x"] = task.picture(step["x"], source, names)
    return filled


# ---- show ----


def paint(text, color):
    return f"\033[{color}m{text}\033[0m" if COLOR and text.strip() else text


def sure_color(p):
    return GREEN if p >= 0.9 else YELLOW if p >= 0.5 else RED


def side_by_side(*blocks):
    return "\n".join("    ".join(lines) for lines in zip(*blocks))


@torch.no_grad()
def show_loops(task, model, x, editable, loops):
    """What the first denoising step would answer if it were read off after fewer loops."""
    t = torch.ones(1, device=x.device)  # everything is masked
    p = model(x[None], t, loops, "all")[0][:, 0].softmax(-1).cpu()  # (L, N, V)
    (sure, token), x, editable = p.max(-1), x.tolist(), editable.cpu()
    print(f"the first step, read off loop by loop ({task.CHARS[MASK]} where nothing reaches 50%):\n")
    blocks, every = [], -(-loops // 9)  # at most nine pictures, the last loop's among them
    for l in range((loops - 1) % every, loops, every):
        cells = [task.CHARS[given] for given in x]
        for i in editable.nonzero()[:, 0].tolist():
            if sure[l, i] >= 0.5:
                cells[i] = paint(task.CHARS[token[l, i]], sure_color(sure[l, i]))
        title = f"loop {l + 1}: {int((sure[l, editable] >= 0.9).sum())}/{int(editable.sum())} at 90%"
        blocks.append([title.ljust(21), *task.draw(cells)])
    across = 3 if len(blocks[0]) > 2 else 1  # grids side by side, lines one below the other
    for i in range(0, len(blocks), across):
        print(side_by_side(*blocks[i : i + across]), "\n" if across > 1 else "")


def show_steps(task, editable, trace):
    """What each denoising step revealed and how sure it was; on a terminal, one frame over the other."""
    for k, step in enumerate(trace, 1):
        new = step["revealed"].nonzero()[:, 0].tolist()
        sure, cells = step["sure"].tolist(), [task.CHARS[token] for token in step["x"].tolist()]
        names = {i: f"{task.cell_name(i, len(cells))}{cells[i]} {100 * sure[i]:.1f}%" for i in new}
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


def show(task, model, problems, out, trace, loops):
    """Print the answers, and with `trace` how they came about: the first step with so many loops, then all steps."""
    x, editable = task.start(model, problems)
    for n, answer in enumerate(out.x):
        if trace:
            show_loops(task, model, x[n], editable[n], loops)
            show_steps(task, editable[n], out.traces[n])
        before = [paint(task.CHARS[token], BOLD) for token in x[n].tolist()]
        after = [paint(task.CHARS[t], GREEN if e else BOLD) for t, e in zip(answer, editable[n])]
        grids = [task.draw(before), task.draw(after)]
        print(side_by_side(*grids) if len(grids[0]) > 1 else grids[1][0])
        verdict = f"{paint('right', GREEN)}, checked by the rules"
        if wrong := task.check(answer, problems[n]):
            verdict = f"{paint('not solved', RED)}: {wrong}"
        print(f"{verdict} (tries: {out.tries[n]}, steps: {out.steps[n]}, loops: {out.loops[n]})\n", flush=True)


# ---- the command ----


def read(task, arguments, path, operands):
    """What a file, the command line, or standard input holds: problems, solutions, and a count of skipped rows."""
    text, where = " ".join(arguments), ""
    if path is not None or os.path.exists(text):
        where = text if path is None else path
        text = rmdm.read_text(where)
    elif not arguments or text == "-":
        where = "standard input"
        text = rmdm.read_text(where, sys.stdin.buffer)
    else:
        require(not re.search(r"[A-Za-z/\\]", text), f"{text[:80]!r}: neither a problem nor a file")
    return task.read(text, where, operands)


def load(name, checkpoint, length, device):
    """The models of a first try and of further tries, and the names of their files."""
    files = [checkpoint] * 2
    if checkpoint is None:
        require(length in WEIGHTS, f"no weights for {length - 1} operands come along: name your own by --checkpoint")
        files = [Path(__file__).parent / "weights" / file for file in WEIGHTS[length]]
    task, models = TASKS[name], {file: rmdm.load(file, device, name) for file in files}
    for file, model in models.items():
        shape = model.config.vocab, len(model.config.coords)
        require(shape[0] == len(task.CHARS) and shape[1] in task.LENGTHS, f"{file}: (V, N) = {shape} are not {name}'s")
    return [models[file] for file in files], [str(file) for file in files]


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=list(TASKS))
    add("problem", nargs="*", help="a problem or a file of problems; default: standard input")
    add("--checkpoint", metavar="FILE_OR_RUN", help="default: the weights that come with this repository")
    add("--show", action="store_true", help="show the denoising: one step loop by loop, then step by step")
    add("--steps", metavar="T,..", help="denoising steps; default: as many as there are positions")
    add("--loops", type=int, metavar="L", help="loops in each step; default: as trained, or what solves most")
    add("--later-loops", type=int, metavar="L", help="loops in each later step, on from the h of the one before")
    add("--eps", type=float, help="stop looping when h changes by a smaller share, say 0.1")
    add("--order", choices=rmdm.ORDERS, help="which tokens are revealed first; default: confidence")
    add("--threshold", type=float, help="reveal all that is at least so sure (none with --data, unless given)")
    add("--temperature", type=float, help="of the tokens drawn")
    add("--tries", type=int, help="try again what the rules refuse; default: 256, Countdown 1024, with --data 1")
    add("--noise", type=float, help="on h^0, in all tries but the first; default: 0.2, Countdown 0")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--data", metavar="FILE", help="measure on this file instead")
    add("--json", action="store_true", help="with --data: one JSON object a line")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    args = parser.parse_intermixed_args()
    if args.steps is not None and not re.fullmatch("[0-9]{1,6}(,[0-9]{1,6})*", args.steps):
        raise BadInput(f"--steps is a number, or several with commas, not {args.steps[:40]!r}")
    require(0 <= args.seed < 2**32, "--seed is from 0 to below 2**32")
    if args.data is None:
        require(not args.json and "," not in (args.steps or ""), "--json and several --steps need --data")
    else:
        require(not args.problem and not args.show, "--data takes no problem and no --show")
    return args


def settings(args):
    """How to solve or to measure: the defaults, and what the command line gives, for all tries (noise: all but the
    first)."""
    chosen = MEASURE if args.data is not None and args.tries in (None, 1) else SOLVE[args.task]
    tries = chosen["tries"] if args.tries is None else args.tries
    names = "loops", "later_loops", "eps", "order", "threshold", "temperature"
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    first, again = chosen["first"], chosen["again"]
    if args.loops is not None or args.checkpoint is not None:  # the default loops suit the weights that come along
        drop = ("loops", "later_loops")
        first, again = ({key: x for key, x in part.items() if key not in drop} for part in (first, again))
    if args.order == "ancestral":
        given = dict(threshold=None, later_loops=None) | given
    noise = {} if args.noise is None else dict(noise=args.noise)
    return dict(tries=tries, first=first | given, again=again | given | noise)


def main():
    args = parse()
    device, task = rmdm.pick_device(args.device), TASKS[args.task]
    rmdm.set_threads(training=False)
    how, generator, operands = settings(args), torch.Generator(device), None
    if args.checkpoint is not None:
        models, files = load(args.task, args.checkpoint, None, device)
        operands = task.LENGTHS[len(models[0].config.coords)]
    problems, solutions, skipped = read(task, args.problem, args.data, operands)
    rmdm.tell_skipped(skipped)
    if args.checkpoint is None:
        models, files = load(args.task, None, len(problems[0]), device)
    N = len(models[0].config.coords)
    steps = [int(T) for T in args.steps.split(",")] if args.steps else [N]
    if args.data is None:
        return solve_and_show(task, models, problems, steps[0], generator.manual_seed(args.seed), args.show, how)
    measure(task, models, files, problems, solutions, steps, generator, args, how)


def solve_and_show(task, models, problems, T, generator, trace, how):
    """Solve the problems, some at a time, and print the answers. Returns the exit code."""
    right, began = 0, time.perf_counter()
    for some in np.array_split(problems, range(100, len(problems), 100)):
        out = solve(task, models, some, steps=T, generator=generator, trace=trace, **how)
        show(task, models[0], some, out, trace, how["first"].get("loops", models[0].config.loops))
        right += out.right.sum()
    print(f"{right} of {len(problems)} right, {time.perf_counter() - began:.2f} s")
    return 0 if right == len(problems) else 1


def measure(task, models, files, problems, solutions, steps, generator, args, how):
    """Print the scores of a file, one line for each number of steps."""
    if task is train_sudoku and (unknown := int((~solutions.any(1)).sum())):
        print(f"{unknown} of {len(problems)} solutions are not known: exact and cell leave them out", file=sys.stderr)
    for T in steps:  # for each the generator anew: no score depends on another
        began = time.perf_counter()
        generator.manual_seed(args.seed)
        out = solve(task, models, problems, steps=T, generator=generator, **how)
        score = dict(n=len(problems)) | task.score(problems, solutions, out.x) | out.scores()
        score["seconds"] = time.perf_counter() - began
        if args.json:
            about = dict(file=args.data, checkpoint=files, T=T, max_tries=how["tries"], seed=args.seed)
            about |= {part: how[part] for part in ("first", "again")} | dict(device=str(models[0].coords.device))
            print(json.dumps(about | score | dict(rounds=out.rounds)), flush=True)
            continue
        keys = [key for key in (task.SCORE, "valid", "within_1", "cell") if score.get(key) is not None]
        shares = [f"{key} {100 * score[key]:.1f}%" for key in keys]
        cost = f"tries {score['tries']:.2f}  loops {score['loops']:.1f}  {score['seconds']:.1f} s"
        print("  ".join([args.data, f"T={T}", f"n={score['n']}", *shares, cost]), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
