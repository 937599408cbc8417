"""Arithmetic about a run: costs, balance, curves. Imports only `config`."""
