"""Where the kernel addresses on standard input lie, by drgn: FILE. The root first, then lines of hex, `-` for nowhere.

A dump of QEMU's has no VMCOREINFO unless the guest has a device for it: it is looked for in the guest's memory.
"""

import mmap
import re
import sys
from pathlib import Path

import drgn
from _drgn import _linux_helper_follow_phys as follow_phys


def vmcoreinfo(memory: mmap.mmap) -> bytes:
    """Give what the kernel says of itself."""
    at = memory.find(b"OSRELEASE=")
    while at >= 0:
        text = memory[at : memory.find(b"\0", at)]
        if b"\nSYMBOL(swapper_pg_dir)=" in text and b"\nNUMBER(phys_base)=" in text:
            return text
        at = memory.find(b"OSRELEASE=", at + 1)
    sys.exit("there is no VMCOREINFO in the guest's memory")


path = Path(sys.argv[1])
with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
    info = vmcoreinfo(memory)
program = drgn.Program(vmcoreinfo=info)
program.set_core_dump(path)
symbol = re.search(rb"^SYMBOL\(swapper_pg_dir\)=([0-9a-f]+)$", info, re.MULTILINE)
if symbol is None:
    sys.exit("VMCOREINFO does not name the kernel's root")
root = int(symbol[1], 16)
print(f"{follow_phys(program, root, root):x}")
for line in sys.stdin.read().split():
    try:
        print(f"{follow_phys(program, root, int(line, 16)):x}")
    except drgn.FaultError:
        print("-")
