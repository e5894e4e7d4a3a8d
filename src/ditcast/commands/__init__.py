"""Sub-commands in files of their own; `ditcast.cli` puts them together."""
