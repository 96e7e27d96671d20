"""Grids of runs, paired by seed: cells, their rows, statistics over seeds, tables and pictures."""
