"""Sudoku with recursive masked diffusion: rules, data, evaluation, training.

    python train_sudoku.py                              # generates puzzles, trains, evaluates
    python train_sudoku.py --paper                      # the paper's form
    python train_sudoku.py --preset long                # the stronger model; the default on a GPU
    python train_sudoku.py --resume                     # goes on where an interrupted run stopped
    python train_sudoku.py --data sudoku.csv            # trains on the puzzles of a file
    python train_sudoku.py --set width=128 steps=3000   # fields of rmdm.Config and rmdm.TrainConfig

Every 1,000 steps it prints scores on held-out puzzles: the bound of eq. (3), in nats (`nelbo`), and the share that
is solved in one step (`exact_T1`) and in twenty (`exact_T20`). At the end it prints a table of the share that is
solved, by the number of loops and of steps, and a command that solves a puzzle.

A board is 81 tokens, row by row. The digits are their own ids, and a blank is MASK = 0. So

    "530070000..."  ->  5 3 0 0 7 0 0 0 0 ...

is at once a puzzle and a state of the diffusion. Clues are never editable; the blanks of the puzzle are.
The puzzles are generated here, with NumPy. Each has exactly one solution, and would have several with any clue
fewer ("minimal"). Only blanks are masked, so every state of the forward process still has exactly one solution.
"""


import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import rmdm
from rmdm import MASK, BadInput, require

ROW = np.arange(81) // 9
COL = np.arange(81) % 9
BOX = ROW // 3 * 3 + COL // 3
UNITS = np.array([np.flatnonzero(kind == i) for kind in (ROW, COL, BOX) for i in range(9)])  # (27, 9)
COORDS = tuple(zip(ROW.tolist(), COL.tolist(), BOX.tolist()))  # ours: three coordinates a cell, see rmdm.Config
CHARS = ".123456789"  # a token's character
SCORE = "exact"  # which of the scores sample.py prints first
LENGTHS = {81: None}  # the length of a sequence -> `operands` of `read`, which Sudoku has none of

# ---- 1. Rules ----


def check(board, puzzle=None):
    """The first mistake in a board (81,), in words, or None. Blanks are no mistake unless a puzzle (81,) is given:
    then all cells must be filled, and all clues kept."""
    for u, cells in enumerate(UNITS):
        counts = np.bincount(board[cells], minlength=10)[1:]
        if counts.max() > 1:
            return f"{('row', 'column', 'box')[u // 9]} {u % 9 + 1} has the digit {counts.argmax() + 1} twice"
    if puzzle is not None and (board == MASK).any():
        return f"{(board == MASK).sum()} cells are empty"
    if puzzle is not None and ((puzzle != MASK) & (puzzle != board)).any():
        return "a clue is changed"


def right(puzzles, boards):
    """Whether boards (n, 81) solve puzzles (n, 81): all nine digits in every unit, no clue changed. (n,) bool."""
    full = (np.sort(boards[:, UNITS], -1) == np.arange(1, 10)).all((1, 2))
    return full & ((puzzles == MASK) | (puzzles == boards)).all(1)


def broken(x):
    """Which boards x (n, 81), tensors, cannot come right, however their blanks are filled: (n,) bool."""
    units = x[:, UNITS].sort(-1).values  # (n, 27, 9): a digit that is there twice stands beside itself
    return ((units[..., 1:] == units[..., :-1]) & (units[..., 1:] != MASK)).flatten(1).any(1)


def cell_name(cell, N):
    """What to call a cell: r1c1= to r9c9=."""
    return f"r{cell // 9 + 1}c{cell % 9 + 1}="


def draw(cells):
    """81 characters -> the eleven lines of a grid."""
    rows = [" | ".join(" ".join(cells[r * 9 + c : r * 9 + c + 3]) for c in (0, 3, 6)) for r in range(9)]
    rule = "------+-------+------"
    return [*rows[:3], rule, *rows[3:6], rule, *rows[6:]]


# ---- 2. Generator: thousands of boards in lockstep ----
# A board is a column of c (81, n) uint16. A number is the set of digits that are still possible in a cell, one bit a
# digit:
#     digit    9 8 7 6 5 4 3 2 1
#     511      1 1 1 1 1 1 1 1 1   nothing is known
#     20       0 0 0 0 1 0 1 0 0   it is 3 or 5
#     4        0 0 0 0 0 0 1 0 0   it is 3

COUNT = np.array([i.bit_count() for i in range(512)], np.uint8)  # how many digits are possible


def deduce(c):
    """One round of two rules. Naked single: a digit that is known is impossible elsewhere in its row, column and box.
    Hidden single: if only one cell of a row, column or box can have a digit, it has it.

    Returns the new c, and (n,) bool: False where some digit has no place left, so that there is no solution."""
    # single: the cells with one digit left, else 0. once, twice: the digits possible in at least one and two cells.
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
    candidates, all boards side by side. When no board is left, the search goes on with all but the guess, for all
    guesses at once."""
    # owner: which board a column comes from. later: boards without their guess, with their owners
    solution, owner, later = np.zeros_like(c), np.arange(c.shape[1]), []
    while len(owner) or later:
        if not len(owner):
            c, owner = (np.concatenate(parts, -1) for parts in zip(*later))
            later = []
        new, ok = deduce(c)
        size = COUNT[new]
        done = ok & (size == 1).all(0) & (new == c).all(0)
        solution[:, owner[done]] = new[:, done]
        go = ok & (solution[0, owner] == 0)  # not contradicted, and not solved by another guess
        c, owner, new, size = c[:, go], owner[go], new[:, go], size[:, go]
        stuck = np.flatnonzero((new == c).all(0))
        cell = np.where(size > 1, size, 99)[:, stuck].argmin(0)
        other = new[:, stuck]
        guess = new[cell, stuck] & -new[cell, stuck]  # the lowest bit
        other[cell, np.arange(len(stuck))] ^= guess
        new[cell, stuck] = guess
        if len(stuck):
            later.append((other, owner[stuck]))
        c = new
    return solution


def generate(n, seed):
    """n minimal puzzles with exactly one solution: puzzles, solutions (n, 81) uint8. About 600 a second."""
    rng, done = np.random.default_rng(seed), []
    with rmdm.progress(total=n, desc="generating puzzles", unit="puzzle") as bar:
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
    """Full grids (n, 81) -> a key each. Grids that `symmetry` turns into each other share it, others rarely.

    For each pair of rows it takes the permutation of digits that leads from one to the other, and counts the digits
    that stay when it is done 2, 3 and 4 times. The key is these counts, sorted, and the same for columns."""
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
    """The last `held_out` puzzles for testing and the others for training, but those whose solution has the
    `fingerprint` of a held-out one. Returns (puzzles, solutions) twice, for training and for testing."""
    keys = fingerprint(solutions)
    secret = set(keys[-held_out:])
    keep = np.array([key not in secret for key in keys])
    return (puzzles[keep], solutions[keep]), (puzzles[-held_out:], solutions[-held_out:])


def generated(n, seed, folder="data"):
    """`generate`, kept in a file that is named after n, seed and the version of `generate`."""
    path = Path(folder) / f"sudoku-minimal-v3-seed{seed}-n{n}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rmdm.save(path, torch.from_numpy(np.stack(generate(n, seed))))
    try:
        return tuple(rmdm.read(path).numpy())
    except BadInput as e:
        raise BadInput(f"{e}; delete the file, and it is made again") from None


# ---- 3. Files ----


BLANKS = "._*?xX\u00b7-"  # besides 0. The last five count only where there are then exactly 81 cells
CELL, WORD = f"[0-9{BLANKS}]", f"[\\w{BLANKS}]+"  # a word is made of cells, or it is text
ODD = f"[^0-9{BLANKS}]"  # a character that is no cell
PIECE = f"({CELL}|{CELL}{{3}}|{CELL}{{9}})"  # a cell, three, or a row: the pieces that drawn puzzles and lists have
APART = re.compile(f"(?<![\\w{BLANKS}]){PIECE}[^\\w{BLANKS}]+(?={PIECE}(?!{WORD}))")  # and what parts it from the next


def fields_in(word):
    """The fields of 81 cells in a word, mostly one or none. Raises BadInput for what looks like a damaged one."""
    if len(word) < 20 or not re.search("[0-9.]", word):  # text, or part of a border
        return []
    if fields := [run for run in re.findall("[0-9._*]+", word) if len(run) == 81]:
        return fields
    odd = list(re.finditer(ODD, word))
    if len(word) == 81 and odd:
        raise BadInput(f"{odd[0][0]!r} at cell {odd[0].start() + 1} is neither a digit nor a blank (0 . _ *)")
    if len(word) == 81:
        return [word]
    damaged = len(word) > 40 and len(odd) < 4 or re.search(CELL + "{41}", word)  # not a hash: that has more letters
    if damaged or re.fullmatch("[0-9._*]+", word) and not re.fullmatch("[0-9]+[.][0-9]+", word):
        lost = " (leading zeros lost?)" if 40 < len(word) < 81 and re.fullmatch("[1-9]+0[0-9]*", word) else ""
        raise BadInput(f"a field of {len(word)} cells, not 81{lost}: {word[:40]!r}")
    return []


def scan(line):
    """(cells, kind) of a line. kind: "fields" of 81 cells, with a list of them; a "row" of a drawn grid, a "number",
    other "text", or a "border", with a text."""
    if number := re.search(r"[0-9]([.,][0-9]{1,20})?[eE]\+[4-8][0-9]", line):
        raise BadInput(f"{number[0]!r} is what a spreadsheet makes of 81 digits")
    for line in (line, APART.sub(r"\1", line)):  # as it is; then without what stands between single cells
        words = re.findall(WORD, line)
        if fields := [field for word in words for field in fields_in(word)]:
            return fields, "fields"
    rows = [word for word in words if not re.search(ODD, word)]
    if len(rows) < len(words):  # beside text, nine cells are a row only with a border: the date 12.03.202 is none
        rows = [row for row in rows if len(row) == 9 and re.search(r"[\[{|]", line)]
        return (rows[0], "row") if rows else ("", "text")
    cells = "".join(rows)
    if not re.search("[0-9.]", cells):
        return cells, "row" if len(cells) == 9 and "+" not in line else "border"
    if len(cells) == 81:
        return [cells], "fields"
    require(len(cells) <= 9, f"a puzzle has 81 cells, a row of a drawn one 9, this line {len(cells)}")
    return cells, "row" if len(cells) == 9 else "number"


def read(text, where="", operands=None):
    """The puzzles and solutions (n, 81) uint8 in a text, unknown solutions all 0. And {}: no row was skipped.

    A puzzle is a field of 81 cells, and its solution a second one in the same line. Or a puzzle is drawn as nine
    rows of nine cells. Words and other columns are ignored. Raises BadInput, with the number of the line, for a
    damaged puzzle, a field of 20 cells or more that is none, and a wrong solution; and if there is no puzzle."""
    text, found, grid, stray = re.sub("\r\n?", "\n", text), [], [], 0
    # A file of SadMan Sudoku has the puzzle once more, as its player left it.
    text = re.sub(r"(?im)^\[state\][^\[]*", lambda part: "\n" * part[0].count("\n"), text)
    try:
        for n, line in enumerate([*text.split("\n"), "the end"], 1):
            cells, kind = ("", "border") if line.lstrip().startswith("#") else scan(line)
            if kind in ("row", "border"):
                if kind == "row":
                    grid.append((n, cells))
                continue
            # Anything else ends a grid. Nine - are a row of it only if - stands for a blank in other rows, too.
            used = {cell for _, row in grid if re.search("[0-9.]", row) for cell in row}
            rows, grid = [row for row in grid if used.issuperset(row[1])], []
            if len(rows) % 9:
                n = rows[len(rows) // 9 * 9][0]
                raise BadInput(f"a grid of {len(rows) % 9} rows, not 9")
            found += [(rows[i][0], "".join(row for _, row in rows[i : i + 9]), "") for i in range(0, len(rows), 9)]
            if rows or kind != "text":  # a number before a puzzle was its heading, elsewhere it is a cut puzzle
                stray = n if kind == "number" else 0
            if kind == "fields":
                cells.sort(key=lambda field: not re.search("[^1-9]", field))  # the one with blanks is the puzzle
                fit = len(cells) < 3 and not re.search("[^1-9]", "".join(cells[1:]))
                require(fit, f"{len(cells)} fields of 81 cells that are not one puzzle and its solution")
                found.append((n, *cells, "")[:3])
        n = stray
        require(not stray, "too few cells for a puzzle (is the text cut off?)")
        require(found, "no puzzle in it")
        numbers, *fields = zip(*found)
        zeros = str.maketrans(BLANKS, "0" * len(BLANKS))
        texts = ("".join(field or "0" * 81 for field in part).translate(zeros) for part in fields)
        puzzles, solutions = (np.frombuffer(part.encode(), np.uint8).reshape(-1, 81) - 48 for part in texts)
        for i in range(0, len(found), 4096):  # some at a time, to save memory
            p, s = puzzles[i : i + 4096], solutions[i : i + 4096]
            wrong = broken(torch.from_numpy(p)).numpy() | s.any(1) & ~right(p, s)
            if wrong.any():
                k = wrong.argmax()
                n = numbers[i + k]
                raise BadInput(check(p[k]) or f"the solution is wrong: {check(s[k], p[k])}")
    except BadInput as e:
        place = f"{where}, line {n}" if n else where
        raise BadInput(f"{place}: {e}" if where else str(e)) from None
    return puzzles, solutions, {}


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


def picture(x, source, names):
    """Boards x (n, 81) seen through a symmetry: the token names[x[source[i]]] in cell i."""
    return names.gather(1, x.gather(1, source))


SYMMETRY = symmetry  # for restarts, see sample.solve


def batches(puzzles, solutions, device):
    """The `batch` function that rmdm.train asks for: random puzzles under random symmetries."""
    boards = torch.from_numpy(np.stack([puzzles, solutions])).to(device)  # uint8: small on the device

    def batch(n, generator):
        i = torch.randint(boards.shape[1], (n,), generator=generator, device=device)
        drawn = symmetry(n, generator, device)
        puzzle, x0 = (picture(x, *drawn) for x in boards[:, i].long())
        return x0, puzzle == MASK

    return batch


def start(model, puzzles):
    """Puzzles (n, 81) -> tokens (n, 81) int64 on the model's device, and `editable`, True = blank."""
    x = torch.from_numpy(puzzles).long().to(next(model.parameters()).device)
    return x, x == MASK


def score(puzzles, solutions, boards):
    """Scores of the answers `boards` to `puzzles`, both (n, 81): `valid`, the share that keeps all rules and clues;
    over the rows whose solution is known (not all 0), `exact`, the share with all 81 cells right, and `cell`, the
    share of the blanks that is right; None if no solution is known."""
    found = dict(valid=right(puzzles, boards).mean().item(), exact=None, cell=None)
    known = solutions.all(1)
    if known.any():
        same, blank = (boards == solutions)[known], (puzzles == MASK)[known]
        found |= dict(exact=same.all(1).mean().item(), cell=(same & blank).sum().item() / max(blank.sum().item(), 1))
    return found


def evaluate(model, puzzles, solutions, **options):
    """One try at each puzzle (n, 81), in batches that fit a cache; options as in rmdm.sample. Returns `score`."""
    parts = zip(*(part.split(128) for part in start(model, puzzles)))
    boards = torch.cat([rmdm.sample(model, *part, **options).x for part in parts])
    return score(puzzles, solutions, boards.cpu().numpy())


# ---- 5. The command ----

OURS = rmdm.Config(10, COORDS, loops=16, time=False, inject=True, coord_bias=True)
CARRY = rmdm.TrainConfig(grad_loops=8, carry=64)
PRESETS = {  # the model, the training, and the number of puzzles; chosen by measurement, see evidence/
    "paper": (rmdm.Config(10, 81), rmdm.TrainConfig(steps=5200), 10_000),
    "short": (OURS, replace(CARRY, steps=4400), 10_000),
    "long": (replace(OURS, width=128, heads=4), replace(CARRY, steps=18_000), 50_000),
}
HELD_OUT = 256  # puzzles kept for evaluation: a standard error of two to three points


def chosen(args, device):
    """The settings that the command line asks for: (config, training, about), the last of the task and its data."""
    config, training, count = PRESETS[args.preset or ("long" if device.type == "cuda" else "short")]
    config, training = rmdm.override(args.set, config, replace(training, seed=args.seed))
    count = count if args.puzzles is None else args.puzzles
    require(1 <= count <= 10**9, "--puzzles is from 1 to a billion")
    return config, training, dict(task="sudoku", data=args.data, puzzles=count)


def data(about, seed):
    """Puzzles and solutions to train on, and the same to test on, as `about` says."""
    count = about["puzzles"] + HELD_OUT
    if about["data"] is None:
        puzzles, solutions = generated(count, seed)
    else:
        puzzles, solutions, _ = read(rmdm.data_text(about), about["data"])
        known = np.flatnonzero(solutions.all(1))
        rows = np.random.default_rng(seed).permutation(known)[:count]  # files are often sorted by difficulty
        require(len(rows) > HELD_OUT, f"{about['data']}: training needs over {HELD_OUT} puzzles with their solutions")
        puzzles, solutions = puzzles[rows], solutions[rows]
    seen, test = split(puzzles, solutions, HELD_OUT)
    left_out = len(puzzles) - HELD_OUT - len(seen[0])
    why = f"{left_out:,} left out, since their solution is a held-out one but for symmetry"
    require(len(seen[0]), f"no puzzle is left to train on: {why}")
    print(f"{len(seen[0]):,} puzzles to train on, {HELD_OUT} held out to test" + (f"; {why}" if left_out else ""))
    return seen, test


def report(model, test):
    """Print what the model solves of the held-out puzzles, by loops and steps."""
    print(f"solved, % of {len(test[0])} held-out puzzles, by loops L and steps T (T=81 with threshold 0.99)")
    for L in (model.config.loops, 2 * model.config.loops):
        print(f"  L={L:<3}", end="", flush=True)
        for T in (1, 5, 20, 81):
            share = evaluate(model, *test, steps=T, loops=L, threshold=0.99 if T == 81 else None)["exact"]
            print(f"   T={T} {100 * share:.1f}", end="", flush=True)
            if T == 20 and not share:  # 81 steps would take long, and solve nothing
                break
        print()
        if not share:
            break


def main():
    parser = rmdm.training_parser(__doc__, PRESETS, "runs/sudoku")
    parser.add_argument("--puzzles", type=int, help="to train on, at random if of a file (default: 10000; long: 50000)")
    args = parser.parse_args()
    device = rmdm.pick_device(args.device)
    rmdm.set_threads(training=True)
    settings = rmdm.resumed_settings(parser, args, "sudoku") if args.resume else chosen(args, device)
    config, training, about = settings
    if not args.resume:  # else `train` does it: the checkpoint is read once less
        rmdm.begin(args.out, *settings)  # before the data are made
    seen, test = data(about, training.seed)
    x0 = torch.from_numpy(test[1]).long().to(device)
    blank = torch.from_numpy(test[0] == MASK).to(device)
    few = [part[:128] for part in test]

    def monitor(model):
        bound = rmdm.nelbo(model, x0, blank, generator=torch.Generator(device).manual_seed(0)).mean().item()
        return dict(nelbo=bound) | {f"exact_T{T}": evaluate(model, *few, steps=T)["exact"] for T in (1, 20)}

    torch.manual_seed(training.seed)
    model = rmdm.RMDM(config).to(device)
    batch = batches(*seen, device)
    model = rmdm.train_in(args.out, model, training, batch, monitor, about=about, resume=args.resume)
    report(model, test)
    checkpoint, puzzle = shlex.quote(args.out), "".join(CHARS[digit] for digit in test[0][0])
    print(f"\nsolve one that it has never seen:\n  python sample.py sudoku --checkpoint {checkpoint} {puzzle}")


if __name__ == "__main__":
    rmdm.run_script(main)
