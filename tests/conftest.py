"""The hypothesis profiles of all tests."""

from __future__ import annotations

import os

import hypothesis

# HYPOTHESIS_PROFILE=long looks for longer; the usual run is the same each time, however busy the machine is.
hypothesis.settings.register_profile(
    "ci", max_examples=150, stateful_step_count=20, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("long", max_examples=3000, stateful_step_count=80, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
