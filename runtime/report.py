"""Placeholder until written."""
def write_report(bundle, report): return None
