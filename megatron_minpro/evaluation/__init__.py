"""`minpro evaluate`: pass@k of a checkpoint on mathematical benchmarks, from kept responses."""
