"""The profile of a step: what its kernels are taken for, its floors, and a run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rae.models.config import CONFIGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def profile_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("profile_step")


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_adaln_kernel", "residual sites"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "linears"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "linears"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, 128, 16, 4, 4, false>", "linears"),
        ("_rope_kernel", "attention"),
        ("_silu_mul_kernel", "swiglu"),
        ("_guided_euler_kernel", "euler"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "other"),
    ],
)
def test_kernels_are_grouped_by_name(profile_step: ModuleType, kernel: str, group: str) -> None:
    assert profile_step.group_of(kernel) == group


def test_the_floor_is_that_of_all_flops_and_of_the_sites_bytes(profile_step: ModuleType) -> None:
    limits = {"matmul_tflop_per_s": 790.0, "copy_gb_per_s": 4300.0}
    floors = profile_step.floors_ms(CONFIGS["DiTDH-XL-256"], 32, limits)
    assert floors["linears"] + floors["attention"] == pytest.approx(323.157 * 32 / 790, rel=1e-4)
    # 56 sites of 1152 channels with 12 bytes, 4 of 2048 with 18; 8,192 tokens
    assert floors["residual sites"] == pytest.approx(
        8192 * (56 * 1152 * 12 + 4 * 2048 * 18) / 4.3e9
    )


def test_a_run_on_the_tiny_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "profile_step.py", "--device", "cpu"]
    command += ["--model", tiny_checkpoint, "--batch", "2", "--precision", "fp32"]
    result = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "profile-2.txt").read_text() in result.stdout
    figures = json.loads((tmp_path / "profile-2.json").read_text())
    assert figures["wall_ms"] > 0 and figures["linears_alone_ms"] > 0
    by_kernel = sum(kernel["us"] for kernel in figures["kernels"]) / 1000
    by_group = sum(group["ms"] for group in figures["groups"].values())
    assert figures["busy_ms"] == pytest.approx(by_kernel) == pytest.approx(by_group)
    assert figures["groups"]["linears"]["ms"] > 0
    euler = next(k for k in figures["kernels"] if k["group"] == "euler")
    assert euler["calls"] == 1
