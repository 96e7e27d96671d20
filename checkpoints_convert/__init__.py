"""Hugging Face <-> Megatron checkpoints: one table of tensors, streaming readers and writers. Needs torch, numpy and xxhash alone.

What to call:   convert.py (both directions), preview.py (--dry-run), verify.py, inspection.py, quantize.py
The model:      hf_config.py (config.json), mapping.py (the table), extra_state.py (what Megatron looks for beside tensors)
Safetensors:    safetensors_format.py (headers, index, dealing out), safetensors_io.py (reader, writer)
torch_dist:     torch_dist_metadata.py (tensors and chunks), torch_dist_reader.py, torch_dist_writer.py, torch_record.py (one tensor's
                bytes), checkpoint_pickle.py (.metadata, safely), megatron_weights.py (the same seen under Hugging Face names)
Either:         weights.py (opens whichever it is), copying.py (rows, threads, progress), companions.py (tokenizer and other small files)
A conversion:   conversion_plan.py (what will lie where), journal.py (what is done), manifest.py (hashes), atomic_directory.py (all or none)
Quantizing:     quantized_weights.py (the export, checked), logit_error.py (what it cost)
"""
