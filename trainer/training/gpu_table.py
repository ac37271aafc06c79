"""Table of GPUs by name: memory, and the vendors' dense peak rates (without structured sparsity).

The planner and the MFU of training use this table. NVIDIA's documents print tensor rates with 2:4 sparsity
from Ada and Hopper on; the dense rate is half of the printed rate. `source` names the vendor's document. On 2026-11-28
the figures were compared with public pages that quote these documents, not with the originals. This module imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Data of one GPU model.

    `device_names`: results of `torch.cuda.get_device_name()`. Laptop GPUs and MIG slices have other names.
    `memory_bytes`: the size that `nvidia-smi` or `amd-smi` prints; torch reports up to 1 % less.
    `bf16_flops`, `fp16_flops`: FLOP/s of matrix products with fp32 accumulation. `bf16_flops` is None without bf16 units.
    `fp32_flops`: FLOP/s without TF32, which is off by default in torch.
    `memory_bandwidth`: bytes/s. `link_bandwidth`: bytes/s between the GPUs of a machine, in one direction.
    `network_bandwidth`: assumed bytes/s of a machine's network connection, which all GPUs of the machine share.
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
        """Return the peak FLOP/s of matrix products in bf16, fp16 or fp32. Without bf16 units, bf16 runs at the fp32 peak."""
        bf16_flops = self.fp32_flops if self.bf16_flops is None else self.bf16_flops
        return {"bf16": bf16_flops, "fp16": self.fp16_flops, "fp32": self.fp32_flops}[dtype]


_Row = tuple[str, tuple[str, ...], int, float, float, float, tuple[str, float], float, str]

# (name of the link, GB/s in one direction). NVLink bridges between two cards (A6000, H100 PCIe and NVL) are not counted.
_NVLINK_5, _NVLINK_4, _NVLINK_3 = ("NVLink 5", 900), ("NVLink 4", 450), ("NVLink 3", 300)
_NVLINK_2, _INFINITY_FABRIC = ("NVLink 2", 150), ("Infinity Fabric, 7 x 64 GB/s", 448)
_PCIE_5, _PCIE_4, _PCIE_3 = ("PCIe 5 x16", 64), ("PCIe 4 x16", 32), ("PCIe 3 x16", 16)

_NVIDIA = "https://www.nvidia.com/"
_HGX = _NVIDIA + "en-us/data-center/hgx/"
_DGX_B200 = _NVIDIA + "en-us/data-center/dgx-b200/"
_H100 = _NVIDIA + "en-us/data-center/h100/"
_DATA_CENTER = _NVIDIA + "content/dam/en-zz/Solutions/Data-Center/"
_A100 = _DATA_CENTER + "a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_IMAGES = "https://images.nvidia.com/"
_V100 = _IMAGES + "content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_ADA = _IMAGES + "aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_BLACKWELL = _IMAGES + "aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
_GA102 = _NVIDIA + "content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"

# Columns: name, names in torch, memory in MiB, TFLOP/s in bf16 or fp16, TFLOP/s in fp32, GB/s of memory, link, GB/s of
# network, source. The HGX page has totals of eight GPUs: 36 PFLOP/s of sparse bf16 mean 2250 dense TFLOP/s per GPU, and
# 600 TFLOP/s of fp32 mean 75. Memory bandwidth of B200 and B300: an eighth of the 64 TB/s of a DGX B200 (NVIDIA's HGX
# tables print 7.7 TB/s). No data sheet of the H20 is public; its figures are from resellers. The H20 with 141 GB is not
# in the table. A V100 has no bf16 units, so its 16-bit rate is for fp16 only.
_ROWS: tuple[_Row, ...] = (
    ("b300", ("NVIDIA B300 SXM6 AC", "NVIDIA B300"), 275_040, 2250, 75, 8000, _NVLINK_5, 100, _HGX),
    ("b200", ("NVIDIA B200",), 183_359, 2250, 75, 8000, _NVLINK_5, 50, f"{_HGX} and {_DGX_B200}"),
    ("h200", ("NVIDIA H200",), 143_771, 989, 67, 4800, _NVLINK_4, 50, _NVIDIA + "en-us/data-center/h200/"),
    ("h100", ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), 81_559, 989, 67, 3350, _NVLINK_4, 50, _H100),
    ("h100-nvl", ("NVIDIA H100 NVL",), 95_830, 835, 60, 3900, _PCIE_5, 50, _H100),
    (
        "h100-pcie", ("NVIDIA H100 PCIe",), 81_559, 756, 51, 2000, _PCIE_5, 50,
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    ),
    ("h20", ("NVIDIA H20",), 97_871, 148, 44, 4000, _NVLINK_4, 50, "no public data sheet; resellers' figures"),
    ("a100-80gb", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 81_920, 312, 19.5, 2039, _NVLINK_3, 25, _A100),
    ("a100-80gb-pcie", ("NVIDIA A100 80GB PCIe",), 81_920, 312, 19.5, 1935, _PCIE_4, 25, _A100),
    ("a100-40gb", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 40_960, 312, 19.5, 1555, _NVLINK_3, 25, _A100),
    (
        "a100-40gb-pcie", ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 40_960, 312, 19.5, 1555, _PCIE_4, 25, _A100
    ),
    ("l40s", ("NVIDIA L40S",), 46_068, 362, 91.6, 864, _PCIE_4, 25, _NVIDIA + "en-us/data-center/l40s/"),
    ("l4", ("NVIDIA L4",), 23_034, 121, 30.3, 300, _PCIE_4, 25, _NVIDIA + "en-us/data-center/l4/"),
    ("a10", ("NVIDIA A10",), 23_028, 125, 31.2, 600, _PCIE_4, 25, _DATA_CENTER + "a10/pdf/a10-datasheet.pdf"),
    ("a6000", ("NVIDIA RTX A6000", "RTX A6000"), 49_140, 154.8, 38.7, 768, _PCIE_4, 12.5, _GA102),
    ("rtx-5090", ("NVIDIA GeForce RTX 5090",), 32_607, 209.5, 104.8, 1792, _PCIE_5, 12.5, _RTX_BLACKWELL),
    ("rtx-4090", ("NVIDIA GeForce RTX 4090",), 24_564, 165.2, 82.6, 1008, _PCIE_4, 12.5, _ADA),
    ("v100", ("Tesla V100-SXM2-32GB",), 32_768, 125, 15.7, 900, _NVLINK_2, 12.5, _V100),
    ("v100-16gb", ("Tesla V100-SXM2-16GB",), 16_384, 125, 15.7, 900, _NVLINK_2, 12.5, _V100),
    ("v100-pcie", ("Tesla V100-PCIE-32GB",), 32_768, 112, 14, 900, _PCIE_3, 12.5, _V100),
    ("v100-16gb-pcie", ("Tesla V100-PCIE-16GB",), 16_384, 112, 14, 900, _PCIE_3, 12.5, _V100),
    (
        "mi300x", ("AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF"), 196_592,
        1307.4, 163.4, 5300, _INFINITY_FABRIC, 50,
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
    ),
)  # fmt: skip

GPUS = tuple(
    Gpu(
        name, device_names, memory_mib * 2**20,
        None if name.startswith("v100") else half * 1e12, half * 1e12, fp32 * 1e12,
        bandwidth * 1e9, link_bandwidth * 1e9, network * 1e9, link, source,
    )
    for name, device_names, memory_mib, half, fp32, bandwidth, (link, link_bandwidth), network, source in _ROWS
)  # fmt: skip

_ALIASES = {
    "a100": "a100-80gb", "h100-80gb": "h100", "h100-sxm": "h100", "v100-32gb": "v100", "rtx-a6000": "a6000",
}  # fmt: skip
_ALIASES |= {short: f"rtx-{short[-4:]}" for short in ("4090", "rtx4090", "5090", "rtx5090")}


def names() -> list[str]:
    return [gpu.name for gpu in GPUS]


def gpu_by_name(name: str) -> Gpu | None:
    """Return the GPU with a name or alias, e.g. "h100", or None if the table lacks it. "_" equals "-"; case is ignored."""
    canonical_name = name.lower().replace("_", "-")
    canonical_name = _ALIASES.get(canonical_name, canonical_name)
    return next((gpu for gpu in GPUS if gpu.name == canonical_name), None)


def gpu_by_device_name(device_name: str) -> Gpu | None:
    """Return the GPU that torch calls `device_name`, or None if the table lacks it."""
    return next((gpu for gpu in GPUS if device_name in gpu.device_names), None)
