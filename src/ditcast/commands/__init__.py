"""Commands in files of their own; `ditcast.cli` adds them to the others."""
