"""``expected.json``: stored results of smoke runs and of the trained optimizers."""

import json
import os
from pathlib import Path

import pytest

EXPECTED = Path(__file__).with_name("expected.json")


def expect(name, numbers):
    """Compares with the stored numbers; 1 % allows for other versions and processors.

    UPDATE_EXPECTED=1 (with -n 0) rewrites them; somebody has to check the change.
    """
    stored = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    if os.environ.get("UPDATE_EXPECTED"):
        stored[name] = numbers
        EXPECTED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    assert numbers == pytest.approx(stored[name], rel=0.01, abs=1e-6)
