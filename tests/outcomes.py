"""Fails if a test was skipped on every torch generation that ran here: such a test guards nothing.

python tests/outcomes.py .outcomes
"""

import json
import sys
from pathlib import Path


def main(folder: str) -> int:
    ran: dict[str, set[str]] = {}
    for file in sorted(Path(folder).glob("*.json")):
        for test, outcome in json.loads(file.read_text()).items():
            ran.setdefault(test, set()).add(outcome)
    never = [test for test, outcomes in ran.items() if outcomes == {"skipped"}]
    for test in never:
        print(f"skipped everywhere: {test}")
    print(f"outcomes: {len(ran)} tests, {len(never)} skipped on every torch generation that ran")
    return 1 if never or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
