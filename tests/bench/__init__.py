"""Benchmarks: each a ratio within one run."""

import os

from residual_saes.conf.command import ENVIRONMENT

# Before torch is loaded, as `conf.command.start` does it for the commands.
os.environ.update({**ENVIRONMENT, **os.environ})
