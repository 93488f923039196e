"""Replays one seed: `python -m sim --seed N [--turmoil SECONDS] [--trace]`."""

from __future__ import annotations

import argparse
import sys

from sim.world import TURMOIL_S, play


def main() -> int:
    parser = argparse.ArgumentParser(prog="sim", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from that one on, until one fails")
    parser.add_argument(
        "--turmoil", type=float, default=TURMOIL_S, help="virtual seconds in which things go wrong"
    )
    parser.add_argument("--trace", action="store_true", help="print everything that happens")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.seeds):
        outcome = play(seed, turmoil_s=options.turmoil, show=options.trace)
        print(
            f"seed {seed}: {outcome.violation or 'all is well'}; {outcome.entries} entries, "
            f"{outcome.steps} steps, {outcome.seconds:.2f} s of CPU, {outcome.digest[:16]}"
        )
        if outcome.violation:
            if not options.trace:
                print("\n".join(outcome.tail))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
