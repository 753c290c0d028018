"""What every test shares: hypothesis profiles, chosen by whether this is CI."""

import os

from hypothesis import settings

# CI must not fail by chance or by load: the same examples each run, and no deadline per example.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
