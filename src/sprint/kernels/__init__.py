"""Triton kernels, and the operations of torch that launch them. Each has a plain twin that its tests compare it with.

`adamw`, `modulation`, `rotary` and `mode` need Triton; `launches` imports them when a launch is asked for. `fused` holds the
twins and chooses between both.
"""
