"""`python -m tests.contract`: at least 5,000 requests from both documents, on a service of its own."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.contract.documents import GOOD_REQUESTS
from tests.contract.running import check, installed, service

EXAMPLES = 40


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="how many requests at least")
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    python, seed = installed(), wanted.seed
    cases = failed = 0
    with tempfile.TemporaryDirectory() as scratch, service(Path(scratch)) as server:
        while cases < wanted.cases:
            for model in GOOD_REQUESTS:
                for name in ("ours", "protocol"):
                    outcome = check(python, server, name, model, Path(scratch), EXAMPLES, seed)
                    tell(f"{name}, {model}, seed {seed}: {outcome.cases} requests, {outcome.failed} answers are wrong")
                    if outcome.failed:
                        tell(outcome.report)
                    cases += outcome.cases
                    failed += outcome.failed
            seed += 1
        errors = [line for line in server.lines() if line["level"] in ("error", "critical")]
    tell(f"{cases:,} requests, {failed:,} answers not as documented, {len(errors)} errors in the log")
    return 1 if failed or errors else 0


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
