"""The commands that have a file each; `ditcast.cli` adds them to its own."""

from __future__ import annotations

from ditcast.commands.compare import compare
from ditcast.commands.deploy import deploy
from ditcast.commands.engines import build
from ditcast.commands.gate import gate
from ditcast.commands.inspect import inspect, verify
from ditcast.commands.report import report
from ditcast.commands.sample import sample
from ditcast.commands.tune import tune

COMMANDS = (build, compare, deploy, gate, inspect, report, sample, tune, verify)
