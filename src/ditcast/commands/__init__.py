"""Commands of the command line that have a file each; `ditcast.cli` adds them to its own."""

from __future__ import annotations

from ditcast.commands.gate import gate
from ditcast.commands.inspect import inspect, verify
from ditcast.commands.report import report

COMMANDS = (gate, inspect, report, verify)
