"""Rehearses one rank of a cluster run on fake CUDA tensors: memory, collectives, host waits and faults, without a GPU.

The program that runs is the project's own CUDA branch. This package only stands in for the device, the driver and the other ranks.
`python -m parallel.rehearsal` needs a process of its own: the device guard must be loaded before torch.
"""
