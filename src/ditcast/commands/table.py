"""The commands that have a file each; `ditcast.cli` adds them to its own."""

from __future__ import annotations

from ditcast.commands.compare import compare
from ditcast.commands.gate import gate
from ditcast.commands.inspect import inspect, verify
from ditcast.commands.report import report
from ditcast.commands.tune import tune

COMMANDS = (compare, gate, inspect, report, tune, verify)
