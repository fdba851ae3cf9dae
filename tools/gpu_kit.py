"""Build a folder with vLLM and this project, to check a GPU machine that has neither vLLM nor a network.

    python tools/gpu_kit.py FOLDER [--vllm 0.32.0] [--chip 90]

The machine needs Python 3.12, torch 2.11 for CUDA 13, Triton 3.6 and transformers. The kit takes vLLM's Python modules
and two extensions from the wheel on PyPI, and zeroes the machine code for other chips. The last line printed is the
command to run on the machine. Use a kit for checks only: its vLLM lacks what other models and chips need.
"""

import argparse
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_MIB = 55
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
EXTENSIONS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
"""What the V2 runner needs of vLLM's machine code: built for libtorch's stable interface, so torch 2.11 loads it."""

PYTHON_ONLY = (".py", ".json", ".jinja", ".typed", ".txt", ".METADATA")
LEFT_OUT = (
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/benchmarks/",
    "vllm/third_party/flashmla/",
)

WHEELS = """
annotated-types apache-tvm-ffi==0.1.11 cachetools cbor2 distro fastapi<0.137 httpcore2 httpx2 importlib-metadata jiter
llguidance<1.8 msgspec openai opentelemetry-api orjson oss-harmony partial-json-parser prometheus-client py-cpuinfo
pybase64 pydantic-extra-types python-multipart pyzmq sniffio starlette typing-inspection xgrammar==0.2.8 zipp
"""
"""What vLLM imports on that path and such a machine lacks, at vLLM's versions; pydantic and its core come besides."""

COMMAND = """S=$(mktemp -d); K={folder}; tar xJf $K/vllm.txz -C $S \\
 && for f in $K/*.so.xz; do xz -dc $f > $S/$(basename $f .xz | tr + /); done \\
 && python3 -m pip install -q --no-index --no-deps --no-compile --target $S $K/*.whl \\
 && PYTHONPATH=$S HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \\
 python3 -m vllm_aasd.gpu_check --report ${{OUT:-.}}/gpu_check.json"""


def main() -> None:
    """Make the kit, and print its size and the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the kit; what it holds is replaced")
    parser.add_argument("--vllm", default="0.32.0", help="version (default %(default)s)")
    parser.add_argument("--chip", type=int, default=90, help="compute capability times 10 (default %(default)s)")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip_download(Path(scratch), [f"vllm=={given.vllm}"])
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        pack_vllm(wheel, given.folder, given.chip)
        pip_download(given.folder, requirements(given.folder))
        # A copy, since a build leaves files behind.
        source = Path(scratch, "project")
        shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
        project = ["wheel", "-q", "--no-deps", "--wheel-dir", str(given.folder), str(source)]
        subprocess.run([sys.executable, "-m", "pip", *project], check=True)
    sizes = {file.name: file.stat().st_size / 2**20 for file in sorted(given.folder.iterdir())}
    print("\n".join(f"{size:8.2f} MiB  {name}" for name, size in sizes.items()))
    total = sum(sizes.values())
    if total > MAX_MIB:
        sys.exit(f"error: the kit has {total:.1f} MiB, and {MAX_MIB} are allowed")
    print(f"{total:8.2f} MiB in all\n{COMMAND.format(folder=given.folder)}")


def pip_download(folder: Path, names: list[str]) -> None:
    """Download wheels for the GPU machine's Python, and no others that they need."""
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", *platforms, "-d", str(folder)]
    subprocess.run([*command, *names], check=True)


def requirements(folder: Path) -> list[str]:
    """The wheels to bring: pydantic-core at the version that pydantic asks for."""
    pip_download(folder, ["pydantic"])
    (pydantic,) = folder.glob("pydantic-*.whl")
    with zipfile.ZipFile(pydantic) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    core = next(line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: pydantic-core"))
    return [core, *WHEELS.split()]


def pack_vllm(wheel: Path, folder: Path, chip: int) -> None:
    """Put vLLM's Python modules and its two extensions into the kit, compressed."""
    with zipfile.ZipFile(wheel) as archive, tarfile.open(folder / "vllm.txz", "w:xz", preset=6) as modules:
        for name in archive.namelist():
            is_kept = ".dist-info/" in name or name.endswith(PYTHON_ONLY)
            if is_kept and not name.startswith(LEFT_OUT):
                information = tarfile.TarInfo(name)
                information.size = archive.getinfo(name).file_size
                modules.addfile(information, archive.open(name))
        for name in EXTENSIONS:
            data = bytearray(archive.read(name))
            kept, zeroed = keep_chip(data, chip)
            print(f"{name}: {kept} programs of sm_{chip} kept, {zeroed / 2**20:.0f} MiB of others zeroed")
            (folder / f"{name.replace('/', '+')}.xz").write_bytes(lzma.compress(bytes(data), preset=6))


def keep_chip(library: bytearray, chip: int) -> tuple[int, int]:
    """Zero the machine code of other chips in a shared library; the entries stay, so that CUDA's loader skips them.

    Returns:
        How many entries of the chip there are, and the bytes that were zeroed.

    Raises:
        ValueError: the library has no machine code for the chip.
    """
    kept = zeroed = 0
    for start, size in fatbin_sections(library):
        at, end = start, start + size
        while at < end - 16:
            magic, _, header, length = struct.unpack_from("<IHHQ", library, at)
            if magic != 0xBA55ED50:
                at += 8
                continue
            entry, at = at + header, at + header + length
            while entry < at:
                _, _, header, length = struct.unpack_from("<HHIQ", library, entry)
                if struct.unpack_from("<I", library, entry + 28)[0] == chip:
                    kept += 1
                else:
                    library[entry + header : entry + header + length] = bytes(length)
                    zeroed += length
                entry += header + length
            at = -(-at // 8) * 8
    if not kept:
        raise ValueError(f"no machine code for sm_{chip} in it")
    return kept, zeroed


def fatbin_sections(library: bytearray) -> Iterator[tuple[int, int]]:
    """Where a 64-bit ELF file holds CUDA's machine code: offsets and sizes."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + number * size) for number in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        name = bytes(library[start : library.index(b"\0", start)])
        if name in (b".nv_fatbin", b"__nv_relfatbin"):
            yield header[4], header[5]


if __name__ == "__main__":
    main()
