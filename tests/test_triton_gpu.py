"""The cases of the Triton kernels, compiled and run on the GPU."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU and compiled kernels", allow_module_level=True)

from triton_cases import (  # noqa: F401
    test_a_bad_row_of_a_block_stays_alone,
    test_a_bad_row_stays_alone,
    test_activations,
    test_all_experts_of_width_zero,
    test_all_tokens_on_one_expert,
    test_block_tables,
    test_cuda_graph,
    test_dense,
    test_deterministic,
    test_ffn,
    test_ffn_of_many_slots,
    test_invalid_ids_give_zero,
    test_mixed_widths,
    test_no_tokens,
    test_outliers_beside_small_values,
    test_padded_columns,
    test_padded_columns_of_a_real_model,
    test_plain_and_fast_paths,
    test_rows_that_are_no_multiple_of_the_tile,
    test_single_width,
    test_split_k,
    test_topk_routing,
    test_topk_routing_of_nan_keeps_ids_in_range,
)

pytestmark = pytest.mark.gpu
