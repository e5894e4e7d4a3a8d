"""Commands of their own files; `ditcast.cli` adds them to the others."""
