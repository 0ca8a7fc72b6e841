"""All that is to be measured on a GPU, in order of worth, within a time: `python -m benchmarks.gpu --out DIR`."""
