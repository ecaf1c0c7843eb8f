"""Where the addresses on standard input lie, by volatility3: FILE LEVELS CR3. Lines of hex, `-` for nowhere."""

import sys
from pathlib import Path
from typing import ClassVar

from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import elf, intel, physical


class Intel5Level(intel.Intel32e):
    """The same tables, one level more."""

    _maxvirtaddr = 57
    _structure: ClassVar = [("page map layer 5", 9, False), *intel.Intel32e._structure]


context = contexts.Context()
config = context.config
config["file.location"] = Path(sys.argv[1]).resolve().as_uri()
context.add_layer(physical.FileLayer(context, "file", "file"))
config["memory.base_layer"] = "file"
context.add_layer(elf.Elf64Layer(context, "memory", "memory"))
config["guest.memory_layer"] = "memory"
config["guest.page_map_offset"] = int(sys.argv[3], 16) & ~0xFFF
layer = {"4-level": intel.Intel32e, "5-level": Intel5Level}[sys.argv[2]](context, "guest", "guest")
bits = 57 if sys.argv[2] == "5-level" else 48
for line in sys.stdin.read().split():
    try:
        print(f"{layer._translate(int(line, 16) & ((1 << bits) - 1))[0]:x}")
    except exceptions.InvalidAddressException:
        print("-")
