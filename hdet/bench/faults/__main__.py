"""``python -m hdet.bench.faults [--sections NAME ...] [--share 0.1]``: what was tried, what held, what failed.

Ends with status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from hdet.bench.faults.sections import Outcome, sections

_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fault test; returns the exit status."""
    known = sections()
    parser = argparse.ArgumentParser(prog="python -m hdet.bench.faults", description="Do wrong things to hdet.")
    parser.add_argument("--sections", nargs="+", choices=known, default=list(known), help="default: all")
    parser.add_argument("--share", type=_share, default=1.0, help="share of the cases, in (0, 1]; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    arguments = parser.parse_args(argv)
    print(f"{'section':<14} {'tried':>6} {'held':>6} {'refused':>8} {'seconds':>8} {'failed':>7}", flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in arguments.sections:
        started = time.monotonic()
        outcome = outcomes[name] = known[name].run(arguments.share, arguments.seed)
        print(
            f"{name:<14} {outcome.tried:>6} {outcome.held:>6} {sum(outcome.refused.values()):>8} "
            f"{time.monotonic() - started:>8.0f} {len(outcome.failures):>7}",
            flush=True,
        )
    for name, outcome in outcomes.items():
        if outcome.refused:
            print(f"\n{name}: refused by design")
            for rule, count in sorted(outcome.refused.items(), key=lambda item: (-item[1], item[0])):
                print(f"  {count:>5}  {rule}")
        for failure in outcome.failures[:_SHOWN]:
            print(f"\n{name}: FAILED: {failure}")
    return int(any(outcome.failures for outcome in outcomes.values()))


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}")
    return share


if __name__ == "__main__":
    sys.exit(main())
