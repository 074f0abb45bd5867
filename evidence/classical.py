"""What do solvers without a network make of a file of Sudokus?

    python evidence/classical.py FILE ..

Prints one JSON object a file: the share that naked and hidden singles solve, the share that a depth-first search
solves, and the guesses of the search.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import rmdm
from train_sudoku import COUNT, deduce, read


def singles(c):
    """Whether naked and hidden singles solve the boards c (81, n), candidate sets as in train_sudoku: (n,) bool."""
    old = None
    while not np.array_equal(old, c):
        old, (c, _) = c, deduce(c)
    return (COUNT[c] == 1).all(0)


def depth_first(c):
    """Solve boards c (81, n) side by side by singles and, where those end, a guess: the lowest digit of a cell with
    the fewest. A contradiction takes a board back to its last guess. (n,) bool solved, (n,) guesses."""
    c, n = c.copy(), c.shape[1]
    solved, guesses, others, going = np.zeros(n, bool), np.zeros(n, int), [[] for _ in range(n)], np.arange(n)
    while len(going):
        new, ok = deduce(c[:, going])
        still, size = (new == c[:, going]).all(0), COUNT[new]
        c[:, going] = new
        full = (size == 1).all(0)
        solved[going] = ok & still & full
        for k in np.flatnonzero(ok & still & ~full):
            i, cell = going[k], np.where(size[:, k] > 1, size[:, k], 99).argmin()
            lowest, other = c[cell, i] & (~c[cell, i] + np.uint16(1)), c[:, i].copy()
            other[cell] ^= lowest
            others[i].append(other)
            c[cell, i] = lowest
            guesses[i] += 1
        lost = [i for i in going[~ok] if not others[i]]  # no guess left to take back: no solution
        for i in going[~ok]:
            if others[i]:
                c[:, i] = others[i].pop()
        going = np.setdiff1d(going[~solved[going]], lost)
    return solved, guesses


def candidates(puzzles):
    """Puzzles (n, 81) as candidate sets (81, n)."""
    return np.where(puzzles == rmdm.MASK, 511, 1 << puzzles.astype(int) >> 1).T.astype(np.uint16)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    for path in parser.parse_args().files:
        puzzles, _, _ = read(rmdm.read_text(path), path)
        c = candidates(puzzles)
        solved, guesses = depth_first(c)
        facts = {"file": path, "n": len(puzzles), "singles": singles(c).mean(), "search": solved.mean()}
        facts |= {"guesses, median": np.median(guesses), "mean": guesses.mean(), "most": int(guesses.max())}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    rmdm.run_script(main)
