"""Leave only the GPU code for one architecture in the fat binaries of a shared library, so that it compresses well.

    python benchmarks/gpu_day/strip_fatbin.py IN.so OUT.so [--architecture 90]

The size of the library does not change: each fat binary keeps its place, and what was removed becomes zeros at its end.
A fat binary is a header (magic number, version, size of the header, size of what follows) and entries. An entry has its
kind (1 PTX, 2 machine code), version, size of the header, size of the payload, and at offset 28 the architecture.
"""

import argparse
import struct
from collections import Counter
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2
HEADER, LEAST_ENTRY, LARGEST_ENTRY = 16, 32, 4096
"""Size of the header of a fat binary, and smallest and largest size of an entry's header, in bytes."""


def entries(data: bytearray, start: int, end: int) -> list[tuple[int, int, int, int]] | None:
    """Kind, architecture, start and size of each entry; None if the bytes are no fat binary."""
    parsed = []
    while start + LEAST_ENTRY <= end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, start)
        size = header + payload
        if kind not in (PTX, MACHINE_CODE) or not LEAST_ENTRY <= header <= LARGEST_ENTRY or start + size > end:
            return None
        parsed.append((kind, struct.unpack_from("<I", data, start + 28)[0], start, size))
        start += size
    return parsed if start == end else None


def strip(data: bytearray, architecture: int) -> tuple[Counter, Counter]:
    """Strip in place; returns the bytes kept and those dropped, by architecture."""
    kept, dropped, at = Counter(), Counter(), data.find(MAGIC)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        start, end = at + header, at + header + size
        is_complete = version == 1 and header == HEADER and end <= len(data)
        parsed = entries(data, start, end) if is_complete else None
        if parsed:
            wanted = [entry for entry in parsed if entry[:2] == (MACHINE_CODE, architecture)]
            for entry in parsed:
                (kept if entry in wanted else dropped)[entry[1]] += entry[3]
            if wanted:
                body = b"".join(bytes(data[first : first + length]) for _, _, first, length in wanted)
                data[start:end] = body + bytes(size - len(body))
                struct.pack_into("<Q", data, at + 8, len(body))
        at = data.find(MAGIC, end if parsed else at + len(MAGIC))
    return kept, dropped


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--architecture", type=int, default=90, help="90: H100 and H200")
    args = parser.parse_args()
    data = bytearray(args.source.read_bytes())
    kept, dropped = strip(data, args.architecture)
    args.target.write_bytes(data)
    for what, sizes in (("kept", kept), ("dropped", dropped)):
        print(what, {f"sm_{number}": f"{size / 1e6:.1f} MB" for number, size in sorted(sizes.items())})


if __name__ == "__main__":
    main()
