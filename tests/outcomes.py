"""Fails if a test was skipped on every torch generation that ran here: such a test guards nothing.

A test that needs a system package which is not on this machine says so in its reason; that is forgiven on a laptop,
and not where `CI` is set.

python tests/outcomes.py .outcomes
"""

import json
import os
import sys
from pathlib import Path


def main(folder: str) -> int:
    ran: dict[str, set[str]] = {}
    for file in sorted(Path(folder).glob("*.json")):
        for test, outcome in json.loads(file.read_text()).items():
            ran.setdefault(test, set()).add(outcome)
    guards_nothing = {"skipped", "absent"} if os.environ.get("CI") else {"skipped"}
    never = [test for test, outcomes in ran.items() if outcomes <= guards_nothing]
    for test in never:
        print(f"skipped everywhere: {test}")
    print(f"outcomes: {len(ran)} tests, {len(never)} skipped on every torch generation that ran")
    return 1 if never or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
