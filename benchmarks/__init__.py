"""Benchmarks that print a table and write a CSV file; each is one command, `python -m benchmarks.NAME`.

On a CPU give `--quick` for a smoke run of under a minute. Its times say nothing about speed.
"""
