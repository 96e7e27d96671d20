"""How much of the peaks is reached. Every number has a physical meaning and a prior; some were then fitted on published steps.

Fitted by parallel/planner/fit.py on the rows marked `fit` in parallel/planner/published_rows.yaml, in logarithms, each
held near its prior; `make plan-report` fits again with one model left out at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.planner.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of hardware peaks, and host times."""

    # Public: 794 of 989 TFLOP/s on H100, 1,745 of 2,250 on B200 (largest bf16 products).
    gemm: float = 0.752
    # Prior: fused experts on H100, 540 of 989 once reading the weights is counted apart; training kernels do better.
    grouped_gemm: float = 0.449
    fp8_gemm: float = 0.601
    fp8_grouped_gemm: float = 0.475
    # Fused causal attention, of the bf16 peak in every precision. Backward does 2.5 times the forward's products.
    attention_forward: float = 0.633
    attention_backward: float = 0.459
    attention_half_length: float = 1362.0  # tokens of a sequence at which half of that is reached
    fp8_attention: float = 1.21  # times as fast where the core runs in fp8 too
    memory: float = 0.694  # of the HBM bandwidth, in element-wise kernels
    network: float = 0.863  # of the nominal port, in all-to-all
    # Dispatch over NVLink: DeepEP on 8 H100 moves 337 and 244 GB/s where all-gather moves 383.
    nvlink_dispatch: float = 0.827
    # Part of dispatch and combine that vanishes behind another micro-batch; the kernels' own share of the multiprocessors counted in.
    hidden_alltoall: float = 0.562
    hidden_deepep: float = 0.507
    hidden_hybridep: float = 0.807
    # Microseconds of one layer, forward and backward, in which the GPU starts and ends kernels, whatever their size.
    kernel_gaps_us: float = 476.0
    # Host time of one layer, forward and backward, without CUDA graphs, in kernel launches (bf16; of each local expert; its fp8 extra).
    launches_layer: float = 540.0
    launches_fp8_layer: float = 240.0
    launches_expert: float = 6.03
    launches_fp8_expert: float = 83.6
    # Part of the host's time that partial graphs leave, and how many times more release 25.11 launched than 26.04.
    partial_graphs: float = 0.6
    release_2025: float = 2.28
    # Sizes go to the host before an all-to-all is sent: this part of the launches cannot be queued ahead.
    alltoall_sync: float = 0.203


DEFAULT = Efficiency()

# Where the hardware file holds rates that were reached, nothing is left to take off.
OF_MEASURED = replace(
    DEFAULT,
    gemm=1.0,
    grouped_gemm=1.0,
    attention_forward=1.0,
    attention_backward=1.0,
    attention_half_length=0.0,
    kernel_gaps_us=0.0,
    memory=1.0,
    network=1.0,
    nvlink_dispatch=1.0,
)


def efficiency_of(hardware: Hardware) -> Efficiency:
    """The fitted fractions, or none for hardware whose rates were measured."""
    return OF_MEASURED if hardware.measured else DEFAULT
