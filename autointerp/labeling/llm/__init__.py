"""Asking language models: providers, limits, retries, the ledger of calls, the budget. Read engine.py first."""
