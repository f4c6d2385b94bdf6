"""The allocator settings, in processes of their own because they cannot all be taken back."""

import platform
import subprocess
import sys

CODE = """
import ctypes
import torch
from featsharp.memory import keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))

def leave(count):
    # Large blocks with a small one after each: the heap could not shrink.
    blocks = [(torch.ones(2**20), torch.ones(100)) for _ in range(count)]
    return [small for _, small in blocks]

leave(20)  # the allocator learns to keep such blocks
kept, before = [], resident()
with return_freed_memory() as taken:
    kept += leave(30)
    after = resident()
print(taken, keep_freed_memory(), keep_freed_memory(), after - before < 20)
with return_freed_memory():
    kept += leave(30)
kept += leave(60)
print(resident() - before > 100)
"""


def test_the_allocator_takes_settings_by_which_freed_memory_leaves_the_process_only_within_the_context():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    glibc = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
    found = result.stdout.split()
    assert found[:3] == [str(glibc)] * 3
    if glibc:
        assert found[3:] == ["True", "True"]
