"""Table of GPUs by name: memory, and the vendors' dense peak rates (without structured sparsity).

Used by the planner (memory, seconds) and for the MFU of training. NVIDIA's documents from Ada and Hopper on print tensor
rates with 2:4 sparsity; the dense rate is half of it. `source` names the vendor's document; on 2026-11-28 the figures
were compared with public pages that quote it, not with the document itself. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    `device_names`: as `torch.cuda.get_device_name()` reports it; other names are other GPUs (laptops, MIG slices).
    `memory_bytes`: as `nvidia-smi` or `amd-smi` prints it; torch reports up to 1 % less.
    `bf16_flops`, `fp16_flops`: matrix products with fp32 accumulation; bf16 is None if the GPU has no bf16 units.
    `fp32_flops`: without TF32, which is off by default in torch.
    `memory_bandwidth`, `link_bandwidth`, `network_bandwidth`: bytes/s. The link is between the GPUs of a machine, in
    one direction. The network is that of a typical machine: assumed.
    """

    name: str
    device_names: tuple[str, ...]
    memory_bytes: int
    bf16_flops: float | None
    fp16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    link: str
    source: str

    def peak_flops(self, dtype: str) -> float:
        """Return the peak of matrix products in `dtype` (bf16, fp16 or fp32); bf16 runs as fp32 without bf16 units."""
        if dtype == "fp32":
            return self.fp32_flops
        if dtype == "fp16":
            return self.fp16_flops
        return self.fp32_flops if self.bf16_flops is None else self.bf16_flops


def _gpu(
    name: str,
    device_names: tuple[str, ...],
    memory_mib: int,
    half: float,
    fp32: float,
    bandwidth: float,
    link: tuple[str, float],
    network: float,
    source: str,
    has_bf16: bool = True,
) -> Gpu:
    """Return a Gpu. `half`: TFLOP/s of bf16 and of fp16; `fp32`: TFLOP/s; `bandwidth`, `link`, `network`: GB/s."""
    return Gpu(
        name, device_names, memory_mib * MIB,
        half * TERA if has_bf16 else None, half * TERA, fp32 * TERA,
        bandwidth * GIGA, link[1] * GIGA, network * GIGA, link[0], source,
    )  # fmt: skip


# Name and GB/s in one direction. NVLink bridges between two cards (A6000, H100 PCIe and NVL) are not counted.
_NVLINK_5, _NVLINK_4, _NVLINK_3 = ("NVLink 5", 900), ("NVLink 4", 450), ("NVLink 3", 300)
_NVLINK_2, _INFINITY_FABRIC = ("NVLink 2", 150), ("Infinity Fabric, 7 x 64 GB/s", 448)
_PCIE_5, _PCIE_4, _PCIE_3 = ("PCIe 5 x16", 64), ("PCIe 4 x16", 32), ("PCIe 3 x16", 16)

_NVIDIA = "https://www.nvidia.com/"
_HGX = _NVIDIA + "en-us/data-center/hgx/"
_DGX_B200 = _NVIDIA + "en-us/data-center/dgx-b200/"
_A100 = (
    _NVIDIA
    + "content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_V100 = (
    "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_GA102 = _NVIDIA + "content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"

# The HGX page has totals of eight GPUs: 36 PFLOP/s of sparse bf16 are 2250 TFLOP/s of a GPU, 600 TFLOP/s of fp32 are 75.
# Bandwidth of B200 and B300: 64 TB/s of the eight GPUs of a DGX B200; NVIDIA's HGX tables print 7.7 TB/s for each.
# No data sheet of the H20 is public: its figures are those of resellers. The H20 of 141 GB is not in the table.
GPUS = (
    _gpu("b300", ("NVIDIA B300 SXM6 AC", "NVIDIA B300"), 275_040, 2250, 75, 8000, _NVLINK_5, 100, _HGX),
    _gpu("b200", ("NVIDIA B200",), 183_359, 2250, 75, 8000, _NVLINK_5, 50, f"{_HGX} and {_DGX_B200}"),
    _gpu("h200", ("NVIDIA H200",), 143_771, 989, 67, 4800, _NVLINK_4, 50, _NVIDIA + "en-us/data-center/h200/"),
    _gpu(
        "h100", ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), 81_559, 989, 67, 3350, _NVLINK_4, 50,
        _NVIDIA + "en-us/data-center/h100/",
    ),
    _gpu(
        "h100-nvl", ("NVIDIA H100 NVL",), 95_830, 835, 60, 3900, _PCIE_5, 50, _NVIDIA + "en-us/data-center/h100/"
    ),
    _gpu(
        "h100-pcie", ("NVIDIA H100 PCIe",), 81_559, 756, 51, 2000, _PCIE_5, 50,
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    ),
    _gpu("h20", ("NVIDIA H20",), 97_871, 148, 44, 4000, _NVLINK_4, 50, "no public data sheet; resellers' figures"),
    _gpu(
        "a100-80gb", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 81_920, 312, 19.5, 2039, _NVLINK_3, 25, _A100
    ),
    _gpu("a100-80gb-pcie", ("NVIDIA A100 80GB PCIe",), 81_920, 312, 19.5, 1935, _PCIE_4, 25, _A100),
    _gpu(
        "a100-40gb", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 40_960, 312, 19.5, 1555, _NVLINK_3, 25, _A100
    ),
    _gpu(
        "a100-40gb-pcie", ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 40_960, 312, 19.5, 1555, _PCIE_4, 25, _A100
    ),
    _gpu("l40s", ("NVIDIA L40S",), 46_068, 362, 91.6, 864, _PCIE_4, 25, _NVIDIA + "en-us/data-center/l40s/"),
    _gpu("l4", ("NVIDIA L4",), 23_034, 121, 30.3, 300, _PCIE_4, 25, _NVIDIA + "en-us/data-center/l4/"),
    _gpu(
        "a10", ("NVIDIA A10",), 23_028, 125, 31.2, 600, _PCIE_4, 25,
        _NVIDIA + "content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf",
    ),
    _gpu("a6000", ("NVIDIA RTX A6000", "RTX A6000"), 49_140, 154.8, 38.7, 768, _PCIE_4, 12.5, _GA102),
    _gpu("rtx-5090", ("NVIDIA GeForce RTX 5090",), 32_607, 209.5, 104.8, 1792, _PCIE_5, 12.5, _RTX_BLACKWELL),
    _gpu("rtx-4090", ("NVIDIA GeForce RTX 4090",), 24_564, 165.2, 82.6, 1008, _PCIE_4, 12.5, _ADA),
    _gpu("v100", ("Tesla V100-SXM2-32GB",), 32_768, 125, 15.7, 900, _NVLINK_2, 12.5, _V100, has_bf16=False),
    _gpu("v100-16gb", ("Tesla V100-SXM2-16GB",), 16_384, 125, 15.7, 900, _NVLINK_2, 12.5, _V100, has_bf16=False),
    _gpu(
        "v100-pcie", ("Tesla V100-PCIE-32GB",), 32_768, 112, 14, 900, _PCIE_3, 12.5, _V100, has_bf16=False
    ),
    _gpu(
        "v100-16gb-pcie", ("Tesla V100-PCIE-16GB",), 16_384, 112, 14, 900, _PCIE_3, 12.5, _V100, has_bf16=False
    ),
    _gpu(
        "mi300x", ("AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF"), 196_592,
        1307.4, 163.4, 5300, _INFINITY_FABRIC, 50,
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
    ),
)  # fmt: skip

_ALIASES = {
    "a100": "a100-80gb",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "v100-32gb": "v100",
    "rtx-a6000": "a6000",
}
_ALIASES |= {short: f"rtx-{short[-4:]}" for short in ("4090", "rtx4090", "5090", "rtx5090")}


def names() -> list[str]:
    return [gpu.name for gpu in GPUS]


def by_name(name: str) -> Gpu | None:
    """Return the GPU called `name`, e.g. `h100`, or None. Case does not matter, and `_` may be written for `-`."""
    wanted = name.lower().replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    return next((gpu for gpu in GPUS if gpu.name == wanted), None)


def by_device_name(device_name: str) -> Gpu | None:
    """Return the GPU with this name in torch, or None if the table does not have it."""
    return next((gpu for gpu in GPUS if device_name in gpu.device_names), None)
