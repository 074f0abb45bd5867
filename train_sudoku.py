"""Sudoku with recursive masked diffusion: rules, data, evaluation, training.

    python train_sudoku.py                              # generates puzzles, trains, evaluates; GPU if there is one
    python train_sudoku.py --resume                     # goes on where an interrupted run stopped
    python train_sudoku.py --preset long                # the stronger model, in an hour and a half
    python train_sudoku.py --paper                      # the paper's form: of ours only the optimizer
    python train_sudoku.py --data sudoku.csv            # trains on a published file, not generated puzzles
    python train_sudoku.py --set width=128 steps=3000   # fields of rmdm.Config and rmdm.TrainConfig

A board is 81 tokens, row by row: the digits are their own ids and a blank is MASK = 0, so that

    "530070000..."  ->  5 3 0 0 7 0 0 0 0 ...

is at once a puzzle and a diffusion state. Clues are never editable; the blanks of the puzzle are.
Data: puzzles with exactly one solution that lose it with any clue fewer ("minimal"), generated here with
NumPy. Masking only their blanks keeps every state of the forward process a puzzle with one solution.
"""

import argparse
import csv
import itertools
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import rmdm
from rmdm import MASK, BadInput

ROW = np.arange(81) // 9
COL = np.arange(81) % 9
BOX = ROW // 3 * 3 + COL // 3
UNITS = np.array([np.flatnonzero(kind == i) for kind in (ROW, COL, BOX) for i in range(9)])  # (27, 9)
COORDS = tuple(zip(ROW.tolist(), COL.tolist(), BOX.tolist()))  # three axes: our choice, see rmdm.Config
CHARS = ".123456789"  # a token's character
SCORE = "exact"  # the main one of those that `evaluate` returns
LINE = 81  # characters of a puzzle on one line; shorter lines are those of a drawn grid

# ---- 1. Rules ----


def parse(text):
    """81 digits, with 0 . _ or * for a blank, to (81,) uint8. White space and lines of a drawn grid are
    ignored. Raises BadInput for another length or character, or clues that break a rule."""
    text = re.sub(r"[\s|+\-\u2500-\u257f]", "", text)
    wrong = re.search(r"[^0-9._*]", text)
    if wrong:
        raise BadInput(f"{wrong[0]!r} at cell {wrong.start() + 1} is neither a digit nor a blank (0 . _ *)")
    if len(text) != 81:
        raise BadInput(f"a puzzle has 81 cells, this one {len(text)}" + " (several? one a line)" * (len(text) > 161))
    board = np.frombuffer(re.sub("[._*]", "0", text).encode(), np.uint8) - 48
    if (broken := conflict(board)) is not None:
        raise BadInput(broken)
    return board


def conflict(board):
    """The first rule that a board (81,) with blanks breaks, in words, or None."""
    for u, cells in enumerate(UNITS):
        counts = np.bincount(board[cells], minlength=10)[1:]
        if counts.max() > 1:
            return f"{('row', 'column', 'box')[u // 9]} {u % 9 + 1} has the digit {counts.argmax() + 1} twice"


def accept(puzzles, boards):
    """Whether boards (n, 81) solve puzzles (n, 81), (n,) bool: all nine digits in every unit, no clue changed."""
    full = (np.sort(boards[:, UNITS], -1) == np.arange(1, 10)).all((1, 2))
    return full & ((puzzles == MASK) | (puzzles == boards)).all(1)


def check(puzzle, board):
    """What is wrong with an answer (81,), in words; None if nothing is."""
    if accept(puzzle[None], board[None])[0]:
        return None
    return conflict(board) or f"{(board == MASK).sum()} cells are empty, or a clue is changed"


def name(cell, N=81):
    """What to call a cell: r1c1= to r9c9=."""
    return f"r{cell // 9 + 1}c{cell % 9 + 1}="


def draw(cells):
    """81 characters -> the eleven lines of a grid."""
    rows = [" | ".join(" ".join(cells[r * 9 + c : r * 9 + c + 3]) for c in (0, 3, 6)) for r in range(9)]
    rule = "------+-------+------"
    return [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]


# ---- 2. Generator: thousands of boards in lockstep ----
# A board is a column of c (81, n) uint16: for each cell the set of its possible digits, one bit a digit.

COUNT = np.array([bin(i).count("1") for i in range(512)], np.uint8)


def deduce(c):
    """One round of naked and hidden singles: (new c, (n,) bool False where a unit has no place for a digit)."""
    single = np.where(c & (c - np.uint16(1)), np.uint16(0), c)
    fixed = np.bitwise_or.reduce(single[UNITS], axis=1)
    c = np.where(single, c, c & ~(fixed[ROW] | fixed[9 + COL] | fixed[18 + BOX]))
    units = c[UNITS]  # (27, 9, n)
    once, twice = units[:, 0].copy(), np.zeros_like(units[:, 0])
    for i in range(1, 9):
        twice |= once & units[:, i]
        once |= units[:, i]
    only = once & ~twice
    only = c & (only[ROW] | only[9 + COL] | only[18 + BOX])
    return np.where(only, only, c), (once == 511).all(0)


def fill(n, rng):
    """n random full grids (81, n): guess in a cell with fewest candidates, start again after a contradiction."""
    c = np.full((81, n), 511, np.uint16)
    while True:
        new, ok = deduce(c)
        new[:, ~ok] = 511
        still = (new == c).all(0)
        stuck = np.flatnonzero(still & (COUNT[new] > 1).any(0))
        if still.all() and not len(stuck):
            return c
        size = COUNT[new[:, stuck]]
        cell = np.where(size > 1, size + rng.random(size.shape, np.float32), 99).argmin(0)
        weight = rng.random((9, len(stuck)), np.float32) * (new[cell, stuck] >> np.arange(9)[:, None] & 1)
        new[cell, stuck] = 1 << weight.argmax(0)
        c = new


def search(c):
    """One solution of each board, (81, n), all 0 if it has none: singles, then a guess in a cell with fewest
    candidates, all boards side by side; where there is no board left, they go back to all guesses at once."""
    solution, owner, later = np.zeros_like(c), np.arange(c.shape[1]), []
    while len(owner) or later:
        if not len(owner):
            c, owner = (np.concatenate(parts, -1) for parts in zip(*later))
            later = []
        new, ok = deduce(c)
        size = COUNT[new]
        done = ok & (size == 1).all(0) & (new == c).all(0)
        solution[:, owner[done]] = new[:, done]
        go = ok & (solution[0, owner] == 0)
        c, owner, new, size = c[:, go], owner[go], new[:, go], size[:, go]
        stuck = np.flatnonzero((new == c).all(0))
        cell = np.where(size > 1, size, 99)[:, stuck].argmin(0)
        other = new[:, stuck]
        guess = new[cell, stuck] & (~new[cell, stuck] + np.uint16(1))  # the lowest bit
        other[cell, np.arange(len(stuck))] ^= guess
        new[cell, stuck] = guess
        if len(stuck):
            later.append((other, owner[stuck]))
        c = new
    return solution


def generate(n, seed):
    """n minimal puzzles with exactly one solution: puzzles, solutions (n, 81) uint8. About 600 a second."""
    rng, done = np.random.default_rng(seed), []
    with tqdm(total=n, desc="generating puzzles", unit="puzzle", dynamic_ncols=True) as bar:
        for start in range(0, n, 1024):
            m = min(1024, n - start)
            grid = fill(m, rng)
            c, i = grid.copy(), np.arange(m)
            for cell in rng.random((81, m)).argsort(0):  # each board digs in its own random order
                test = c.copy()
                test[cell, i] = 511 & ~grid[cell, i]  # any other digit here? Then the clue has to stay
                gone = (search(test) == 0).all(0)
                c[cell[gone], i[gone]] = 511
            digits = COUNT[grid - np.uint16(1)].T + np.uint8(1)  # the bit's index, from 1
            done.append((np.where(c.T == 511, np.uint8(MASK), digits), digits))
            bar.update(m)
    return tuple(np.concatenate(part) for part in zip(*done))


def fingerprint(grids):
    """Full grids (n, 81) -> n keys that no symmetry of Sudoku changes, for telling grids apart up to all of
    `symmetry`: how often the permutation that takes one row (or column) to another, done 2, 3 and 4 times, leaves a
    digit in place, for all pairs of rows (or columns), sorted. Few other grids share a key."""
    sides = []
    for lines in (grids.reshape(-1, 9, 9), grids.reshape(-1, 9, 9).transpose(0, 2, 1)):
        where, pairs = lines.argsort(-1), []  # the place of each digit
        for i, j in itertools.combinations(range(9), 2):
            once = np.take_along_axis(lines[:, j], where[:, i], 1).astype(int) - 1
            power, key = once, 0
            for _ in range(3):
                power = np.take_along_axis(once, power, 1)
                key = key * 10 + (power == np.arange(9)).sum(1)
            pairs.append(key)
        sides.append(np.sort(np.stack(pairs, 1), 1))
    return [b"".join(sorted((rows.tobytes(), columns.tobytes()))) for rows, columns in zip(*sides)]


def split(puzzles, solutions, held_out):
    """The last `held_out` puzzles for testing and the others for training, without the training puzzles whose grid
    is, up to symmetry, a held-out one. Returns (puzzles, solutions) twice."""
    keys = fingerprint(solutions)
    secret = set(keys[-held_out:])
    keep = np.array([key not in secret for key in keys])
    return (puzzles[keep], solutions[keep]), (puzzles[-held_out:], solutions[-held_out:])


def generated(n, seed, folder="data"):
    """`generate` with a cache on disk, keyed by its settings, its checksum compared."""
    path = Path(folder) / f"sudoku-minimal-v3-seed{seed}-n{n}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rmdm.save(path, torch.from_numpy(np.stack(generate(n, seed))))
    try:
        return tuple(rmdm.read(path).numpy())
    except BadInput as e:
        raise BadInput(f"{e}; delete the file, and it is made again") from None


# ---- 3. Published files ----

PUZZLE, SOLUTION = ("puzzle", "quizzes", "question"), ("solution", "solutions", "answer")  # names of columns


def read_file(path):
    """Yield (puzzle (81,), solution (81,)) for each row of a file.

    Reads csv with a header, Kaggle 1M (quizzes,solutions) and 3M (puzzle,solution, ..), sudoku-extreme (question,
    answer, ..), and rows without one: a puzzle of 81 characters and, maybe, its solution. A solution that the file
    lacks is all MASK. Raises BadInput with the number of a bad line."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    columns, known = {}, dict(puzzle=PUZZLE, solution=SOLUTION)
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                row = next(csv.reader([line], strict=True))  # line by line: an open quote cannot swallow the next
                if not columns:
                    columns = {kind: i for kind, names in known.items() for i, x in enumerate(row) if x in names}
                    header, width = bool(columns), len(row)
                    columns = columns or dict(zip(("puzzle", "solution"), range(width)))
                    if "puzzle" not in columns:
                        raise BadInput(f"no column called {' or '.join(PUZZLE)}")
                    if header:
                        continue
                if len(row) != width:
                    raise BadInput(f"{len(row)} fields, not {width}")
                puzzle, solution = parse(row[columns["puzzle"]]), np.zeros(81, np.uint8)
                if "solution" in columns:
                    solution = parse(row[columns["solution"]])
                    if wrong := check(puzzle, solution):
                        raise BadInput(f"the solution is wrong: {wrong}")
            except (BadInput, csv.Error) as e:
                raise BadInput(f"{path}, line {number}: {e}") from None
            yield puzzle, solution


# ---- 4. Training batches and evaluation ----


def symmetry(n, generator=None, device=None):
    """n random symmetries of Sudoku: permute bands, rows within bands, stacks, columns within stacks, transpose, and
    rename the digits. Where each cell comes from (n, 81), and what each token becomes (n, 10)."""

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=device)

    def lines():  # (n, 9): where each row (or column) comes from
        return (rand(n, 3, 1).argsort(1) * 3 + rand(n, 3, 3).argsort(2)).view(n, 9)

    source = lines()[:, :, None] * 9 + lines()[:, None, :]
    source = torch.where(rand(n, 1, 1) < 0.5, source, source.transpose(1, 2)).reshape(n, 81)
    return source, F.pad(rand(n, 9).argsort(1) + 1, (1, 0))  # MASK stays MASK


AGAIN = dict(noise=0.2, symmetry=symmetry)  # in further tries, eq. (8)


def batches(puzzles, solutions, device):
    """The `batch` function that rmdm.train asks for: random puzzles under random symmetries."""
    boards = torch.from_numpy(np.stack([puzzles, solutions])).to(device)  # uint8: small on the device

    def batch(n, generator):
        i = torch.randint(boards.shape[1], (n,), generator=generator, device=device)
        drawn = symmetry(n, generator, device)
        puzzle, x0 = (rmdm.picture(x, *drawn) for x in boards[:, i].long())
        return x0, puzzle == MASK

    return batch


def start(model, puzzles):
    """Puzzles (n, 81) -> tokens (n, 81) int64 on the model's device, and `editable`, True = blank."""
    x = torch.from_numpy(puzzles).long().to(next(model.parameters()).device)
    return x, x == MASK


def judge(puzzles, x):
    """For the restarts of rmdm.sample_all: which of the answers x (n, 81) solve puzzles (n, 81), (n,) bool."""
    return accept(puzzles, x.cpu().numpy())


def evaluate(model, puzzles, solutions, **how):
    """Solve puzzles (n, 81) with rmdm.sample_all(**how) and score. Returns a dict of means: `exact`, all 81 right, and
    `cell`, the share of the blanks that is right, both None without solutions; `valid`, rules and clues hold; those of
    Filled.scores; and n and `seconds` in all."""
    began, blank = time.perf_counter(), puzzles == MASK
    out = rmdm.sample_all(model, *start(model, puzzles), lambda i, x: judge(puzzles[i.tolist()], x), **how)
    right, known = out.x.cpu().numpy() == solutions, (solutions != MASK).all()
    return dict(
        n=len(puzzles),
        exact=right.all(1).mean().item() if known else None,
        valid=out.right.double().mean().item(),
        cell=(1 - (~right & blank).sum(1) / blank.sum(1).clip(min=1)).mean().item() if known else None,
        **out.scores(),
        seconds=time.perf_counter() - began,
    )


# ---- 5. The command ----

OURS = rmdm.Config(10, COORDS, loops=16, inject=True, coord_bias=True)
PRESETS = {  # the model, the training and the number of puzzles; short and long chosen by measurement, see evidence/
    "short": (OURS, rmdm.TrainConfig(steps=4400, grad_loops=8, carry=64), 10_000),  # 11 minutes of one core
    "long": (replace(OURS, width=128, heads=4), rmdm.TrainConfig(steps=18_000, grad_loops=8, carry=64), 50_000),  # 93
    "paper": (rmdm.Config(10, 81, loops=8, time=True), rmdm.TrainConfig(steps=5200), 10_000),  # 23 minutes
}
HELD_OUT = 256  # puzzles kept for evaluation: a standard error of two to three points


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: short, on a GPU long; paper: the paper's form")
    add("--paper", action="store_const", const="paper", dest="preset", help="the same as --preset paper")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change fields of the preset")
    add("--puzzles", type=int, help="to train on; symmetries make many of each (default: 10000, or 50000 if long)")
    add("--data", metavar="FILE", help="a published file to take them from; default: they are generated")
    add("--seed", type=int, default=0, help="of data, initialization and training (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one, else cpu")
    add("--out", metavar="RUN", default="runs/sudoku", help="a new folder for the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in that folder; other options as before")
    args = parser.parse_args()
    device = rmdm.pick_device(args.device)
    config, training, count = PRESETS[args.preset or ("long" if device.type == "cuda" else "short")]
    config, training = rmdm.override(args.set, config, replace(training, seed=args.seed))
    count = count if args.puzzles is None else args.puzzles
    if not 1 <= count <= 10**9:
        raise BadInput("--puzzles is from 1 to a billion")
    about = dict(task="sudoku", seed=args.seed, data=args.data, puzzles=count)
    rmdm.begin(args.out, config, training, about, args.resume)
    if args.data is not None:
        rows = list(itertools.islice(read_file(args.data), count + HELD_OUT))
        if len(rows) <= HELD_OUT or not all(solution.all() for _, solution in rows):
            raise BadInput(f"{args.data}: training needs more than {HELD_OUT} puzzles, with solutions")
        puzzles, solutions = (np.array(part) for part in zip(*rows))
    else:
        puzzles, solutions = generated(count + HELD_OUT, args.seed)
    seen, test = split(puzzles, solutions, HELD_OUT)
    few = [part[:128] for part in test]
    x0, blank = torch.from_numpy(test[1]).long().to(device), torch.from_numpy(test[0] == MASK).to(device)

    def monitor(model):
        bound = rmdm.nelbo(model, x0, blank, generator=torch.Generator(device).manual_seed(0)).mean().item()
        return dict(nelbo=bound) | {f"exact_T{T}": evaluate(model, *few, steps=T)["exact"] for T in (1, 20)}

    torch.manual_seed(args.seed)
    model = rmdm.RMDM(config).to(device)
    model = rmdm.train(model, training, batches(*seen, device), monitor, args.out, about, args.resume)
    print(f"exact, % of {HELD_OUT} held-out puzzles, by loops L and steps T; the last with threshold 0.99")
    for L in (config.loops, 2 * config.loops):
        hows = [(T, dict(steps=T, threshold=0.99 if T == 81 else None, loops=L)) for T in (1, 5, 20, 81)]
        shares = [f"T={T} {100 * evaluate(model, *test, **how)['exact']:.1f}" for T, how in hows]
        print(f"  L={L:<3} {'   '.join(shares)}", flush=True)
    puzzle = "".join(map(str, test[0][0])).replace("0", ".")
    print(f"\nsolve one that it has never seen:\n  python sample.py sudoku --checkpoint {args.out} {puzzle}")


if __name__ == "__main__":
    rmdm.run_script(main)
