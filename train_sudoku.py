"""Sudoku with recursive masked diffusion: rules, data, evaluation, training.

    python train_sudoku.py                              # picks device and preset, trains, evaluates
    python train_sudoku.py --preset cpu --device cpu    # ten minutes on two CPU cores
    python train_sudoku.py --preset gpu                 # for one modern GPU, not measured on one yet
    python train_sudoku.py --resume runs/sudoku         # goes on where an interrupted run stopped
    python train_sudoku.py --data sudoku.csv            # trains on a published file, not generated puzzles
    python train_sudoku.py --set width=128 steps=3000   # any field of rmdm.Config and rmdm.TrainConfig

A board is 81 tokens, row by row: the digits are their own ids and a blank is MASK = 0, so that

    "530070000..."  ->  5 3 0 0 7 0 0 0 0 ...

is at once a puzzle and a diffusion state. Clues are never editable; the blanks of the puzzle are.
Data: puzzles with exactly one solution that lose it with any clue fewer ("minimal"), generated here with
NumPy. Masking only their blanks keeps every state of the forward process a puzzle with one solution.
"""

import csv
import itertools
import os
import re
from pathlib import Path

import rmdm  # isort: skip; first, since it sets up what torch reads when it is imported
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from rmdm import MASK, BadInput

ROW = np.arange(81) // 9
COL = np.arange(81) % 9
BOX = ROW // 3 * 3 + COL // 3
UNITS = np.array([np.flatnonzero(kind == i) for kind in (ROW, COL, BOX) for i in range(9)])  # (27, 9)
COORDS = tuple(zip(ROW.tolist(), COL.tolist(), BOX.tolist()))  # three axes: our choice, see rmdm.Config
CHARS = ".123456789"  # a token's character
SCORE = "exact"  # the main one of those that `evaluate` returns
LINE = 81  # characters of a puzzle on one line; shorter lines are those of a drawn grid

# ---------------------------------------------------------------------------------------------------
# 1. Rules
# ---------------------------------------------------------------------------------------------------


def parse(text):
    """81 digits, with 0 . _ or * for a blank, to (81,) uint8. White space and lines of a drawn grid are
    ignored. Raises BadInput for another length or character, or clues that break a rule."""
    text = re.sub(r"[\s|+\-\u2500-\u257f]", "", text)
    wrong = re.search(r"[^0-9._*]", text)
    if wrong:
        raise BadInput(f"{wrong[0]!r} at cell {wrong.start() + 1} is neither a digit nor a blank (0 . _ *)")
    if len(text) != 81:
        raise BadInput(f"a puzzle has 81 cells, this one {len(text)}")
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


def valid(boards):
    """(n, 81) -> (n,) bool: all nine digits in every row, column and box."""
    return (np.sort(boards[:, UNITS], -1) == np.arange(1, 10)).all((1, 2))


def place(cell, N=81):
    """What to call a cell: r1c1= to r9c9=."""
    return f"r{cell // 9 + 1}c{cell % 9 + 1}="


def draw(cells):
    """81 characters -> the eleven lines of a grid."""
    rows = [" | ".join(" ".join(cells[r * 9 + c : r * 9 + c + 3]) for c in (0, 3, 6)) for r in range(9)]
    rule = "------+-------+------"
    return [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]


# ---------------------------------------------------------------------------------------------------
# 2. Generator: thousands of boards in lockstep
# ---------------------------------------------------------------------------------------------------
# A board is a column of c (81, n) uint16: for each cell the set of its possible digits, one bit a digit.

COUNT = np.array([bin(i).count("1") for i in range(512)], np.uint8)


def deduce(c, hidden=True):
    """One round of naked and (unless told not to) hidden singles: (new c, (n,) bool False where a unit has no
    place for a digit)."""
    single = np.where(c & (c - np.uint16(1)), np.uint16(0), c)
    fixed = np.bitwise_or.reduce(single[UNITS], axis=1)
    c = np.where(single, c, c & ~(fixed[ROW] | fixed[9 + COL] | fixed[18 + BOX]))
    units = c[UNITS]  # (27, 9, n)
    once, twice = units[:, 0].copy(), np.zeros_like(units[:, 0])
    for i in range(1, 9):
        twice |= once & units[:, i]
        once |= units[:, i]
    if hidden:
        only = once & ~twice
        only = c & (only[ROW] | only[9 + COL] | only[18 + BOX])
        c = np.where(only, only, c)
    return c, (once == 511).all(0)


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


def search(c, depth_first=False):
    """One solution of each board, (81, n), all 0 if it has none, and the guesses that it took, (n,): singles,
    then a guess in a cell with fewest candidates, all boards side by side. Depth-first, a board goes back to
    its last guess alone; otherwise to all guesses that are left at once, which is faster for many boards."""
    solution, guesses, owner, later = np.zeros_like(c), np.zeros(c.shape[1], int), np.arange(c.shape[1]), []
    while len(owner) or later:
        if not len(owner):
            back = len(later) - 1 if depth_first else 0
            c, owner = (np.concatenate(parts, -1) for parts in zip(*later[back:]))
            del later[back:]
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
            np.add.at(guesses, owner[stuck], 1)
            later.append((other, owner[stuck]))
        c = new
    return solution, guesses


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
                gone = (search(test)[0] == 0).all(0)
                c[cell[gone], i[gone]] = 511
            digits = COUNT[grid - np.uint16(1)].T + np.uint8(1)  # the bit's index, from 1
            done.append((np.where(c.T == 511, np.uint8(MASK), digits), digits))
            bar.update(m)
    return tuple(np.concatenate(part) for part in zip(*done))


def classical(puzzles):
    """What solves puzzles (n, 81) without a network, (3, n): whether naked singles do, whether naked and hidden
    singles do, and the guesses of a depth-first search, which always does (-1: no solution)."""
    begin = np.where(puzzles == MASK, 511, 1 << puzzles.astype(np.uint16) >> 1).T.astype(np.uint16)
    results = []
    for hidden in (False, True):
        c, new = None, begin
        while not np.array_equal(c, new):
            c, (new, _) = new, deduce(new, hidden)
        results.append((COUNT[c] == 1).all(0))
    solution, guesses = search(begin, depth_first=True)
    return np.stack([*results, np.where(solution[0], guesses, -1)])


def canonical(grids):
    """Full grids (n, 81) with the digits renamed so that the first row reads 1..9: equal if relabelings."""
    names = np.empty((len(grids), 10), np.uint8)
    np.put_along_axis(names, grids[:, :9].astype(int), np.arange(1, 10, dtype=np.uint8)[None], 1)
    return np.take_along_axis(names, grids.astype(int), 1)


def split(puzzles, solutions, held_out):
    """The last `held_out` puzzles for testing and the others for training, without the training puzzles
    whose grid is a held-out one, relabelings included. Returns (puzzles, solutions) twice."""
    keys = [key.tobytes() for key in canonical(solutions)]
    secret = set(keys[-held_out:])
    keep = np.array([key not in secret for key in keys])
    return (puzzles[keep], solutions[keep]), (puzzles[-held_out:], solutions[-held_out:])


def generated(n, seed, folder="data"):
    """`generate` with a cache on disk, keyed by its settings, written atomically and checked when read."""
    path = Path(folder) / f"sudoku-minimal-v2-seed{seed}-n{n}.npy"
    try:
        both = np.load(path)
        if both.shape == (2, n, 81):
            p, s = both
            if valid(s).all() and ((p == MASK) | (p == s)).all():
                return p, s
        raise ValueError("the content is not that of a cache")
    except FileNotFoundError:
        pass
    except (ValueError, EOFError, OSError) as e:
        print(f"{path}: damaged ({e}); making it again")
    both = np.stack(generate(n, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as f:
        np.save(f, both)
    os.replace(part, path)
    return both[0], both[1]


# ---------------------------------------------------------------------------------------------------
# 3. Published files
# ---------------------------------------------------------------------------------------------------


def read_file(path, at_a_time=None, label=None):
    """Yield (puzzles, solutions, labels) from a file: (n, 81) uint8 twice and a list of n strings.

    Reads Kaggle 1M (quizzes,solutions) and 3M (id,puzzle,solution,clues,difficulty), sudoku-extreme
    (source,question,answer,rating), Shah et al. (.npy of (N, 325): the number of givens, then 81 x (row,
    column, value, strategy), givens first) and plain text of 81 characters a line. In a csv the columns are
    known by content, since published names contradict each other; `label` names a column to hand through.
    A solution that the file lacks is all MASK. Raises BadInput with the line number of a bad row."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    if label and str(path).endswith(".npy"):
        raise BadInput(f"{path}: no column {label!r}")
    rows = _read_npy(path) if str(path).endswith(".npy") else _read_text(path, label)
    while some := list(itertools.islice(rows, at_a_time)):
        yield _checked(path, some)


def _read_npy(path):
    try:
        data = np.load(path, mmap_mode="r")
    except Exception as e:  # a stranger's bytes can raise anything
        raise BadInput(f"{path}: not an .npy file, or a damaged one") from e
    if not isinstance(data, np.ndarray):
        raise BadInput(f"{path}: an archive, not one array")
    if data.ndim != 2 or data.shape[1] != 325:
        raise BadInput(f"{path}: expected an array (N, 325), found {data.shape}")
    for n, row in enumerate(data, 1):
        row = np.asarray(row, np.int64)
        cells = row[1:].reshape(81, 4)
        place = cells[:, 0] * 9 + cells[:, 1]
        ranges = 0 <= row[0] <= 81 and (0 <= cells[:, :3]).all() and (cells[:, :3] <= (8, 8, 9)).all()
        if not ranges or sorted(place) != list(range(81)):
            raise BadInput(f"{path}, row {n}: not 81 x (row 0-8, column 0-8, value 1-9, strategy)")
        board = np.zeros((2, 81), np.uint8)
        board[0, place[: row[0]]] = cells[: row[0], 2]
        board[1, place] = cells[:, 2]
        yield n, *board, ""


def _read_text(path, label):
    is_board = re.compile(r"[0-9._*]{81}").fullmatch
    columns = header = None
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
        reader = csv.reader("\n" if line.startswith("#") else line for line in f)  # so that lines are counted
        while True:
            try:
                line = [field.strip() for field in next(reader)]
            except StopIteration:
                return
            except csv.Error as e:
                raise BadInput(f"{path}, line {reader.line_num}: {e}") from None
            if not any(line):
                continue
            n = reader.line_num
            boards = [i for i, field in enumerate(line) if is_board(field)]
            if columns is None and not boards and not header and not any(re.search("[0-9._*]{9}", x) for x in line):
                header = line
                continue
            if columns is None:
                columns = sorted(boards, key=lambda i: not re.search("[0._*]", line[i]))[:2]
                if label and label not in (header or []):
                    raise BadInput(f"{path}: no column {label!r}")
                where = header.index(label) if label else 0
            if not columns or max(*columns, where) >= len(line) or not all(is_board(line[i]) for i in columns):
                raise BadInput(f"{path}, line {n}: expected 81 digits or blanks (0 . _ *), found {line[0][:81]!r}")
            board = [np.frombuffer(re.sub("[._*]", "0", line[i]).encode(), np.uint8) - 48 for i in columns]
            yield n, board[0], board[1] if len(board) > 1 else np.zeros(81, np.uint8), line[where] if label else ""


def _checked(path, rows):
    lines, puzzles, solutions, labels = zip(*rows)
    puzzles, solutions = np.array(puzzles), np.array(solutions)
    known = (solutions != MASK).any(1)
    for bad, what in (
        (known & ~valid(solutions), "the solution breaks the rules"),
        (known & ((puzzles != MASK) & (puzzles != solutions)).any(1), "the solution contradicts the puzzle"),
    ):
        if bad.any():
            raise BadInput(f"{path}, line {lines[bad.argmax()]}: {what}")
    for line, puzzle in zip(np.array(lines)[~known], puzzles[~known]):
        if (broken := conflict(puzzle)) is not None:
            raise BadInput(f"{path}, line {line}: {broken}")
    return puzzles, solutions, list(labels)


# ---------------------------------------------------------------------------------------------------
# 4. Training batches and evaluation
# ---------------------------------------------------------------------------------------------------


def augment(boards, generator=None):
    """Apply one random symmetry of Sudoku to each example of boards (k, B, 81), the same to all k: rename
    the digits, permute bands, rows within bands, stacks, columns within stacks, transpose. On any device."""
    k, B, _ = boards.shape

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=boards.device)

    def lines():  # (B, 9): where each row (or column) comes from
        return (rand(B, 3, 1).argsort(1) * 3 + rand(B, 3, 3).argsort(2)).view(B, 9)

    source = lines()[:, :, None] * 9 + lines()[:, None, :]
    source = torch.where(rand(B, 1, 1) < 0.5, source, source.transpose(1, 2)).reshape(1, B, 81)
    names = F.pad(rand(B, 9).argsort(1) + 1, (1, 0))  # MASK stays MASK
    return names.expand(k, B, 10).gather(2, boards.gather(2, source.expand(k, B, 81)))


def batches(puzzles, solutions, device):
    """The `batch` function that rmdm.train asks for: random puzzles under random symmetries."""
    boards = torch.from_numpy(np.stack([puzzles, solutions])).to(device)  # uint8: small on the device

    def batch(n, generator):
        i = torch.randint(boards.shape[1], (n,), generator=generator, device=device)
        puzzle, x0 = augment(boards[:, i].long(), generator)
        return x0, puzzle == MASK

    return batch


def start(model, puzzles, device="cpu"):
    """Puzzles (n, 81) -> tokens (n, 81) int64 and `editable`, True = blank."""
    if (model.config.vocab, len(model.config.coords)) != (10, 81):
        raise BadInput("the model is not one for Sudoku")
    x = torch.from_numpy(puzzles).long().to(device)
    return x, x == MASK


def evaluate(model, puzzles, solutions, **how):
    """Solve puzzles (n, 81) with rmdm.sample(**how) and score. Returns a dict: n; the share of puzzles that
    are exact (all 81 right) and valid (rules and clues hold); cell, the mean share of a puzzle's blanks that
    are right; the cost, see rmdm.sample_all. Without solutions exact and cell are nan."""
    x, cost = rmdm.sample_all(model, *start(model, puzzles, next(model.parameters()).device), **how)
    boards, blank = x.cpu().numpy(), puzzles == MASK
    right, unknown = boards == solutions, 1.0 if (solutions != MASK).all() else np.nan
    return dict(
        n=len(puzzles),
        exact=unknown * float(right.all(1).mean()),
        valid=float((valid(boards) & ((boards == puzzles) | blank).all(1)).mean()),
        cell=unknown * float(1 - ((~right & blank).sum(1) / blank.sum(1).clip(min=1)).mean()),
        **cost,
    )


def judge(puzzle, tokens, trace):
    """Replay the reveals, surest first in each step, up to the first that breaks a rule: (board, what is wrong)."""
    board = puzzle.copy()
    for step in trace:
        cells = step["revealed"].nonzero()[:, 0]
        for cell in cells[step["sure"][cells].argsort(descending=True)].tolist():
            board[cell] = step["x"][cell]
            if (broken := conflict(board)) is not None:
                what, board[cell] = f"{place(cell)}{board[cell]} breaks a rule, {broken}", MASK
                return board, f"{what}; shown up to there, {(board == MASK).sum()} cells left"
    return board, None


# ---------------------------------------------------------------------------------------------------
# 5. The command
# ---------------------------------------------------------------------------------------------------

PUZZLES = 10_000  # to train on: symmetries make many of each
HELD_OUT = 256  # puzzles kept for evaluation: the table at the end takes a minute or two on a CPU


def presets(args):
    if args.data and args.puzzles:
        raise BadInput("--data brings its own puzzles: leave out --puzzles")
    depth = dict(loops_min=8, supervise="8")  # 8 to 16 loops, the last 8 with gradient: see the README
    return {
        "cpu": (
            rmdm.Config(10, COORDS, width=64, heads=2, layers=1, loops=16, inject=True, coord_bias=True),
            rmdm.TrainConfig(steps=5500, batch=32, **depth),
            "about ten minutes on two CPU cores, data and evaluation included",
        ),
        "gpu": (
            rmdm.Config(10, COORDS, width=256, heads=4, layers=2, loops=16, inject=True, coord_bias=True),
            rmdm.TrainConfig(steps=8_500, batch=512, lr=0.01, lr_rest=2e-3, warmup=500, **depth),
            "meant for ten minutes of one modern GPU (not measured on one yet)",
        ),
    }


def prepare(args, device):
    if args.data:
        puzzles, solutions, _ = next(read_file(args.data), (None, None, None))
        if puzzles is None or len(puzzles) <= HELD_OUT:
            raise BadInput(f"{args.data}: training needs more than {HELD_OUT} puzzles")
        if not (solutions != MASK).all():
            raise BadInput(f"{args.data}: training needs a solution for every puzzle")
    else:
        puzzles, solutions = generated((args.puzzles or PUZZLES) + HELD_OUT, args.seed)
    seen, test = split(puzzles, solutions, HELD_OUT)
    if not len(seen[0]):
        raise BadInput("nothing left to train on: every grid is a held-out one")
    few = [part[:128] for part in test]
    x0, blank = torch.from_numpy(test[1]).long().to(device), torch.from_numpy(test[0] == MASK).to(device)

    def check(model):
        bound = rmdm.nelbo(model, x0, blank, generator=torch.Generator(device).manual_seed(0)).mean()
        return dict(nelbo=bound.item()) | {f"exact_T{T}": evaluate(model, *few, steps=T)["exact"] for T in (1, 20)}

    def report(model):
        L, steps = model.config.loops, (1, 5, 20, 81)
        print(f"\nexact, % of {HELD_OUT} held-out minimal puzzles, by loops L and steps T (confidence order)")
        loops = sorted({max(1, L // 2), L, L * 3 // 2})
        rmdm.grid(lambda L, T: 100 * evaluate(model, *test, steps=T, loops=L)["exact"], loops, steps)
        rmdm.by_noise(model, x0, blank)
        return "".join(map(str, test[0][0])).replace("0", ".")

    return batches(*seen, device), check, report


def main():
    options = {
        "--data": dict(metavar="FILE", help=f"train on a published file, its last {HELD_OUT} puzzles held out"),
        "--puzzles": dict(type=rmdm.within(int, 1, 10**8), help=f"how many to generate (default: {PUZZLES})"),
    }
    rmdm.launch("sudoku", __doc__, presets, prepare, options)


if __name__ == "__main__":
    rmdm.cli(main)
